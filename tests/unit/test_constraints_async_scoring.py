"""Scoring while more texts are drawn."""

import threading

import pytest

from bridle.constraints import AsyncScoring, Constraint, Not, Score
from bridle.errors import UserError


class Distant(Constraint):
    """Answers when it is allowed to, and says which texts it was asked about."""

    name, waits = "distant", True

    def __init__(self):
        self.asked, self.may_answer = [], threading.Event()

    def _score(self, texts):
        assert self.may_answer.wait(60)
        self.asked += texts
        return [float("e" not in text) for text in texts]


def ask(scoring, texts):
    scoring.submit([None] * len(texts), texts)


def test_asking_does_not_wait_and_each_text_is_asked_once():
    constraint = Distant()
    with AsyncScoring(constraint) as scoring:
        ask(scoring, ["tea", "mint", "tea"])
        ask(scoring, ["mint", "sage"])
        assert constraint.asked == []
        constraint.may_answer.set()
        assert scoring.scores() == {"tea": Score(0.0, False), "mint": Score(1.0, True), "sage": Score(0.0, False)}
    assert constraint.asked == ["tea", "mint", "sage"]


def test_a_constraint_that_computes_on_this_host_is_not_called():
    constraint = Distant()
    constraint.waits = False
    with AsyncScoring(constraint) as scoring:
        ask(scoring, ["tea"])
        assert scoring.scores() == {}
    assert constraint.asked == []


def test_a_combination_waits_if_a_part_does():
    assert Not(Distant()).waits
    assert (Distant() & Distant()).waits


def test_a_mistake_is_raised_at_the_end_and_nothing_is_asked_after_it():
    constraint, calls = Distant(), []

    def score(prompts, texts):
        calls.append(list(texts))
        raise UserError("the key is refused")

    constraint.score = score
    with AsyncScoring(constraint) as scoring:
        ask(scoring, ["tea"])
        with pytest.raises(UserError, match="the key is refused"):
            scoring.scores()
        ask(scoring, ["mint"])
    assert calls == [["tea"]]


def test_leaving_drops_what_was_not_asked():
    constraint = Distant()
    timer = threading.Timer(0.2, constraint.may_answer.set)
    with AsyncScoring(constraint) as scoring:
        ask(scoring, ["tea"])
        ask(scoring, ["mint"])
        timer.start()
    assert constraint.asked == ["tea"]
