from math import nan

import numpy as np
import pytest
import torch

from bridle.constraints import AllOf, AnyOf, Constraint, Not, Score
from bridle.errors import UserError


class Fixed(Constraint):
    """Returns fixed scores for any texts."""

    def __init__(self, raw, name="fixed"):
        self.raw, self.name, self.loaded = raw, name, False

    def load(self):
        self.loaded = True

    def _score(self, texts):
        return self.raw


def test_numbers_and_verdicts_become_scores_of_the_same_order():
    scores = Fixed([0.7, True, 0, None, Score(0.9, False)]).score(None, list("abcde"))
    assert [s.value for s in scores] == [0.7, 1.0, 0.0, None, 0.9]
    assert [s.complies for s in scores] == [True, True, False, None, False]
    assert "fixed" in scores[3].reason


@pytest.mark.parametrize(
    "raw", [torch.tensor([0.25, 1.0]), np.array([0.25, 1.0]), [np.float32(0.25), np.bool_(True)], (0.25, 1)]
)
def test_arrays_and_tensors_are_taken(raw):
    scores = Fixed(raw).score(None, ["a", "b"])
    assert [s.value for s in scores] == [0.25, 1.0]
    assert all(type(s.value) is float and type(s.complies) is bool for s in scores)


@pytest.mark.parametrize("bad", [nan, -0.01, 1.01, float("inf"), "0.5", [0.5], Score(nan, True), Score(2, True)])
def test_a_score_out_of_range_names_the_constraint_and_the_index(bad):
    with pytest.raises(UserError, match=r"'fixed', text 1: ") as error:
        Fixed([0.5, bad, 0.5]).score(None, ["a", "b", "c"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [[], [0.5], [0.5] * 3, None, 0.5, "ab", {0: 0.5, 1: 0.5}])
def test_a_wrong_number_of_scores_names_the_constraint(raw):
    with pytest.raises(UserError, match=r"'fixed'.*2, one for each text"):
        Fixed(raw).score(None, ["a", "b"])


def test_no_texts_give_no_scores():
    assert Fixed(None).score(None, []) == []


def test_a_single_text_is_not_taken_for_its_letters():
    with pytest.raises(TypeError, match="list of texts"):
        Fixed([1, 1]).score(None, "ab")


def test_a_score_has_a_value_and_a_verdict_or_neither():
    with pytest.raises(ValueError, match="both"):
        Score(0.5, None)
    with pytest.raises(ValueError, match="both"):
        Score(None, True)


def test_violation_is_what_is_left_of_the_value():
    assert Score.of(0.25).violation == 0.75
    assert Score.missing("no reply").violation is None
    assert Score.missing("no reply").is_missing
    assert not Score.of(0.0).is_missing
    assert Score.of(0.3, threshold=0.3).complies


def test_and_or_not_join_values_and_verdicts():
    a, b = Fixed([0.9, 0.9, 0.2, 0.2], "a"), Fixed([0.7, 0.1, 0.8, 0.4], "b")
    texts = list("wxyz")
    assert [s.value for s in (a & b).score(None, texts)] == [0.7, 0.1, 0.2, 0.2]
    assert [s.complies for s in (a & b).score(None, texts)] == [True, False, False, False]
    assert [s.value for s in (a | b).score(None, texts)] == [0.9, 0.9, 0.8, 0.4]
    assert [s.complies for s in (a | b).score(None, texts)] == [True, True, True, False]
    assert [s.value for s in (~b).score(None, texts)] == pytest.approx([0.3, 0.9, 0.2, 0.6])
    assert [s.complies for s in (~b).score(None, texts)] == [False, True, False, True]
    assert (a & ~b | a).name == "((a & ~b) | a)"


def test_verdicts_are_joined_as_such_and_not_read_off_the_value():
    strict = Fixed([Score(0.8, False)], "strict")
    lax = Fixed([Score(0.6, True)], "lax")
    assert (strict & lax).score(None, ["x"]) == [Score(0.6, False)]
    assert (strict | lax).score(None, ["x"]) == [Score(0.8, True)]
    assert (~strict).score(None, ["x"])[0].complies is True


@pytest.mark.parametrize("join", [lambda a, b: a & b, lambda a, b: b | a, lambda a, b: ~a])
def test_what_a_part_cannot_score_is_missing_with_its_reason(join):
    missing, sure = Fixed([Score.missing("no reply")], "a"), Fixed([1.0], "b")
    assert join(missing, sure).score(None, ["x"]) == [Score.missing("no reply")]


def test_a_mistake_of_a_part_names_the_part():
    with pytest.raises(UserError, match="'inner', text 0"):
        (Fixed([2.0], "inner") & Fixed([1.0], "other")).score(None, ["x"])


def test_loading_a_combination_loads_its_parts():
    parts = [Fixed([1.0]) for _ in range(3)]
    (parts[0] & (parts[1] | ~parts[2])).load()
    assert all(part.loaded for part in parts)


def test_a_combination_needs_constraints():
    with pytest.raises(UserError, match="'all', key 'parts'"):
        AllOf([])
    with pytest.raises(UserError, match="'any', key 'parts'"):
        AnyOf(["not a constraint"])
    with pytest.raises(UserError, match="'not', key 'part'"):
        Not(None)
    with pytest.raises(TypeError):
        Fixed([1.0]) & True


def test_a_constraint_of_ones_own_describes_its_type_and_name():
    assert Fixed([1.0], "mine").describe() == {"type": "constraint", "name": "mine"}
