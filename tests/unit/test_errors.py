"""Text of models and files on a terminal: what a terminal would obey is shown instead."""

import logging
import sys

import pytest

from bridle.cli.common import PlainFormatter
from bridle.errors import plain
from bridle.utils.progress import Progress

TITLE, CLIPBOARD = "\x1b]0;owned\x07", "\x1b]52;c;aGk=\x1b\\"
CLEAR, C1, OVERRIDE = "\x1b[2J\x1b[31m", "\x9b2J\x9d0;owned\x9c", "\u202egnihtyna\u202c \u2066\u2069"
COMMANDS = [TITLE, CLIPBOARD, CLEAR, C1, OVERRIDE, "a\rb", "\b\x7f\x00", "\u2028\u200b\ufeff", "\ud800"]


@pytest.mark.parametrize("text", COMMANDS)
def test_what_a_terminal_obeys_is_escaped(text):
    shown = plain(f"the kettle{text} sings")
    assert shown.startswith("the kettle")
    assert shown.endswith(" sings")
    assert shown.isprintable()
    assert plain(shown) == shown


@pytest.mark.parametrize(
    "text", ["a\tb\nc", "très\u00a0bien", "你好\u3000世界", "می\u200cخواهم", "👩\u200d🔧 👍🏽", "\\x1b", "שלום"]
)
def test_all_else_stays(text):
    assert plain(text) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("bridle.utils.progress.PLAIN_LINE_EVERY", 0.0)
    with Progress(f"scoring ({TITLE})", 2) as progress:
        progress.write(f"a line {CLIPBOARD}")
        progress.update()
    shown = capsys.readouterr().err
    assert "scoring (\\x1b]0;owned\\x07)" in shown
    assert "a line \\x1b]52" in shown
    assert "\x1b]" not in shown


def test_warnings():
    record = logging.LogRecord("bridle", logging.WARNING, "file", 1, "row %s", (CLEAR,), None)
    assert PlainFormatter("%(levelname)s: %(message)s").format(record) == "WARNING: row \\x1b[2J\\x1b[31m"
