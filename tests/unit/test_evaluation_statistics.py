import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridle.evaluation import Estimate, bootstrap_interval, estimate_mean, estimate_rate, wilson_interval

Z = 1.959963984540054  # the normal distribution's 97.5% point


def test_wilson_matches_its_formula():
    # Centre (p + z²/2n) / (1 + z²/n), half-width z·sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n), at p = 10/50.
    centre = (0.2 + Z**2 / 100) / (1 + Z**2 / 50)
    half = Z * math.sqrt(0.2 * 0.8 / 50 + Z**2 / 10_000) / (1 + Z**2 / 50)
    assert wilson_interval(10, 50) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_wilson_keeps_its_width_where_nothing_violates():
    assert wilson_interval(0, 10) == pytest.approx((0.0, Z**2 / (10 + Z**2)), abs=1e-9)
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + Z**2), 1.0), abs=1e-9)


def test_nothing_observed_has_no_interval():
    assert wilson_interval(0, 0) is None
    assert bootstrap_interval([], seed=0) is None
    assert bootstrap_interval([0.3], seed=0) is None


@given(n=st.integers(1, 300), data=st.data())
def test_wilson_holds_the_rate_and_widens_with_confidence(n, data):
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n)
    wide_low, wide_high = wilson_interval(successes, n, confidence=0.99)
    assert 0 <= wide_low <= low <= successes / n <= high <= wide_high <= 1


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, seed=1)
    half = Z * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_takes_another_statistic_and_does_not_need_an_axis():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    low, high = bootstrap_interval(values, lambda sample: float(np.median(sample)), seed=0, resamples=200)
    assert {low, high} <= set(values)
    assert high > low


def test_bootstrap_repeats_with_its_seed_only():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_bootstrap_of_equal_values_claims_no_certainty():
    assert bootstrap_interval([0.25] * 8, seed=0) is None
    assert estimate_mean([[0.0]] * 8) == Estimate(0.0, None, None, n=8)


def test_copies_of_a_sample_within_a_prompt_are_no_new_evidence():
    values = list(np.random.default_rng(0).random(60))
    once = estimate_mean([[value] for value in values])
    five_times = estimate_mean([[value] * 5 for value in values])
    assert (five_times.low, five_times.high) == pytest.approx((once.low, once.high))
    assert (once.n, five_times.n) == (60, 300)
    independent = estimate_mean([[value] for value in values for _ in range(5)])
    assert independent.high - independent.low < 0.6 * (once.high - once.low)


def test_a_mean_weighs_observations_and_skips_empty_clusters():
    found = estimate_mean([[1.0], [], [0.0, 0.0, 0.0]], missing=2)
    assert (found.value, found.n, found.missing) == (0.25, 4, 2)
    assert found.low == 0.0
    assert found.high == 1.0  # the resample that draws the first cluster twice


def test_a_rate_of_single_samples_has_wilsons_interval():
    flags = [[True]] * 10 + [[False]] * 40
    assert estimate_rate(flags, missing=3) == Estimate(0.2, *wilson_interval(10, 50), n=50, missing=3)


def test_a_rate_of_clusters_has_the_clusters_interval():
    # All samples of a prompt agree, so the 200 samples are worth 50.
    flags = [[True] * 4] * 10 + [[False] * 4] * 40
    found = estimate_rate(flags)
    assert (found.value, found.n) == (0.2, 200)
    assert found == estimate_mean(flags)
    wide, narrow = wilson_interval(10, 50), wilson_interval(40, 200)
    assert found.high - found.low == pytest.approx(wide[1] - wide[0], rel=0.1)
    assert found.high - found.low > 1.5 * (narrow[1] - narrow[0])


@pytest.mark.parametrize("outcome", [True, False])
def test_a_unanimous_rate_still_has_a_width_that_of_its_prompts(outcome):
    found = estimate_rate([[outcome] * 4] * 25)
    assert (found.value, found.n) == (float(outcome), 100)
    assert (found.low, found.high) == wilson_interval(25 * outcome, 25)


def test_prompts_that_share_a_rate_still_have_a_width():
    assert estimate_rate([[True, False]] * 10) == Estimate(0.5, *wilson_interval(5, 10), n=20)


def test_the_samples_of_a_lone_prompt_are_independent():
    found = estimate_rate([[True, False, False, False]])
    assert found == Estimate(0.25, *wilson_interval(1, 4), n=4)
    assert estimate_mean([[0.0, 1.0, 0.5]]) == estimate_mean([[0.0], [1.0], [0.5]])


@pytest.mark.parametrize("estimate", [estimate_mean, estimate_rate])
@pytest.mark.parametrize("clusters", [[], [[]], [[], []]])
def test_nothing_observed_is_missing_and_never_zero(estimate, clusters):
    assert estimate(clusters, missing=4) == Estimate(None, None, None, n=0, missing=4)


@given(st.lists(st.lists(st.booleans(), max_size=4), max_size=12))
def test_a_rate_lies_in_its_interval(clusters):
    found = estimate_rate(clusters)
    flags = [flag for cluster in clusters for flag in cluster]
    assert found.n == len(flags)
    if flags:
        assert found.value == pytest.approx(sum(flags) / len(flags))
        assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.142, 0.11, 0.18, 500), "0.142 [0.11, 0.18] n=500"),
        (Estimate(0.0, 0.0, 0.2775, 10, missing=2), "0 [0, 0.278] n=10 missing=2"),
        (Estimate(1234.5, None, None, 3), "1230 n=3"),
        (Estimate(None, None, None, 0, missing=9), "missing n=0 missing=9"),
    ],
)
def test_an_estimate_reads_well(estimate, text):
    assert str(estimate) == text


def test_an_estimate_is_json():
    fields = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8, "missing": 1}
    assert json.loads(json.dumps(Estimate(**fields).to_json())) == fields
