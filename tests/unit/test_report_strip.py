"""What the report says of a run's rounds, one beside the other."""

import pytest

from bridle.report.data import Curve, RegulariserRound, Report, Round
from bridle.report.strip import strips


def rounds(*measured, method="constrained", **report):
    found = [
        Round(n, 10 * n, regularisers={"rude": RegulariserRound(**one)}) for n, one in enumerate(measured, start=1)
    ]
    return Report("grumble", curves=[Curve(method, "0", found)], **report)


def measured(violation, half_width=0.02, **more):
    compliance = 1 - violation
    bounds = {"compliance_low": compliance - half_width, "compliance_high": compliance + half_width}
    return {"compliance": compliance, **bounds, "rollouts": 600, "rollouts_missing": 2} | more


@pytest.mark.parametrize(
    ("violation", "change", "outcome"),
    [(0.05, "−7.0 points", "fewer"), (0.2, "+8.0 points", "more"), (0.1, "−2.0 points", "alike")],
)
def test_a_change_is_named_where_the_intervals_do_not_overlap(violation, change, outcome):
    first, second = strips(rounds(measured(0.12), measured(violation)))["regulariser rude"]
    assert (first.change, first.outcome) == ("", "alike")
    assert (second.change, second.outcome) == (change, outcome)
    assert (first.rate, first.interval, first.counts) == ("12.0%", "10.0 to 14.0", "n = 598")


def test_what_moved_is_noted():
    first, second = strips(
        rounds(measured(0.1, weight=8.0, r_skill=0.12), measured(0.1, weight=11.0, r_skill=-0.031, kl=0.0016))
    )["regulariser rude"]
    assert first.notes == ["λ 8", "R’s skill 0.12"]
    assert second.notes == ["λ 8 → 11", "R’s skill −0.03", "KL 0.0016"]
    (_, kept) = strips(rounds(measured(0.1), measured(0.0, fit="kept")))["regulariser rude"]
    assert kept.notes == ["R learnt nothing but the rate"]
    (_, unlabelled) = strips(rounds(measured(0.1), measured(0.0, fit="unlabelled")))["regulariser rude"]
    assert unlabelled.notes == ["no label to learn"]


def test_rounds_without_a_rate_are_left_out():
    assert strips(rounds(measured(0.1), {"rollouts": 600})) == {}
    assert [step.number for step in strips(rounds(measured(0.1), {}, measured(0.2)))["regulariser rude"]] == [1, 3]
