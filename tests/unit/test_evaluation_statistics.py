import json
import math
from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridle.errors import UserError
from bridle.evaluation.statistics import (
    Comparison,
    Estimate,
    bootstrap_interval,
    compare_methods,
    estimate_mean,
    estimate_rate,
    estimate_ratio,
    holm,
    mcnemar,
    paired_bootstrap,
    wilson_interval,
)

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
def test_wilson_holds_the_rate(n, data):
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1


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


def test_resamples_without_a_figure_do_not_count(recwarn):
    def largest_odd(sample):
        odd = sample[sample % 2 == 1]
        return float(odd.max()) if len(odd) else float("nan")

    low, high = bootstrap_interval([2.0, 4.0, 6.0, 1.0, 3.0], largest_odd, seed=0)
    assert (low, high) == (1.0, 3.0)
    assert bootstrap_interval([2.0, 4.0], largest_odd, seed=0) is None
    assert not recwarn.list


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


def test_a_ratio_divides_sums_and_counts_its_denominator():
    texts = [[(6.0, 2)], [(4.0, 8)]]  # −log p and tokens
    found = estimate_ratio(texts, missing=1)
    assert (found.value, found.n, found.missing) == (1.0, 10, 1)
    assert (found.low, found.high) == (0.5, 3.0)  # the resamples that draw one text twice
    assert estimate_ratio([], missing=2) == Estimate(None, None, None, n=0, missing=2)


def test_an_increasing_function_takes_the_interval_with_it():
    found = Estimate(1.0, 0.0, 2.0, n=5, missing=1).map(math.exp)
    assert found == Estimate(math.e, 1.0, math.exp(2), n=5, missing=1)
    assert Estimate(None, None, None, n=0).map(math.exp) == Estimate(None, None, None, n=0)


def test_mcnemar_by_hand():
    # Six pairs disagree, one of them the other way: 2 · (1 + 6) / 2⁶.
    a = [True] + [False] * 5 + [True] * 7 + [False]
    b = [False] + [True] * 5 + [True] * 7 + [False]
    assert mcnemar(a, b) == pytest.approx(14 / 64)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar([*a, None, True], [*b, True, None]) == mcnemar(a, b)


def test_mcnemar_without_disagreement_or_without_pairs():
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([True, None], [None, False]) is None
    with pytest.raises(ValueError, match="zip"):
        mcnemar([True], [True, False])


def enumerated_p(differences):
    """Two-sided p-value over all 2ⁿ signs: twice the smaller tail, at most 1."""
    sums = np.array([np.dot(signs, differences) for signs in product((1, -1), repeat=len(differences))])
    observed, slack = sum(differences), 1e-9
    return min(1.0, 2 * min(np.mean(sums >= observed - slack), np.mean(sums <= observed + slack)))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=9))
def test_mcnemar_agrees_with_enumeration_and_with_the_permutation_test(pairs):
    a, b = zip(*pairs, strict=True)
    differences = [int(x) - int(y) for x, y in pairs]
    assert mcnemar(a, b) == pytest.approx(enumerated_p(differences))
    found, p = paired_bootstrap([[x] for x in a], [[y] for y in b], seed=0)
    assert p == pytest.approx(mcnemar(a, b))
    assert found.value == pytest.approx(np.mean(differences))


def test_the_permutation_test_agrees_with_enumeration_over_prompts():
    rng = np.random.default_rng(0)
    a, b = rng.random((10, 3)).tolist(), (rng.random((10, 3)) + 0.15).tolist()
    differences = [np.mean(x) - np.mean(y) for x, y in zip(a, b, strict=True)]
    found, p = paired_bootstrap(a, b, seed=0)
    assert p == pytest.approx(enumerated_p(differences))
    assert 0 < p < 1
    assert found.value == pytest.approx(np.mean(differences))


def test_many_prompts_are_permuted_at_random_close_to_the_exact_value():
    a = [True] * 12 + [False] * 28
    b = [False] * 12 + [True] * 24 + [False] * 4
    _, p = paired_bootstrap([[x] for x in a], [[x] for x in b], seed=0)
    assert p == pytest.approx(mcnemar(a, b), abs=0.015)
    assert p == paired_bootstrap([[x] for x in a], [[x] for x in b], seed=0)[1]


def test_a_paired_interval_by_hand():
    # 27 resamples of the differences 0, 1, 1: one has the mean 0 (3.7%), eight the mean 1.
    found, p = paired_bootstrap([[0.0], [1.0], [1.0]], [[0.0], [0.0], [0.0]], seed=0)
    assert found == Estimate(pytest.approx(2 / 3), 0.0, 1.0, n=3)
    assert p == 0.5  # two signs: both as observed, or both reversed


