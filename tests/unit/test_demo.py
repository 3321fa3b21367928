"""The demo without its page: what it shows, how it writes, what it judges."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from markupsafe import escape

import tiny_tokenizers
from bridle.certification.certificate import Certificate, PromptRecord, Tried
from bridle.certification.goal import Goal
from bridle.comparison.cell import Candidate, CellFiles
from bridle.comparison.tracing import trace
from bridle.constraints import Score, WordList, build_constraint
from bridle.demo.session import Draws, Request, Session
from bridle.demo.subject import subject_of
from bridle.demo.views import Page, certificate_html, draws_html, line_of_r, message_html, texts_html
from bridle.demo.writing import REDRAW, Chance, Controls, Token, Writing
from bridle.errors import UserError
from bridle.models.auxiliary import new_auxiliary
from bridle.models.guidance import NADOGuide
from bridle.report import texts as words
from bridle.utils.variables import NO_VARIABLES

HOSTILE = "<img src=x onerror=alert(1)> {{ 7*7 }} ${alert(1)}"


def random_auxiliary(model, **options):
    """An R that differs from token to token."""
    auxiliary = new_auxiliary(model, **options)
    torch.manual_seed(5)
    for name, parameter in auxiliary.named_parameters():
        if name.startswith(("head", "value", "memory")):
            torch.nn.init.normal_(parameter, std=0.3)
    return auxiliary.eval()


class Slow:
    """A session whose remote constraint answers when other texts are there."""

    remote = ("elsewhere",)

    def __init__(self, tab):
        self.tab = tab

    def judge(self, *given, **options):
        self.tab.scores = {"base": {}}
        return {"base": {"elsewhere": Score.of(1.0)}}


def test_an_answer_about_earlier_texts_is_not_given_to_later_ones():
    pytest.importorskip("gradio")
    from bridle.demo.page import Handlers, Tab

    tab = Tab(request=Request("a", ["base"], 3, 0, False), scores={"base": {}})
    _, message = Handlers(Slow(tab)).ask_remote(tab)
    assert "Other texts were written before the answer came" in str(message)
    assert tab.scores == {"base": {}}


@pytest.mark.parametrize(("names", "judge"), [(["far", "no e"], "no e"), (["far"], None)])
def test_no_other_host_is_asked_unless_a_person_chooses_it(session, names, judge):
    gradio = pytest.importorskip("gradio")
    from bridle.demo.page import build

    constraints = {name: session.subject.constraints[name] for name in names}
    session.subject = replace(session.subject, constraints=constraints)
    (dropdown,) = [block for block in build(session).blocks.values() if isinstance(block, gradio.Dropdown)]
    assert (dropdown.value, dropdown.visible) == (judge, True)


@pytest.fixture
def parts(tiny_model, tiny_tokenizer):
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer), initializer_range=0.1)
    return model, tiny_tokenizer, tiny_tokenizer("you never bring")["input_ids"]


def written(writing, controls=None):
    while not writing.is_finished:
        writing.step(controls or Controls())
    return writing


@pytest.mark.parametrize("form", [{}, {"memory": 8}, {"own_network": True}, {"form": "log-linear", "memory": 4}])
@pytest.mark.parametrize("is_guided", [False, True])
def test_each_token_has_the_p_q_and_r_of_the_finished_text(parts, form, is_guided):
    model, tokenizer, prompt = parts
    auxiliary = random_auxiliary(model, **form)
    writing = written(Writing(model, tokenizer, prompt, 12, 3, auxiliary, is_guided), Controls(guidance_scale=2.0))
    with NADOGuide(model, auxiliary, 2.0) as guide:
        expected = trace(guide, tokenizer, prompt + writing.ids, len(prompt))[len(prompt) :]
    assert len(writing.tokens) == len(expected) == 12
    for token, known in zip(writing.tokens, expected, strict=True):
        assert token.drawn.text == known["text"]
        for name in "pqr":
            assert getattr(token.drawn, name) == pytest.approx(known[name], abs=1e-5)
        for mine, theirs, sign in ((token.gains, known["gains"], 1), (token.losses, known["losses"], -1)):
            shifts = [sign * (one["q"] - one["p"]) for one in theirs]
            assert [sign * (one.q - one.p) for one in mine] == pytest.approx(shifts[: len(mine)], abs=1e-5)
            assert all(shift < 1e-5 for shift in shifts[len(mine) :]), "what does not gain is no gain"


def test_a_trace_lists_as_raised_only_what_q_raises_and_as_lowered_only_what_it_lowers(parts):
    model, tokenizer, prompt = parts
    for auxiliary, scale in ((random_auxiliary(model), 2.0), (new_auxiliary(model), 2.0)):  # the latter prefers nothing
        with NADOGuide(model, auxiliary, scale) as guide:
            traced = trace(guide, tokenizer, [*prompt, 7, 8], len(prompt))
        assert all(one["q"] > one["p"] for token in traced for one in token["gains"])
        assert all(one["q"] < one["p"] for token in traced for one in token["losses"])


def test_guidance_without_strength_writes_the_plain_text(parts):
    model, tokenizer, prompt = parts
    auxiliary = random_auxiliary(model)
    plain, guided, strong = (
        written(Writing(model, tokenizer, prompt, 12, 0, auxiliary, is_guided), Controls(scale)).ids
        for is_guided, scale in ((False, 5.0), (True, 0.0), (True, 5.0))
    )
    assert plain == guided
    assert guided != strong


def test_a_model_without_r_is_written_too(parts):
    writing = written(Writing(*parts, 4))
    assert [token.drawn.r for token in writing.tokens] == [None] * 4
    assert [token.gains for token in writing.tokens] == [[]] * 4
    assert line_of_r(writing.tokens) == ""


def test_the_controls_act_on_the_next_token(parts):
    model, tokenizer, prompt = parts
    controls, auxiliary = Controls(guidance_scale=0.0), random_auxiliary(model)
    writing = Writing(model, tokenizer, prompt, 8, 0, auxiliary, True)
    writing.step(controls)
    assert writing.tokens[-1].drawn.q == pytest.approx(writing.tokens[-1].drawn.p)
    controls.guidance_scale = 6.0
    writing.step(controls)
    assert writing.tokens[-1].drawn.q != pytest.approx(writing.tokens[-1].drawn.p, rel=0.05)
    controls.temperature = 1e-4
    writing.step(controls)
    likeliest = max([writing.tokens[-1].drawn, *writing.tokens[-1].gains], key=lambda one: one.q)
    assert writing.tokens[-1].drawn == likeliest


def test_a_text_whose_r_falls_below_the_bound_is_begun_anew(parts):
    model, tokenizer, prompt = parts
    auxiliary = random_auxiliary(model, memory=8)
    plain = written(Writing(model, tokenizer, prompt, 12, 0, auxiliary))
    lowest = sorted(token.drawn.r for token in plain.tokens)[1]
    kept = written(Writing(model, tokenizer, prompt, 12, 0, auxiliary), Controls(stop_below=lowest / 2))
    stopped = written(Writing(model, tokenizer, prompt, 12, 0, auxiliary), Controls(stop_below=lowest))
    assert 1 <= stopped.redrawn <= REDRAW
    assert stopped.ids != plain.ids
    assert all(token.drawn.r >= lowest for token in stopped.tokens)
    with NADOGuide(model, auxiliary) as guide:
        again = trace(guide, tokenizer, prompt + stopped.ids, len(prompt))[len(prompt) :]
    assert [token.drawn.r for token in stopped.tokens] == pytest.approx([one["r"] for one in again], abs=1e-5)
    assert kept.redrawn <= stopped.redrawn
    never = written(Writing(model, tokenizer, prompt, 12, 0, auxiliary), Controls(stop_below=1.1))
    assert (never.is_withheld, never.redrawn, never.text) == (True, REDRAW, "")
    auxiliary.config.provenance = {"tilt": -2.0}
    with pytest.raises(UserError, match="this one was fitted to a share"):
        Writing(model, tokenizer, prompt, 12, 0, auxiliary).step(Controls(stop_below=lowest))


def test_a_text_ends_by_its_end_token(parts, monkeypatch):
    monkeypatch.setattr("bridle.demo.writing.end_token_ids", lambda *_: list(range(400)))
    writing = Writing(*parts, 5)
    writing.step(Controls())
    assert writing.has_ended
    assert writing.is_finished


# ---------------------------------------------------------------------- a session


@pytest.fixture
def session(tiny_folder, tmp_path):
    folder = str(tiny_folder())
    make = Session(subject_of(folder))
    model, _, _ = make._loaded("model")
    random_auxiliary(model).save_pretrained(tmp_path / "r")
    constraints = {"no e": build_constraint("regex:e", "no e"), "far": WordList(["kettle"], name="far")}
    constraints["far"].waits = True
    return Session(subject_of(folder, str(tmp_path / "r"), constraints))


def request(*names, prompt="you never", tokens=8, **options):
    return Request(prompt, names, tokens, **options)


def test_texts_are_written_side_by_side(session):
    rounds = [
        [len(one.ids) for one in writings.values()]
        for writings in session.write(request("model", "guided"), Controls())
    ]
    assert rounds[0] == [0, 0], "what is coming shows at once"
    assert rounds[-1] == [8, 8]
    assert all(abs(one - other) <= 1 for one, other in rounds)


def test_stop_leaves_the_text_as_it_is(session):
    controls = Controls()
    for writings in session.write(request("model"), controls):
        controls.stopped = len(writings["model"].ids) == 3
    assert len(writings["model"].ids) == 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(), "methods: choose one to 4 to see side by side, not 0"),
        (request("modle"), "methods: there is no method 'modle'; did you mean model?"),
        (request("model", tokens=64), "length: 64 new tokens do not fit into model's context of 64"),
        (request("model", prompt="e" * 200), "prompt of model: the prompt has"),
        (request("model", as_chat=True), "prompt: chat messages need a chat template, and"),
    ],
)
def test_a_request_that_cannot_be_obeyed_is_refused_in_words(session, asked, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        list(session.write(asked, Controls()))


def test_a_prompt_can_be_the_turn_of_a_chat(tiny_model, tmp_path):
    tokenizer = tiny_tokenizers.tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    session = Session(subject_of(str(tmp_path)))
    assert session.has_chats
    asked = request("model", tokens=4, as_chat=True)
    *_, writings = session.write(asked, Controls())
    assert tokenizer.decode(writings["model"].prompt) == "<bos>[user] you never\n[assistant] "
    assert asked.given == [{"role": "user", "content": "you never"}]


def test_remote_constraints_are_asked_only_on_request(session):
    assert list(session.local) == ["no e"]
    assert list(session.remote) == ["far"]
    texts = {"one": "the kettle", "other": "warm"}
    assert session.judge(texts, "you", remote=False) == {
        "one": {"no e": Score(0.0, False)},
        "other": {"no e": Score(1.0, True)},
    }
    assert session.judge(texts, "you", remote=True)["one"] == {"far": Score(0.0, False)}


def test_many_completions_arrive_in_parts_with_a_rate(session):
    asked = request("model", "guided")
    *_, last = (
        {name: (len(one.texts), len(one.scores)) for name, one in draws.items()}
        for draws in session.draw(asked, Controls(guidance_scale=3.0), 10, "no e")
    )
    assert last == {"model": (10, 10), "guided": (10, 10)}
    *_, again = session.draw(asked, Controls(guidance_scale=3.0), 10, None)
    assert again["model"].scores == []
    assert again["model"].rate.value is None


def test_the_bound_on_r_holds_for_many_completions_too(session):
    asked = request("model", "guided")
    *_, free = session.draw(asked, Controls(), 8, None)
    *_, held = session.draw(asked, Controls(stop_below=0.95), 8, None)
    assert None not in free["model"].texts
    assert held["model"].texts != free["model"].texts
    assert None in held["model"].texts, "some are withheld"
    *_, judged = session.draw(asked, Controls(stop_below=0.95), 8, "no e")
    found = judged["model"]
    assert [score is None for score in found.scores] == [text is None for text in found.texts]
    assert found.rate.n == 8 - found.withheld, "what is withheld does not comply"
    assert f"{found.withheld} withheld" in draws_html(judged, "no e")
    assert draws_html(judged, "no e").count('class="dot withheld"') == sum(one.withheld for one in judged.values())


def test_a_model_that_has_to_be_loaded_is_named_first(tiny_folder):
    gradio, lines, folder = pytest.importorskip("gradio"), [], str(tiny_folder())
    from bridle.demo.page import Handlers, Tab

    session = Session(subject_of(folder), show=lines.append)
    asked = ("you never", ["model"], 2, 0, False)
    first, *others = Handlers(session).write(Tab(), 1.0, 1.0, 0.0, False, *asked)
    assert first[0] == gradio.skip()
    assert "Loading model …" in first[1]
    assert lines == [f"loading {folder}"]
    assert [message for _, message in others] == [""] * len(others)
    assert session.unloaded(["model", "nobody"]) == []


def test_a_withheld_text_is_not_judged(session):
    pytest.importorskip("gradio")
    from bridle.demo.page import Handlers, Tab

    tab = Tab()
    *_, (texts, _) = Handlers(session).write(tab, 1.0, 1.0, 0.999, False, "you never", ["model"], 8, 0, False)
    assert tab.writings["model"].is_withheld
    assert "then withheld" in texts
    assert "complies" not in texts


def test_the_rate_counts_what_is_scored():
    scores = [Score(0.0, False), Score(1.0, True), Score(1.0, True), Score.missing("no answer")]
    rate = Draws("base", 4, ["a"] * 4, scores).rate
    assert (rate.value, rate.n, rate.missing) == (pytest.approx(1 / 3), 3, 1)
    assert 0 < rate.low < 1 / 3 < rate.high < 1
    unscored = Draws("base", 1, ["a"], [Score.missing("no answer")])
    assert "1 of 1 drawn; none has a score by kind" in draws_html({"base": unscored}, "kind")


# ---------------------------------------------------------------------- what is shown


def test_a_run_shows_its_model_before_and_after_and_guided(recipe, tmp_path):
    folder = tmp_path / "run"
    for part in ("model", "auxiliary/round-1"):
        (folder / part).mkdir(parents=True)
    for part in ("auxiliary", "auxiliary/round-1"):
        (folder / part / "config.json").write_text("{}", encoding="utf-8")
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe().read_text(encoding="utf-8"), encoding="utf-8")
    subject = subject_of(str(folder))
    found = {name: (one.auxiliary, one.is_guided) for name, one in subject.variants.items()}
    first, last = str(folder / "auxiliary" / "round-1"), str(folder / "auxiliary")
    assert found == {"base": (first, False), "tuned": (last, False), "guided": (first, True)}
    assert subject.shown == ["base", "tuned", "guided"]
    assert list(subject.constraints) == ["no e"]
    assert subject.max_new_tokens == 8


def test_a_comparison_shows_one_method_of_each_kind(recipe, tmp_path):
    folder = tmp_path / "comparison"
    mapping = yaml.safe_load(recipe().read_text(encoding="utf-8"))
    names = ["base", "filtration", "sft", "nado-decoding", "constrained", "rl"]
    for name in names[:-1]:  # rl failed
        cell = CellFiles(folder, name, 1, NO_VARIABLES)
        (cell.folder / "auxiliary" / "round-1").mkdir(parents=True)
        if name in ("constrained", "nado-decoding"):
            for part in ("auxiliary", "auxiliary/round-1"):
                (cell.folder / part / "config.json").write_text("{}", encoding="utf-8")
        guide = str(cell.folder / "auxiliary") if name == "nado-decoding" else None
        made = mapping["model"] if name in ("base", "nado-decoding") else str(cell.folder / "model")
        cell.write_candidate(Candidate(made, guide, 2.0))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    results = {"methods": {name: {} for name in names}, "seeds": [0, 1]}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    subject = subject_of(str(folder))
    assert list(subject.variants) == names[:-1]
    assert subject.shown == ["base", "sft", "constrained", "nado-decoding"]
    assert subject.guidance_scale == 2.0, "as it was measured; the recipe's regulariser has 1"
    r = {name: one.auxiliary and one.auxiliary.removeprefix(str(folder)) for name, one in subject.variants.items()}
    assert r == {
        "base": "/nado-decoding/seed-1/auxiliary",
        "filtration": None,
        "sft": None,
        "nado-decoding": "/nado-decoding/seed-1/auxiliary",
        "constrained": "/constrained/seed-1/auxiliary",
    }
    given = subject_of(str(folder), guide="elsewhere")
    assert given.shown == ["base", "sft", "constrained", "guided"]
    assert given.variants["sft"].auxiliary == "elsewhere"
    assert given.variants["constrained"].auxiliary == subject.variants["constrained"].auxiliary


def test_a_folder_without_models_is_refused(recipe, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe().read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match="holds no model yet"):
        subject_of(str(folder))
    (folder / "metrics.jsonl").unlink()
    (folder / "results.json").write_text('{"methods": {"sft": {}}, "seeds": [0]}', encoding="utf-8")
    with pytest.raises(UserError, match="no method of this comparison is complete"):
        subject_of(str(folder))


def test_the_certificate_of_the_folder_is_shown_and_one_that_was_changed_is_refused(tiny_folder):
    folder = tiny_folder()
    tried = Tried(HOSTILE, "model", "", None, 1.0, 400, 0, 0, 0.0075, None, True)
    prompts = PromptRecord("unseen.jsonl", 400, "")
    goal = Goal(0.01, 0.95)
    certificate = Certificate(goal, [tried], 1, prompts, {"name": "kind"}, "", {"max_new_tokens": 8}, "", {})
    assert subject_of(str(folder)).certificate is None
    certificate.save(folder / "certificate.json")
    html = certificate_html(subject_of(str(folder)).certificate)
    assert "at most 1% of the completions of &lt;img" in html
    assert all(escape(limit) in html for limit in certificate.limits)
    changed = (folder / "certificate.json").read_text(encoding="utf-8").replace("at most 1%", "at most 0%")
    (folder / "certificate.json").write_text(changed, encoding="utf-8")
    with pytest.raises(UserError, match="the file was changed"):
        subject_of(str(folder))


# ---------------------------------------------------------------------- HTML


def hostile_writing(parts):
    model, tokenizer, prompt = parts
    chance = Chance(HOSTILE, 0.5, 0.5, 0.25)
    return Writing(model, tokenizer, prompt, 4, tokens=[Token(chance, [chance], [chance])], ids=[5])


def test_all_text_is_escaped(parts):
    score = Score.missing(HOSTILE)
    page = Page([HOSTILE], is_judged=True, scores={HOSTILE: {HOSTILE: score}})
    found = [
        texts_html({HOSTILE: hostile_writing(parts)}, HOSTILE, page),
        draws_html({HOSTILE: Draws(HOSTILE, 1, [HOSTILE], [score])}, HOSTILE),
        message_html(HOSTILE),
    ]
    for html in found:
        assert "<img" not in html
        assert "&lt;img" in html


@pytest.mark.parametrize(
    ("text", "direction"),
    [("“you 12”", "ltr"), ("12 “مرحبا you", "rtl"), ("שלום", "rtl"), ("12 …", "ltr"), ("", "ltr")],
)
def test_a_text_runs_as_its_first_letter_does(parts, text, direction):
    assert words.direction(text) == direction
    assert f'dir="{direction}">' in texts_html({"base": written(Writing(*parts, 0))}, text, Page())


@pytest.mark.parametrize(
    ("page", "cover"),
    [
        (Page(), ""),
        (Page(is_covered=True), "text without a score"),
        (Page(is_judged=True), ""),
        (Page(is_judged=True, scores={"base": {"a": Score(1.0, True)}}), ""),
        (Page(is_judged=True, scores={"base": {"a": Score(1.0, True), "b": Score(0.0, False)}}), "violating text"),
        (Page(is_judged=True, scores={"base": {"a": Score.missing("no answer")}}), "text without a score"),
        (Page(["b"], True, True, {"base": {"a": Score(1.0, True)}}), ""),
        (Page(["b"], True, True, {"base": {}}), "text without a score"),
        (Page(["b"], False, True, {"base": {}}), ""),
    ],
)
def test_a_text_is_covered_where_it_violates_or_has_no_score(page, cover):
    assert page.cover("base") == cover


def test_the_line_of_r_runs_from_left_to_right():
    tokens = [Token(Chance("a", 0.1, 0.1, r), [], []) for r in (1.0, 0.5, None, 0.0)]
    assert line_of_r(tokens) == "0.0,0.0 33.3,12.0 100.0,24.0"
