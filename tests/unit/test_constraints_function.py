import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from bridle.constraints import PythonFunction, deadline
from bridle.errors import UserError

MODULE = """
limit = 20

class Judge:
    @staticmethod
    def short(texts):
        return [len(text) < limit for text in texts]

def soft(texts):
    return [None if not text else 1 / len(text) for text in texts]

def broken(texts):
    raise KeyError("first line\\nsecond line")

def leaves(texts):
    raise SystemExit(3)

def wanders(texts):
    import os
    os.chdir("/")
    count = len(texts)
    texts.clear()
    return [1.0] * count

def one_score(texts):
    texts.clear()
    return [1.0]
"""


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    """A module of the user's own in the current directory, named afresh for each test."""
    name = f"scorers_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield name
    sys.modules.pop(name, None)


def test_a_function_from_the_current_directory_scores(scorers):
    scores = PythonFunction(f"{scorers}:soft").score(None, ["ab", "", "abcd"])
    assert [s.value for s in scores] == [0.5, None, 0.25]
    assert [s.complies for s in scores] == [True, None, False]
    assert "soft" in scores[1].reason


def test_a_function_may_sit_inside_a_class(scorers):
    assert [s.complies for s in PythonFunction(f"{scorers}:Judge.short").score(None, ["a", "a" * 30])] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_module_here:score", "ModuleNotFoundError"),
        ("{scorers}:missing", "AttributeError"),
        ("{scorers}:limit", "is a int, not a function"),
        ("{scorers}:", "not a function"),
        ("{scorers}.soft", "not of the form module:function"),
        ("some file:score", "ValueError"),
    ],
)
def test_what_cannot_be_imported_is_reported_in_one_line(scorers, function, message):
    function = function.format(scorers=scorers)
    constraint = PythonFunction(function)
    with pytest.raises(UserError, match=message) as error:
        constraint.load()
    assert function in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["raise RuntimeError('boom')", "import sys; sys.exit(0)", "def (:"])
def test_a_module_that_fails_when_imported_is_reported(tmp_path, monkeypatch, line):
    name = f"failing_{abs(hash((tmp_path, line)))}"
    (tmp_path / f"{name}.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"cannot import {name}:score: "):
        PythonFunction(f"{name}:score").score(None, ["a"])


def test_an_exception_in_the_call_names_the_function_and_the_cause(scorers):
    with pytest.raises(UserError, match=f"{scorers}:broken failed on 2 texts: KeyError: ") as error:
        PythonFunction(f"{scorers}:broken").score(None, ["a", "b"])
    assert "\n" not in str(error.value)


def test_a_function_that_raises_or_exits_is_reported_with_its_line(scorers, tmp_path):
    for name, raised in (("broken", "KeyError: 'first line"), ("leaves", "SystemExit: 3")):
        with pytest.raises(UserError) as caught:
            PythonFunction(f"{scorers}:{name}").score(None, ["a"])
        line = next(n for n, text in enumerate(MODULE.splitlines(), 1) if "raise" in text and raised[:8] in text)
        assert raised in str(caught.value)
        assert f"({tmp_path / scorers}.py, line {line})" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_function_may_empty_its_list_and_leave_the_directory(scorers, tmp_path):
    assert [s.value for s in PythonFunction(f"{scorers}:wanders").score(None, ["a", "b"])] == [1.0, 1.0]
    assert Path.cwd() == tmp_path


def test_a_function_itself():
    lengths = PythonFunction(lambda texts: [len(text) < 2 for text in texts])
    assert [s.complies for s in lengths.score(None, ["a", "bcd"])] == [True, False]
    assert lengths.name == "python:test_constraints_function:test_a_function_itself.<locals>.<lambda>"
    with pytest.raises(UserError, match=r"ZeroDivisionError: .* \(.*test_constraints_function.py, line \d+\)$"):
        PythonFunction(lambda texts: [1 / 0 for _ in texts]).score(None, ["a"])


def test_a_wrong_number_of_scores_names_the_constraint(scorers):
    texts = ["a", "b"]
    with pytest.raises(UserError, match="'mine': gave 1 scores"):
        PythonFunction(f"{scorers}:one_score", name="mine").score(None, texts)
    assert texts == ["a", "b"]


def test_a_function_that_hangs_is_given_up_and_its_texts_are_missing():
    def hangs(texts):
        if "hang" in texts:
            threading.Event().wait()
        return [1.0] * len(texts)

    scores = PythonFunction(hangs, batch_size=2, timeout=0.2).score(None, ["a", "b", "hang", "c", "d"])
    assert [score.value for score in scores] == [1.0, 1.0, None, None, 1.0]
    assert scores[2].reason == "timed out: 0.2 s are over for its batch"


def test_a_time_out_of_the_function_s_own_is_its_failure():
    def late(texts):
        raise TimeoutError("of a socket")

    with pytest.raises(UserError, match="TimeoutError: of a socket"):
        PythonFunction(late).score(None, ["a"])


def test_work_that_ends_as_the_time_does_is_not_lost(monkeypatch):
    class Late(Future):
        def result(self, timeout=None):
            found = super().result()
            if timeout is not None:
                raise TimeoutError
            return found

    monkeypatch.setattr(deadline, "Future", Late)
    assert deadline.within(1, lambda: 3) == 3
