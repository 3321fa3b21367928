"""The page: Gradio's inputs, and our own HTML for what models write."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gradio as gr

from bridle.constraints import Score
from bridle.demo.session import Request, Session
from bridle.demo.subject import MOST
from bridle.demo.views import Page, certificate_html, draws_html, header_html, message_html, texts_html
from bridle.demo.writing import Controls, Writing
from bridle.errors import RunStopped, UserError

SAMPLES = 32
LONGEST = 512  # tokens
SECONDS, OF_TOKEN = 0.1, 0.0005  # between two pictures of texts that are being written, and more for each token shown
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE = {"trigger_mode": "multiple", "concurrency_limit": None}


@dataclass
class Tab:
    """What one browser tab has asked for and seen; its newest texts and its newest draws go on, and older ones end."""

    writing: Controls = field(default_factory=Controls)
    drawing: Controls = field(default_factory=Controls)
    request: Request | None = None
    writings: Mapping[str, Writing] = field(default_factory=dict)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    is_covered: bool = False

    def set(self, **values: Any) -> None:
        """Changes the controls of what goes on."""
        for controls in (self.writing, self.drawing):
            for name, value in values.items():
                setattr(controls, name, value)


class Handlers:
    """What the page's controls do; each yields or returns HTML, the last piece a message."""

    def __init__(self, session: Session):
        self.session = session
        self.page = Page(list(session.remote))

    def write(
        self, tab: Tab, guidance_scale: float, temperature: float, stop_below: float, covered: bool, *asked: Any
    ) -> Iterator[Any]:
        """Writes the texts and has them judged: (texts, message)."""
        tab.writing.stopped, tab.writing = True, Controls(guidance_scale, temperature, stop_below)
        controls, request, page, last = tab.writing, _request(*asked), replace(self.page, is_covered=covered), 0.0
        tab.request, tab.scores, tab.is_covered = None, {}, covered
        try:
            yield from self._loading(request)
            for writings in self.session.write(request, controls):
                pause = SECONDS + OF_TOKEN * sum(len(one.tokens) for one in writings.values())
                if controls is tab.writing and time.monotonic() - last > pause:
                    yield texts_html(writings, request.prompt, page), ""
                    last = time.monotonic()
            if controls is not tab.writing:
                return
            tab.request, tab.writings = request, writings
            tab.scores = self._judged(tab, remote=False)
            yield self._judged_texts(tab), ""
        except (UserError, RunStopped) as error:
            yield gr.skip(), message_html(str(error))

    def ask_remote(self, tab: Tab) -> Any:
        """Asks the constraints of other hosts about the texts: (texts, message)."""
        if tab.request is None:
            return gr.skip(), message_html("Write texts first, and let them end.")
        asked = tab.scores  # of these texts; others may be written before the answer
        try:
            answers = self._judged(tab, remote=True)
        except UserError as error:
            return gr.skip(), message_html(str(error))
        if tab.scores is not asked:
            return gr.skip(), message_html("Other texts were written before the answer came; ask again.")
        for name, scores in answers.items():
            asked[name] |= scores
        return self._judged_texts(tab), ""

    def draw(
        self, tab: Tab, guidance_scale: float, temperature: float, stop_below: float, judge: str | None, *asked: Any
    ) -> Iterator[Any]:
        """Draws many completions: (dots, message)."""
        tab.drawing.stopped, tab.drawing = True, Controls(guidance_scale, temperature, stop_below)
        controls, request = tab.drawing, _request(*asked)
        try:
            yield from self._loading(request)
            for draws in self.session.draw(request, controls, SAMPLES, judge):
                if controls is not tab.drawing:
                    return
                yield draws_html(draws, judge), ""
        except (UserError, RunStopped) as error:
            yield gr.skip(), message_html(str(error))

    def stop(self, tab: Tab) -> None:
        """No further token is drawn."""
        tab.set(stopped=True)

    def _loading(self, request: Request) -> Iterator[Any]:
        """Says which models the request waits for, if any."""
        if names := self.session.unloaded(request.names):
            yield gr.skip(), message_html(f"Loading {', '.join(names)} …", is_alarm=False)

    def _judged(self, tab: Tab, remote: bool) -> dict[str, dict[str, Score]]:
        assert tab.request is not None
        texts = {name: writing.text for name, writing in tab.writings.items() if not writing.is_withheld}
        return self.session.judge(texts, tab.request.given, remote)

    def _judged_texts(self, tab: Tab) -> str:
        assert tab.request is not None
        page = replace(self.page, is_covered=tab.is_covered, is_judged=True, scores=tab.scores)
        return texts_html(tab.writings, tab.request.prompt, page)


