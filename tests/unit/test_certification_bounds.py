"""The bounds of certificates: known numbers, and how often they are wrong in worlds whose rates are known."""

from math import log, sqrt

import numpy as np
import pytest
from scipy import stats

from bridle.certification.bounds import (
    betting_bound,
    fixed_sequence,
    log_wealth,
    lower_bound,
    prompts_needed,
    prompts_needed_by_betting,
    true_rate_bound,
    upper_bound,
)
from bridle.certification.certificate import Ranked, completions_file
from bridle.certification.certify import safest_first
from bridle.certification.goal import Goal
from bridle.errors import UserError
from bridle.utils.percent import percent, percent_of, percent_up
from certified_worlds import (
    JUST_ABOVE,
    Mixture,
    Outcome,
    first_passes,
    issued_by_count,
    wrong_in_sequence,
    wrong_true_bounds,
)

ALPHA, RUNS = 0.05, 4_000
MOST = ALPHA + 3 * sqrt(ALPHA * (1 - ALPHA) / RUNS)  # α and three standard errors of the simulation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class TestCounting:
    def test_so_many_prompts_are_needed(self):
        assert [prompts_needed(0.01, 0.95, k) for k in (0, 1, 2, 3, 5, 10)] == [299, 473, 628, 773, 1049, 1693]

    @pytest.mark.parametrize("violations", [0, 1, 5])
    def test_the_bound_is_at_the_rate_just_then(self, violations):
        n = prompts_needed(0.01, 0.95, violations)
        assert upper_bound(violations, n, 0.95) <= 0.01 < upper_bound(violations, n - 1, 0.95)

    def test_it_is_scipy_s(self):
        for k, n in ((0, 7), (3, 40), (40, 40)):
            test = stats.binomtest(k, n, alternative="less")
            assert upper_bound(k, n, 0.9) == pytest.approx(test.proportion_ci(0.9, method="exact").high)
            test = stats.binomtest(k, n, alternative="greater")
            assert lower_bound(k, n, 0.9) == pytest.approx(test.proportion_ci(0.9, method="exact").low)


class TestBetting:
    def test_the_wealth_is_the_mean_of_the_bettors(self):
        values, rate = [0.0, 0.0, 1.5, 0.0], 0.25
        wealth = np.mean(
            [np.cumprod([1 - f / (2 - rate) * (x - rate) for x in values]) for f in (0.25, 0.5, 0.75, 0.9, 0.99)],
            axis=0,
        )
        assert np.exp(log_wealth(values, rate, largest=2.0)) == pytest.approx(wealth)

    def test_the_bound_is_where_the_wealth_rules_out(self, rng):
        values = (rng.random(800) < 0.004) * 1.0
        bound = betting_bound(values, 0.95)
        assert log_wealth(values, bound + 1e-9).max() >= log(20) > log_wealth(values, bound - 1e-9).max()

    def test_it_never_rises_with_more_observations(self, rng):
        values = (rng.random(400) < 0.02) * 1.0
        bounds = [betting_bound(values[:n], 0.95) for n in range(0, 401, 20)]
        assert bounds[0] == 1.0
        assert bounds == sorted(bounds, reverse=True)

    @pytest.mark.parametrize(("violations", "largest"), [(0, 1.0), (2, 1.0), (0, 2.0)])
    def test_so_many_prompts_are_needed(self, violations, largest):
        n = prompts_needed_by_betting(0.01, 0.95, violations, largest)
        values = [largest] * violations + [0.0] * (n - violations)
        assert betting_bound(values, 0.95, largest) <= 0.01 < betting_bound(values[:-1], 0.95, largest)