def test_pairing_takes_out_what_prompts_share():
    rng = np.random.default_rng(0)
    easy = rng.random(200)
    a, b = easy + 0.02 * rng.random(200) + 0.02, easy + 0.02 * rng.random(200)
    found, p = paired_bootstrap([[x] for x in a], [[x] for x in b], seed=0)
    assert 0.015 < found.low < found.value < found.high < 0.025
    assert p == 2 / 10_000
    alone = estimate_mean([[x] for x in a])
    assert alone.low < b.mean()  # taken apart, the same rows show nothing


def test_further_samples_of_a_prompt_are_no_further_prompts():
    a, b = [[1.0], [0.0], [1.0], [1.0]], [[0.0], [0.0], [1.0], [0.0]]
    once = paired_bootstrap(a, b, seed=0)
    assert paired_bootstrap([x * 5 for x in a], b, seed=0) == once


def test_a_prompt_without_a_score_on_either_side_is_missing():
    a = [[True, None], [None, None], [False, False], []]
    b = [[False, False], [True, True], [None, True], [True]]
    found, p = paired_bootstrap(a, b, seed=0)
    assert (found.value, found.n, found.missing) == (0.0, 2, 2)  # 1 − 0 and 0 − 1
    assert p == 1.0
    assert paired_bootstrap([[None]], [[True]], seed=0) == (Estimate(None, None, None, n=0, missing=1), None)


def test_no_difference_is_no_certainty_of_none():
    found, p = paired_bootstrap([[False]] * 20, [[False]] * 20, seed=0)
    assert (found, p) == (Estimate(0.0, None, None, n=20), 1.0)


def test_holm_by_hand():
    # In order: 0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 · 1, which may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.5]) == [1.0, None, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_bonferroni_on_every_subset(p_values):
    # Closed testing: an hypothesis falls where Bonferroni rejects every intersection that it is part of.
    indices = range(len(p_values))
    subsets = list(chain.from_iterable(combinations(indices, size) for size in range(1, len(p_values) + 1)))
    closed = [max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets if index in s) for index in indices]
    assert holm(p_values) == pytest.approx(closed)


def one_each(flags):
    return [[flag] for flag in flags]


def test_methods_are_compared_with_a_reference():
    base = [True] * 9 + [False] * 3
    violations = {
        "guided": one_each([False] * 8 + [True] + [False] * 3),
        "base": one_each(base),
        "tuned": one_each([None, False, False, *base[3:]]),
    }
    guided, tuned = compare_methods(violations, "base")
    assert (guided.method, guided.reference, guided.test) == ("guided", "base", "mcnemar")
    assert guided.difference.value == pytest.approx(-8 / 12)
    assert guided.difference.low < -8 / 12 < guided.difference.high < 0
    assert (guided.p_value, guided.adjusted_p_value) == pytest.approx((2 / 2**8, 4 / 2**8))
    assert (tuned.difference.n, tuned.difference.missing) == (11, 1)
    assert (tuned.p_value, tuned.adjusted_p_value) == (0.5, 0.5)


def test_several_samples_a_prompt_are_compared_by_permutation():
    violations = {"base": [[True, False], [True, True], [False, True]], "tuned": [[False] * 2, [False, True], [False]]}
    (found,) = compare_methods(violations, "base")
    assert (found.test, found.p_value) == ("permutation", 0.25)  # three prompts, all lower: 2 / 2³
    assert found.difference.value == pytest.approx(-0.5)


def test_a_comparison_without_scores_is_missing_and_spares_the_others():
    found = compare_methods(
        {"a": one_each([None] * 3), "b": one_each([True] * 3), "base": one_each([True] * 3)}, "base"
    )
    assert [item.p_value for item in found] == [None, 1.0]
    assert found[0].difference == Estimate(None, None, None, n=0, missing=3)
    assert str(found[0]) == "a − base: missing n=0 missing=3 p=missing, adjusted p=missing"


def test_a_comparison_reads_well_and_is_json():
    found = Comparison("tuned", "base", Estimate(-0.25, -0.5, -0.125, n=40), 0.0123, 0.0246, "mcnemar")
    assert str(found) == "tuned − base: -0.25 [-0.5, -0.125] n=40 p=0.012, adjusted p=0.025"
    assert json.loads(json.dumps(found.to_json()))["difference"] == found.difference.to_json()


def test_methods_that_cannot_be_compared_are_named():
    with pytest.raises(UserError, match=r"reference: 'plain' is none of the methods 'base', 'tuned'"):
        compare_methods({"base": [], "tuned": []}, "plain")
    with pytest.raises(UserError, match=r"method 'tuned' has 1 prompts and 'base' has 2"):
        compare_methods({"base": one_each([True, True]), "tuned": one_each([True])}, "base")
