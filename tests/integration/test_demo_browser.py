"""The demo as people meet it: in a browser, with a mouse, a keyboard, a phone."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
import torch

import tiny_tokenizers
from bridle.constraints import Remote, WordList, build_constraint
from bridle.models.auxiliary import new_auxiliary
from bridle.models.loading import load_model
from bridle.utils.http import is_loopback
from browsing import axe, launched, needs_chromium, watching
from loopback import ok, serving

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn, which serves the page, is not installed")
pytest.importorskip("gradio", reason="gradio, which makes the page, is not installed")

from bridle.demo.server import application  # noqa: E402 - after what it needs
from bridle.demo.session import Session  # noqa: E402
from bridle.demo.subject import subject_of  # noqa: E402
from bridle.demo.writing import Writing  # noqa: E402

SCRIPTS = [
    template.replace("N", str(number))
    for number in range(40)
    for template in (
        "<script>alert(N)</script>",
        "<img src=x onerror=alert(N)>",
        "{{constructor.constructor('alert(N)')()}}",
        "${alert(N)}",
        "\"><svg onload='alert(N)'>",
    )
]

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def scorer():
    with serving() as server:
        server.answer = lambda request: ok({"score": 0.9})
        yield server


@pytest.fixture(scope="module")
def session(tiny_model, scorer, tmp_path_factory):
    """A tiny model, a third of whose tokens are scripts, with a random R and three constraints."""
    folder = tmp_path_factory.mktemp("demo")
    tokenizer = tiny_tokenizers.tiny_tokenizer(chat_template=None)
    tokenizer.add_tokens(SCRIPTS)
    model = tiny_model("llama", vocab_size=len(tokenizer), initializer_range=0.1, max_position_embeddings=256)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    auxiliary = new_auxiliary(load_model(str(folder / "model")))
    torch.nn.init.normal_(auxiliary.head.weight, std=0.5)
    auxiliary.save_pretrained(folder / "r")
    constraints = {
        "no script": build_constraint("regex:alert", "no script"),
        "kind": WordList(["grumblefish"], name="kind"),
        "elsewhere": Remote(url=scorer.url, body={"input": "{text}"}, score="score", cache=False, name="elsewhere"),
    }
    session = Session(subject_of(str(folder / "model"), str(folder / "r"), constraints))
    session.load()
    return session


@pytest.fixture(scope="module")
def address(session):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(session, "127.0.0.1"), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def visit(browser, address):
    """Opens the page; nothing may be asked of another host, and nothing may complain or open a dialogue."""

    def _visit(**options):
        page = watch.page(**options)
        page.set_default_timeout(20_000)
        page.goto(address)
        page.get_by_role("button", name="Write").wait_for()
        return page

    with watching(browser) as watch:
        yield _visit
        assert [url for url in watch.requests if not url.startswith((address, "data:", "blob:"))] == []


@pytest.fixture
def slowly(monkeypatch):
    """The tiny model takes the time of a larger one, so that a person can act while it writes."""
    step = Writing.step
    monkeypatch.setattr(Writing, "step", lambda self, controls: (time.sleep(0.02), step(self, controls)))


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def number(page, label):
    return page.get_by_label(f"number input for {label}")


def set_number(page, label, value):
    number(page, label).fill(value)
    number(page, label).press("Tab")


def write(page, prompt="you never", tokens=8):
    page.get_by_label("Prompt").first.fill(prompt)
    number(page, "Tokens").fill(str(tokens))
    number(page, "Tokens").press("Tab")
    button(page, "Write").click()


def judged(page):
    page.locator(".verdict").first.wait_for()
    return page


def uncover(page):
    for cover in page.locator(".lift").all():
        cover.click()


def chances(page, text, place):
    """p, q and R of a token that was drawn."""
    script = "(one) => JSON.parse(one.dataset.chances).drawn[0]"
    _, p, r, q = page.locator(".written").nth(text).locator(".token").nth(place).evaluate(script)
    return {"p": p, "r": r, "q": q}


def test_two_methods_write_side_by_side_and_are_judged(visit):
    page = visit()
    write(page)
    judged(page)
    assert page.locator(".written h3").all_inner_texts() == ["model", "guided guided"]
    assert [text.locator(".token").count() for text in page.locator(".written").all()] == [8, 8]
    assert page.locator(".written .line polyline").count() == 2
    boxes = [text.bounding_box() for text in page.locator(".written").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    assert re.findall(r"(no script|kind): ", page.locator(".verdicts").first.inner_text()) == ["no script", "kind"]


def test_a_violating_text_is_covered_and_its_scripts_never_run(visit):
    page = visit()
    write(page, prompt=SCRIPTS[1], tokens=24)
    judged(page)
    cover = page.locator(".lift").first
    text = page.locator(".veiled").first
    assert cover.inner_text() == "violating text, click to show"
    assert text.evaluate("(one) => one.inert && getComputedStyle(one).filter.includes('blur')")
    cover.click()
    assert cover.get_attribute("aria-expanded") == "true"
    assert not text.evaluate("(one) => one.inert")
    words = text.inner_text()
    assert SCRIPTS[1] in words
    assert "alert(" in words.replace(SCRIPTS[1], "")
    for token in page.locator(".written").first.locator(".token").all():
        token.hover()
    assert page.locator(".bridle :is(img, script)").count() == 0


def test_hover_shows_p_r_and_q_of_what_gains_and_loses(visit):
    page = visit()
    write(page)
    judged(page)
    uncover(page)
    token = page.locator(".written").nth(1).locator(".token").nth(3)
    token.hover()
    card = page.get_by_role("tooltip")
    lines = [line.split("\t") for line in card.inner_text().split("\n") if line.strip()]
    assert [cell.strip() for cell in lines[0]] == ["token", "p", "R", "q"]
    titles = [line[0].strip() for line in lines]
    assert titles.index("lowered by q") - titles.index("raised by q") == 6
    assert len(lines) == titles.index("lowered by q") + 6
    drawn = chances(page, 1, 3)
    assert float(lines[1][2]) == pytest.approx(drawn["r"], abs=6e-4)
    page.locator("h1").hover()
    assert not card.is_visible()


def test_the_sliders_act_on_the_next_tokens(visit, slowly):
    page = visit()
    set_number(page, "Guidance scale η", "0")
    write(page, tokens=100)
    page.locator(".written").nth(1).locator(".token").nth(5).wait_for()
    set_number(page, "Guidance scale η", "9")
    page.wait_for_timeout(500)
    button(page, "Stop").click()
    judged(page)
    assert chances(page, 1, 0)["q"] == pytest.approx(chances(page, 1, 0)["p"], rel=1e-3)
    last = page.locator(".written").nth(1).locator(".token").count() - 1
    assert chances(page, 1, last)["q"] != pytest.approx(chances(page, 1, last)["p"], rel=1e-2)


def test_a_low_temperature_takes_the_likeliest_token(visit):
    page = visit()
    set_number(page, "Temperature", "0.1")
    write(page, tokens=6)
    judged(page)
    text = page.locator(".tokens").first.text_content()
    cold = [chances(page, 0, place)["p"] for place in range(6)]
    set_number(page, "Temperature", "2")
    button(page, "Write").click()
    page.wait_for_function("(cold) => !document.querySelector('.tokens')?.textContent.startsWith(cold)", arg=text)
    judged(page)
    hot = [chances(page, 0, place)["p"] for place in range(6)]
    assert sum(cold) > sum(hot)


def test_what_falls_below_the_bound_on_r_is_begun_anew_and_then_withheld(visit):
    page = visit()
    set_number(page, "Stop and draw anew below R", "0.95")
    write(page, tokens=24)
    page.get_by_text("then withheld").first.wait_for()
    states = page.locator(".written").first.locator(".state").first.inner_text()
    assert states == "0 of at most 24 tokens, stopped and begun anew 4 times, then withheld"
    assert page.locator(".verdict").count() == 0, "what is withheld is not judged"


def test_stop_ends_the_texts_and_has_them_judged(visit, slowly):
    page = visit()
    write(page, tokens=120)
    page.locator(".written").first.locator(".token").nth(3).wait_for()
    button(page, "Stop").click()
    judged(page)
    assert 3 < page.locator(".written").first.locator(".token").count() < 120


def test_another_seed_writes_another_text_and_the_methods_are_chosen(visit):
    page = visit()
    page.get_by_role("checkbox", name="guided").uncheck()
    write(page)
    judged(page)
    assert page.locator(".written").count() == 1
    first = page.locator(".tokens").text_content()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Seed").press("Tab")
    button(page, "Write").click()
    page.wait_for_function("(before) => document.querySelector('.tokens')?.textContent !== before", arg=first)
    page.get_by_role("checkbox", name="model").uncheck()
    button(page, "Write").click()
    page.get_by_role("alert").wait_for()
    assert "choose one to 4" in page.get_by_role("alert").inner_text()


def test_what_begins_last_goes_on(visit, slowly):
    page = visit()
    write(page, prompt="the old kettle", tokens=120)
    page.locator(".token").first.wait_for()
    write(page, prompt="a small brown dog", tokens=4)
    judged(page)
    assert page.locator(".written .prompt").all_text_contents() == ["a small brown dog"] * 2
    page.wait_for_timeout(500)
    assert page.locator(".written").first.locator(".token").count() == 4


def test_texts_can_be_covered_while_they_are_written(visit, slowly):
    page = visit()
    page.get_by_label("Cover texts until they are judged").check()
    write(page, tokens=120)
    page.locator(".written .lift").first.wait_for()
    assert page.locator(".written .veiled[inert]").count() == 2
    button(page, "Stop").click()
    judged(page)


def test_a_remote_constraint_is_asked_only_on_a_click(visit, scorer):
    page = visit()
    asked = len(scorer.requests)
    button(page, "Ask elsewhere").click()
    page.get_by_text("Write texts first").wait_for()
    write(page)
    judged(page)
    assert page.get_by_text("elsewhere: not asked yet").count() == 2
    assert len(scorer.requests) == asked
    button(page, "Ask elsewhere").click()
    page.get_by_text("elsewhere: violates").first.wait_for()
    assert len(scorer.requests) == asked + 2


def test_many_completions_are_dots_with_a_rate(visit):
    page = visit()
    write(page, tokens=1)
    button(page, "Draw 32").click()
    drawn = page.locator(".drawn").first
    drawn.locator(".dot").nth(31).wait_for()
    page.locator(".drawn").nth(1).locator(".dot").nth(31).wait_for()
    violating = drawn.locator(".dot.violates").count()
    assert 0 < violating < 32
    rate = drawn.locator(".rate").inner_text()
    assert rate.startswith(f"{100 * violating / 32:.1f}% of 32 violate no script")
    assert "95% interval" in rate
    dot = drawn.locator(".dot.violates").first
    assert re.fullmatch(r"Completion \d+: violates", dot.get_attribute("aria-label"))
    assert drawn.locator(".opened").inner_text() == ""
    dot.click()
    assert "alert" in drawn.locator(".opened").inner_text()
    dot.click()
    assert drawn.locator(".opened").inner_text() == ""
    page.get_by_label("Judged by").click()
    page.get_by_role("option", name="kind").click()
    button(page, "Draw 32").click()
    page.get_by_text("0.0% of 32 violate kind").first.wait_for()


def test_everything_is_reached_by_keyboard(visit):
    page = visit()
    page.get_by_label("Prompt").first.focus()
    page.keyboard.type("you never")
    page.keyboard.press("Shift+Enter")
    judged(page)
    for cover in page.locator(".lift").all():
        cover.focus()
        page.keyboard.press("Enter")
    tokens = page.locator(".written").first.locator(".token")
    tokens.first.focus()
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", -1), ("Home", 0)):
        page.keyboard.press(key)
        at = tokens.nth(place) if place >= 0 else tokens.last
        assert at.evaluate("(one) => one === document.activeElement && one.tabIndex === 0")
        assert page.get_by_role("tooltip").is_visible()
    assert tokens.first.get_attribute("aria-describedby") == page.get_by_role("tooltip").get_attribute("id")
    page.keyboard.press("Escape")
    assert not page.get_by_role("tooltip").is_visible()


def test_a_token_keeps_the_focus_while_its_text_goes_on(visit, slowly):
    page = visit()
    write(page, tokens=100)
    page.locator(".written").first.locator(".token").nth(2).focus()
    before = page.locator(".written").first.locator(".token").count()
    page.wait_for_function(
        """(before) => {
            const tokens = document.querySelector(".written").querySelectorAll(".token");
            return tokens.length > before && document.activeElement === tokens[2];
        }""",
        arg=before,
    )
    button(page, "Stop").click()
    judged(page)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_no_serious_fault_of_accessibility_and_no_sideways_scrolling(visit, scheme, width):
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 800})
    write(page, tokens=6)
    judged(page)
    uncover(page)
    button(page, "Draw 32").click()
    page.locator(".drawn").nth(1).locator(".dot").nth(31).wait_for()
    page.locator(".drawn").first.locator(".dot").first.click()
    page.locator(".written").first.locator(".token").first.focus()
    found = axe.Axe().run(page).response["violations"]
    faults = [(one["impact"], one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]
    assert [fault for fault in faults if fault[0] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_page_answers_to_this_machine_s_names_only(address):
    answer = httpx2.get(address, trust_env=False)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert httpx2.get(address, headers={"Host": "example.org"}, trust_env=False).status_code == 400


def test_loopback_is_known_by_name_and_address():
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "192.168.1.2", "example.org")] == [False] * 3


def test_the_command_serves_until_a_signal(tiny_folder):
    command = [sys.executable, "-m", "bridle", "demo", str(tiny_folder()), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            told = process.stdout.readline()
            answer = httpx2.get(re.search(r"http://127\.0\.0\.1:\d+/", told)[0], trust_env=False)
        finally:
            process.send_signal(signal.SIGINT)
    assert answer.status_code == 200
    assert process.returncode == 130


def test_a_port_in_use_is_refused_in_words(tiny_folder, address, bridle):
    port = re.search(r":(\d+)/", address)[1]
    code, _, told = bridle("demo", tiny_folder(), "--port", port)
    assert code == 2
    assert f"bridle: --host 127.0.0.1 --port {port}: Address already in use; name another" in told
