"""Which method the report recommends: the rule that its sentence states."""

from dataclasses import replace

import pytest

from bridle.evaluation.statistics import Estimate
from bridle.report.data import (
    Curve,
    Figure,
    FigureComparison,
    Figures,
    Main,
    Method,
    Reached,
    RegulariserRound,
    Report,
    Round,
    SeedRun,
)
from bridle.report.reading import read_report
from bridle.report.recommendation import recommendation
from report_folder import make_folder


def figure(value, half_width):
    return Figure(value, value - half_width, value + half_width, n=100)


def compared(points, task=False, half_width=0.5, p_value=0.001):
    """A report of methods at (violation, utility), the first of which violates least."""
    methods = {}
    for name, (violation, utility) in points.items():
        measured = (
            {"tasks": {"mmlu": figure(utility, 0.001)}}
            if task
            else {"perplexity": {"novels": figure(utility, half_width)}}
        )
        methods[name] = Method(figures=Figures(violation={"rude": {"kind": figure(violation, 0.01)}}, **measured))
    best, *others = points
    tests = [
        FigureComparison(
            method=name, reference=best, difference=Estimate(0.1, 0.05, 0.15, n=9), p_value=p_value,
            adjusted_p_value=p_value, test="permutation", figure="violation", on="rude", constraint="kind",
        )
        for name in others
    ]  # fmt: skip
    return Report("grumble", main=Main("rude", "kind", "novels"), methods=methods, comparisons=tests)


def chosen(report):
    return recommendation(report).removeprefix("Take ").partition(":")[0]


def test_the_sentence_has_rate_rule_and_cost(tmp_path):
    report = read_report(make_folder(tmp_path / "comparison"))
    assert recommendation(report) == (
        "Take constrained-adaptive: 5.8% of its completions of rude violate non-rude (95% interval 3.3 to 8.3%), the "
        "lowest rate of the methods that are not shown to raise perplexity on novels by more than 5% against sft. The "
        "cost: perplexity on novels is 73.4 (−0.7%) and training takes 440 s, against 73.9 for sft and 310 s."
    )


@pytest.mark.parametrize(
    ("name", "said"), [("dpo@0.1", "40 s besides that of sft, against"), ("wise-ft@0.5", "40 s, against")]
)
def test_the_time_of_the_plain_tuning_that_a_method_needs_is_not_left_out(name, said):
    report = compared({name: (0.01, 74.0), "sft": (0.2, 73.0)})
    methods = {
        one: replace(method, figures=replace(method.figures, cost={"seconds": Figure(seconds, None, None, n=1)}))
        for (one, method), seconds in zip(report.methods.items(), (40.0, 30.0), strict=True)
    }
    assert f"training takes {said}" in recommendation(replace(report, methods=methods))


@pytest.mark.parametrize(("perplexity", "name"), [(74.0, "harsh"), (77.0, "harsh"), (90.0, "mild")])
def test_a_method_that_is_shown_to_lose_more_is_not_taken(perplexity, name):
    points = {"harsh": (0.01, perplexity), "mild": (0.05, 74.0), "sft": (0.2, 73.0), "base": (0.1, 70.0)}
    assert chosen(compared(points)) == name


def test_a_loss_that_the_interval_does_not_show_is_none():
    points = {"harsh": (0.01, 90.0), "mild": (0.05, 74.0), "sft": (0.2, 73.0)}
    assert chosen(compared(points, half_width=10.0)) == "harsh"


def test_a_paired_difference_counts_before_the_intervals_of_the_figures():
    points = {"harsh": (0.01, 90.0), "mild": (0.05, 74.0), "sft": (0.2, 73.0)}
    wide = compared(points, half_width=10.0)
    paired = [
        replace(
            wide.comparisons[0], figure="perplexity", on="novels", constraint=None, method=name, reference="sft",
            difference=Estimate(nats, nats - 0.01, nats + 0.01, n=9),
        )
        for name, nats in (("harsh", 0.21), ("mild", 0.014))
    ]  # fmt: skip
    assert chosen(replace(wide, comparisons=[*wide.comparisons, *paired])) == "mild"


@pytest.mark.parametrize(("accuracy", "name"), [(0.265, "harsh"), (0.22, "mild")])
def test_without_a_perplexity_accuracy_counts(accuracy, name):
    report = compared({"harsh": (0.01, accuracy), "mild": (0.05, 0.27), "sft": (0.2, 0.27)}, task=True)
    assert chosen(report) == name
    assert "not shown to lower accuracy on MMLU by more than 2 points" in recommendation(report)


def with_targets(report, **reached):
    curves = [
        Curve(name, "0", [Round(1, 4, regularisers={"rude": RegulariserRound()})], targets={"rude": one})
        for name, rate in reached.items()
        for one in [Reached(rate, rate - 0.01, rate + 0.01, target=0.1)]
    ]
    return replace(report, curves=curves)


def test_of_the_methods_that_reached_their_target_the_cheapest_is_taken():
    report = compared({"harsh": (0.01, 75.0), "mild": (0.05, 74.0), "sft": (0.2, 73.0)})
    assert chosen(with_targets(report, harsh=0.02, mild=0.09)) == "mild"
    assert "of the methods that reached their target, it loses least" in recommendation(with_targets(report, mild=0.09))
    assert chosen(with_targets(report, harsh=0.02, mild=0.12)) == "harsh"
    assert chosen(with_targets(report, mild=0.12)) == "harsh", "none reached it: the lowest rate"


def test_a_method_of_which_a_seed_failed_has_not_reached_its_target_with_every_seed():
    report = with_targets(compared({"harsh": (0.01, 75.0), "mild": (0.05, 74.0), "sft": (0.2, 73.0)}), mild=0.09)
    seeds = {"0": SeedRun("complete", ""), "1": SeedRun("failed", "")}
    methods = report.methods | {"mild": replace(report.methods["mild"], seeds=seeds)}
    assert "reached their target" not in recommendation(replace(report, methods=methods))


def test_a_method_of_which_a_seed_failed_is_not_taken():
    report = compared({"harsh": (0.01, 73.0), "mild": (0.05, 73.0), "sft": (0.2, 73.0)})
    assert chosen(report) == "harsh"
    seeds = {"0": SeedRun("complete", ""), "1": SeedRun("failed", "")}
    methods = report.methods | {"harsh": replace(report.methods["harsh"], seeds=seeds)}
    assert chosen(replace(report, methods=methods)) == "mild"


def test_a_target_that_was_not_measured_is_not_reached():
    """Of two domains with a target, one got no score at the end."""
    report = with_targets(compared({"harsh": (0.01, 75.0), "mild": (0.05, 74.0), "sft": (0.2, 73.0)}), mild=0.09)
    (curve,) = report.curves
    rounds = [Round(1, 4, regularisers={"rude": RegulariserRound(target=0.1), "other": RegulariserRound(target=0.1)})]
    assert "reached their target" not in recommendation(replace(report, curves=[replace(curve, rounds=rounds)]))


def test_plain_tuning_may_be_the_one():
    assert recommendation(compared({"sft": (0.01, 73.0), "harsh": (0.05, 74.0)})).endswith("were compared.")


def test_where_no_difference_is_shown_none_is_taken():
    points = {"harsh": (0.01, 74.0), "sft": (0.2, 73.0)}
    assert recommendation(compared(points, p_value=0.4)) is None
    assert recommendation(Report("nothing")) is None
    assert recommendation(compared({"harsh": (0.01, 74.0)})) is None