class TestCoverage:
    """At a rate just above the target, at most 5% of the certificates are issued."""

    def test_one_model(self, rng):
        goal = Goal()
        for n in (299, 773, 1693):
            issued = issued_by_count(goal, np.full(RUNS, goal.rate * JUST_ABOVE), n, rng)
            assert 0.02 < issued.mean() <= MOST

    @pytest.mark.parametrize("good", [0, 1, 10])
    def test_twenty_candidates(self, good, rng):
        goal = Goal()
        rates = [goal.rate * 0.2] * good + [goal.rate * JUST_ABOVE] * (20 - good)
        assert wrong_in_sequence(goal, rates, 773, RUNS // 2, rng) <= ALPHA + 3 * sqrt(ALPHA / (RUNS // 2))

    def test_anytime_however_often_one_looks(self, rng):
        goal = Goal(anytime=True)
        passed = first_passes(goal, Mixture(goal.rate * JUST_ABOVE, seek=0), 1_000, RUNS, rng) <= 1_000
        assert 0.005 < passed.mean() <= MOST

    def test_counting_while_one_looks_would_be_wrong(self, rng):
        violations = (rng.random((RUNS, 2_000)) < 0.01).cumsum(axis=-1)
        most = np.array([stats.binom.ppf(ALPHA, n, 0.01) - 1 for n in range(1, 2_001)])
        assert (violations <= most).any(axis=-1).mean() > 2 * ALPHA

    @pytest.mark.parametrize("world", [Mixture(0.01 * JUST_ABOVE), Mixture(0.01 * JUST_ABOVE, 0.5, 0.9, 0.5)])
    def test_importance(self, world, rng):
        goal = Goal(method="importance", seek=world.seek)
        values = world.values((200, 10_000), rng)
        assert values.max() <= goal.largest
        assert values.mean() == pytest.approx(world.rate, rel=0.02)
        assert (first_passes(goal, world, 1_000, RUNS, rng) <= 1_000).mean() <= MOST

    def test_importance_saves_prompts_near_the_target(self, rng):
        rate, n = 0.001, 30_000
        count = first_passes(Goal(rate, anytime=True), Mixture(rate / 2, seek=0), n, 40, rng)
        weighed = first_passes(Goal(rate, method="importance"), Mixture(rate / 2), n, 40, rng)
        assert weighed.mean() < 0.6 * count.mean()

    @pytest.mark.parametrize("candidates", [1, 20])
    def test_the_true_rate(self, candidates, rng):
        assert wrong_true_bounds(Goal(), 2_000, rng, candidates=candidates) <= ALPHA


class TestTrueRate:
    def test_an_oracle_that_never_errs_changes_nothing(self):
        assert true_rate_bound(0.01, sensitivity=1.0, false_alarms=0.0) == 0.01

    def test_an_oracle_that_misses_half_doubles_it(self):
        assert true_rate_bound(0.01, sensitivity=0.5, false_alarms=0.0) == 0.02

    def test_false_alarms_are_subtracted_unless_they_exceed_all_alarms(self):
        assert true_rate_bound(0.03, 0.9, 0.01) == pytest.approx(0.02 / 0.89)
        assert true_rate_bound(0.005, 0.9, 0.01) == pytest.approx(0.005 / 0.9)

    def test_an_oracle_that_tells_nothing_apart_bounds_nothing(self):
        assert true_rate_bound(0.01, sensitivity=0.0, false_alarms=0.0) == 1.0
        assert true_rate_bound(0.5, sensitivity=0.3, false_alarms=0.3) == 1.0


class TestSequence:
    def test_it_ends_at_the_first_that_fails(self):
        outcomes = [Outcome(0, True), Outcome(1, True), Outcome(2, False), Outcome(3, True)]
        assert fixed_sequence(iter(outcomes)) == outcomes[:3]
        assert fixed_sequence([]) == []

    def test_the_safest_comes_first_and_who_writes_no_better_is_left_out(self):
        safe, worse, good, better = (
            Ranked("safe", 0.0, 0.1, 1.5), Ranked("worse", 0.1, 0.1, 1.6), Ranked("good", 0.1, 0.2, 1.2),
            Ranked("better", 0.2, 0.2, 1.0),
        )  # fmt: skip
        assert safest_first([better, worse, good, safe]) == [safe, good, better]
        assert safest_first([Ranked("b", 0.1, 0.3), Ranked("a", 0.1, 0.2)]) == [
            Ranked("a", 0.1, 0.2),
            Ranked("b", 0.1, 0.3),
        ]


class TestGoal:
    @pytest.mark.parametrize(
        ("field", "limits"), [("rate", "1e-12 and 1"), ("confidence", "0 and 1"), ("seek", "0 and 0.999")]
    )
    @pytest.mark.parametrize("value", [0, 1, -1, float("nan")])
    def test_numbers_out_of_range_are_refused(self, field, limits, value):
        with pytest.raises(UserError, match=f"^{field}: must lie between {limits}, not"):
            Goal(**{field: value})

    @pytest.mark.parametrize("options", [{"rate": 1e-20}, {"rate": 1e-20, "anytime": True}, {"seek": 1 - 1e-16}])
    def test_what_no_number_of_prompts_shows_is_refused(self, options):
        with pytest.raises(UserError, match="must lie between"):
            Goal(**options)

    @pytest.mark.parametrize("options", [{}, {"anytime": True}, {"method": "importance", "seek": 0.9989}])
    def test_the_least_rate_has_a_plan(self, options):
        assert "none violates" in Goal(1.001e-12, 1 - 1e-15, **options).plan()

    def test_the_plan_says_how_many_prompts_are_needed(self):
        assert Goal().plan() == (
            "to show at most 1% with 95% confidence takes 299 prompts if none violates, 473 with 1 violation, "
            "628 with 2 violations, 773 with 3 violations, 1,049 with 5 violations, 1,693 with 10 violations"
        )

    def test_what_cannot_be_reached_any_more(self):
        goal = Goal(anytime=True)
        assert goal.can_be_reached([1.0], 1_000)
        assert not goal.can_be_reached([1.0], 500)


@pytest.mark.parametrize(
    ("bound", "said"), [(0.0123449, "1.235%"), (0.05, "5%"), (0.1, "10%"), (0.0, "0%"), (1.0, "100%"), (2e-5, "0.002%")]
)
def test_a_bound_is_rounded_up(bound, said):
    assert percent_up(bound) == said


@pytest.mark.parametrize(("rate", "said"), [(0.0, "0.0%"), (0.0312, "3.1%"), (0.0004, "0.04%"), (1.0, "100.0%")])
def test_a_small_rate_keeps_its_digits(rate, said):
    assert percent_of(rate) == said


def test_a_confidence_is_not_rounded_to_certainty():
    assert [percent(share) for share in (0.99999, 0.95, 0.07)] == ["99.999%", "95%", "7%"]


def test_each_certificate_has_completions_of_its_own(tmp_path):
    names = ["cert.json", "cert-0.01", "cert-0.05", "cert-0.05.txt"]
    assert [completions_file(tmp_path / name).name for name in names] == [
        "cert.completions.jsonl",
        "cert-0.01.completions.jsonl",
        "cert-0.05.completions.jsonl",
        "cert-0.05.txt.completions.jsonl",
    ]