def _request(prompt: str, names: list[str], length: float, seed: float, as_chat: bool) -> Request:
    return Request(prompt, names, int(length), int(seed or 0), as_chat)


def build(session: Session) -> gr.Blocks:
    """The page of a session."""
    subject, handlers = session.subject, Handlers(session)
    with gr.Blocks(title=f"Try {subject.title}", analytics_enabled=False, fill_width=True) as page:
        tab = gr.State(Tab())
        _html(header_html(subject))
        asked, sliders, covered = _inputs(session)
        with gr.Row():
            write = gr.Button("Write", variant="primary")
            stop = gr.Button("Stop")
        message = _html()
        _html("<h2>Texts</h2>")
        texts = _html()
        remote = gr.Button(f"Ask {', '.join(session.remote)}", visible=bool(session.remote))
        _html(f"<h2>{SAMPLES} completions each</h2>")
        judges = [*session.local, *((f"{name} (asks another host)", name) for name in session.remote)]
        chosen, is_choice = next(iter(session.local), None), len(judges) > 1 or bool(session.remote)
        judge = gr.Dropdown(judges, label="Judged by", value=chosen, visible=is_choice)
        draw = gr.Button(f"Draw {SAMPLES}")
        dots = _html()
        if subject.certificate is not None:
            with gr.Accordion("Certificate", open=False):
                _html(certificate_html(subject.certificate))
        held = [tab, *sliders.values()]
        for begins in (write.click, asked[0].submit):
            begins(handlers.write, [*held, covered, *asked], [texts, message], **PRIVATE, **AT_ONCE)
        draw.click(handlers.draw, [*held, judge, *asked], [dots, message], **PRIVATE, **AT_ONCE)
        remote.click(handlers.ask_remote, tab, [texts, message], **PRIVATE)
        stop.click(handlers.stop, tab, None, queue=False, **PRIVATE)
        for name, slider in sliders.items():
            sets = partial(_set, name)
            slider.input(sets, [tab, slider], None, queue=False, trigger_mode="always_last", **PRIVATE)
    return page


def _set(control: str, tab: Tab, value: float) -> None:
    tab.set(**{control: value})


def _inputs(session: Session) -> tuple[list[Any], dict[str, gr.Slider], gr.Checkbox]:
    """The inputs of a `Request`, those of `Controls`, and whether texts are covered while they are written."""
    subject = session.subject
    prompt = gr.Textbox(label="Prompt", lines=2, placeholder="The weather in")
    label = f"Methods, at most {MOST}"
    names = gr.CheckboxGroup(list(subject.variants), value=subject.shown, label=label)
    with gr.Row():
        sliders = {
            "guidance_scale": gr.Slider(0, 10, subject.guidance_scale, step=0.1, label="Guidance scale η"),
            "temperature": gr.Slider(0.1, 2, 1, step=0.05, label="Temperature"),
            "stop_below": gr.Slider(0, 0.95, 0, step=0.05, label="Stop and draw anew below R"),
        }
    with gr.Row():
        length = gr.Slider(1, LONGEST, min(subject.max_new_tokens, LONGEST), step=1, label="Tokens")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
    with gr.Row():
        covered = gr.Checkbox(False, label="Cover texts until they are judged")
        as_chat = gr.Checkbox(False, label="The prompt is a user's turn of a chat", visible=session.has_chats)
    return [prompt, names, length, seed, as_chat], sliders, covered


def _html(text: str = "") -> gr.HTML:
    return gr.HTML(text, elem_classes="bridle", padding=False)
