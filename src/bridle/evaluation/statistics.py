"""Estimates with confidence intervals, and paired tests between methods.

Samples of one prompt are correlated, so intervals resample prompts (clusters), not samples. Methods are compared
prompt by prompt, since prompts differ from each other more than methods do.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from bridle.errors import UserError

Interval = tuple[float, float]
Clusters = Sequence[Sequence[float | None]]  # [prompts, samples] observations, None where one is missing

LEVEL = 0.05  # of significance
PERMUTATIONS = 9999  # the smallest p-value is 2 / 10,000; fewer than 14 prompts that differ are enumerated
RESAMPLES = 2000  # enough for the ends of a 95% interval to be steady in their second digit
NUMBERS_AT_ONCE = 10_000_000  # bounds the memory of one bootstrap to some 160 MB


@dataclass(frozen=True)
class Estimate:
    """One figure of a result.

    Attributes:
        value: `None` without observations.
        low: lower end of the 95% interval; `None` where there is no interval.
        n: number of observations.
        missing: number of observations that are missing.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    missing: int = 0

    def map(self, increasing: Callable[[float], float]) -> "Estimate":
        """The estimate of an increasing function of the figure."""
        value, low, high = (None if x is None else increasing(x) for x in (self.value, self.low, self.high))
        return replace(self, value=value, low=low, high=high)

    def to_json(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        value = "missing" if self.value is None else _three_digits(self.value)
        if self.low is not None and self.high is not None:
            value += f" [{_three_digits(self.low)}, {_three_digits(self.high)}]"
        return f"{value} n={self.n}" + (f" missing={self.missing}" if self.missing else "")


@dataclass(frozen=True)
class Result:
    """Base class of results with estimates."""

    def estimates(self) -> dict[str, Estimate]:
        """The figures by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Estimate)}

    def to_json(self) -> dict[str, Any]:
        """The fields by name, ready for JSON, without those that `repr` hides: single observations."""
        shown = [field.name for field in fields(self) if field.repr]
        return {name: value for name, value in asdict(self).items() if name in shown}

    def __str__(self) -> str:
        figures = self.estimates()
        width = max(map(len, figures)) + 2
        return "\n".join(f"{name.replace('_', ' '):<{width}}{value}" for name, value in figures.items())


@dataclass(frozen=True)
class Comparison(Result):
    """The difference between a method and a reference on the same prompts.

    Attributes:
        difference: mean over prompts of (method − reference), with an unadjusted 95% interval. `n` counts prompts,
            `missing` those without an observation of either method.
        p_value: two-sided; `None` without prompts.
        adjusted_p_value: after Holm's correction over all methods compared on this figure.
        test: "mcnemar" or "permutation".
    """

    method: str
    reference: str
    difference: Estimate
    p_value: float | None
    adjusted_p_value: float | None
    test: str

    def __str__(self) -> str:
        p, adjusted = ("missing" if p is None else f"{p:.2g}" for p in (self.p_value, self.adjusted_p_value))
        return f"{self.method} − {self.reference}: {self.difference} p={p}, adjusted p={adjusted}"


def wilson_interval(successes: int, n: int) -> Interval | None:
    """Wilson's 95% score interval for a proportion of independent trials (Wilson, JASA 1927); `None` where n = 0.

    It stays within [0, 1] and keeps its width at 0 and n successes.
    """
    if n == 0:
        return None
    low, high = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(low), float(high)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[..., Any] = np.mean,
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """95% percentile bootstrap interval (Efron, 1979) of a statistic of independent observations.

    Args:
        values: [n] observations.
        statistic: a function of an array and `axis`, as in NumPy, or of a 1-D array alone (slower).

    Returns:
        (low, high), or `None` where the spread is unknown: with fewer than two observations, or where all resamples
        agree, since an interval without width would suggest certainty. Resamples without a figure, as an AUC of one
        class, do not count.
    """
    values = np.asarray(values)
    if len(values) < 2:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=stats.DegenerateDataWarning)  # of the interval that is not used
        result = stats.bootstrap(
            (values,),
            statistic,
            n_resamples=resamples,
            batch=max(1, NUMBERS_AT_ONCE // len(values)),
            method="percentile",  # the default, BCa, is NaN where the statistic hardly varies
            random_state=np.random.default_rng(seed),
        )
    found = result.bootstrap_distribution[np.isfinite(result.bootstrap_distribution)]
    if not len(found):
        return None
    low, high = map(float, np.percentile(found, [2.5, 97.5]))
    return (low, high) if low < high else None


def estimate_mean(clusters: Sequence[Sequence[float]], *, missing: int = 0, seed: int = 0) -> Estimate:
    """Mean over all observations, with an interval that resamples whole clusters.

    Args:
        clusters: observations by prompt, of which some may have none. The samples of a single prompt are independent
            observations, since the figure is then about that prompt.
    """
    return estimate_ratio([[(value, 1) for value in cluster] for cluster in clusters], missing=missing, seed=seed)


def estimate_ratio(clusters: Sequence[Sequence[tuple[float, int]]], *, missing: int = 0, seed: int = 0) -> Estimate:
    """Σ a / Σ b over all observations (a, b), such as the −log p and the tokens of a text; its `n` is Σ b.

    The interval resamples whole clusters, as in `estimate_mean`.
    """
    units = _independent_units(clusters)
    tops, bottoms = (np.array([sum(pair[part] for pair in unit) for unit in units]) for part in (0, 1))

    def ratio_of(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        # Sums before the division, so that a cluster with fewer observations weighs less.
        return np.asarray(tops[rows].sum(axis=axis) / bottoms[rows].sum(axis=axis))

    n = int(bottoms.sum())
    low, high = bootstrap_interval(np.arange(len(units)), ratio_of, seed=seed) or (None, None)
    return Estimate(float(tops.sum() / n) if n else None, low, high, n, missing)


def estimate_statistic(
    statistic: Callable[[np.ndarray], float], n: int, *, missing: int = 0, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """A function of row numbers, here all of `n`, with an interval that resamples rows."""
    rows = np.arange(n)
    low, high = bootstrap_interval(rows, statistic, seed=seed, resamples=resamples) or (None, None)
    return Estimate(float(statistic(rows)), low, high, n, missing)


def estimate_proportion(outcomes: Sequence[bool] | np.ndarray, *, missing: int = 0) -> Estimate:
    """Share of true outcomes of independent trials, with Wilson's interval."""
    n, successes = len(outcomes), int(sum(outcomes))
    low, high = wilson_interval(successes, n) or (None, None)
    return Estimate(successes / n if n else None, low, high, n, missing)


def estimate_rate(clusters: Sequence[Sequence[bool]], *, missing: int = 0, seed: int = 0) -> Estimate:
    """Share of true observations, with Wilson's interval where they are independent and a clustered one otherwise."""
    units = _independent_units(clusters)
    outcomes = [*chain.from_iterable(units)]
    if len(outcomes) == len(units):
        return estimate_proportion(outcomes, missing=missing)
    return with_width(estimate_mean(units, missing=missing, seed=seed), len(units))


def with_width(rate: Estimate, clusters: int) -> Estimate:
    """A rate with Wilson's interval where all clusters agree, so that the bootstrap interval has no width.

    Each cluster is one trial: the most conservative reading, in which further samples of a prompt are no evidence.
    """
    if rate.value is None or rate.low is not None:
        return rate
    low, high = wilson_interval(round(rate.value * clusters), clusters) or (None, None)
    return replace(rate, low=low, high=high)


def mcnemar(a: Sequence[bool | None], b: Sequence[bool | None]) -> float | None:
    """P-value of the exact two-sided McNemar test of paired outcomes (McNemar, Psychometrika 1947).

    It is 1 where no pair of the [n] outcomes differs, and `None` where one of each pair is missing.
    """
    pairs = [pair for pair in zip(a, b, strict=True) if None not in pair]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    if only_a + only_b == 0:
        return 1.0 if pairs else None
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)


def paired_bootstrap(a: Clusters, b: Clusters, *, seed: int) -> tuple[Estimate, float | None]:
    """Mean over prompts of (a − b) with a bootstrap interval, and its two-sided p-value (`None` without prompts).

    The samples of a prompt are averaged first, so that all prompts weigh the same. The p-value is that of the paired
    permutation test (Fisher, The Design of Experiments, 1935): with few prompts, a bootstrap's own is too small.

    Args:
        a, b: [prompts, samples] observations of two methods on the same prompts, None where missing.
    """
    found, differences = _paired(a, b, seed)
    return found, _sign_flip_test(differences, seed) if len(differences) else None


def _paired(a: Clusters, b: Clusters, seed: int) -> tuple[Estimate, np.ndarray]:
    """The mean over prompts of (a − b), and the difference of each prompt."""
    means = [(observed_mean(of_a), observed_mean(of_b)) for of_a, of_b in zip(a, b, strict=True)]
    differences = np.array([x - y for x, y in means if x is not None and y is not None])
    missing = len(means) - len(differences)
    return estimate_mean([[one] for one in differences.tolist()], missing=missing, seed=seed), differences


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of p-values, missing ones excluded (Holm, Scand. J. Statist. 1979).

    It controls the family-wise error rate under any dependence; a false discovery rate would be too weak for a table in
    which each row is read as a claim.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        adjusted[index] = largest = max(largest, min(1.0, (len(order) - rank) * p))
    return adjusted


def compare_methods(observations: Mapping[str, Clusters], reference: str) -> list[Comparison]:
    """Compares the mean of every other method, such as a violation rate, with a reference on the same prompts.

    With one yes or no per prompt the test is McNemar's, otherwise the permutation test of `paired_bootstrap`. The
    p-values are adjusted by `holm` over all methods.

    Args:
        observations: [prompts, samples] by method, None where one is missing.

    Raises:
        UserError: there is no such reference, or a method has another number of prompts.
    """
    if reference not in observations:
        raise UserError(f"reference: {reference!r} is none of the methods {', '.join(map(repr, observations))}")
    base = observations[reference]
    for method, values in observations.items():
        if len(values) != len(base):
            raise UserError(
                f"method {method!r} has {len(values)} prompts and {reference!r} has {len(base)}; "
                "methods are compared on the same prompts"
            )
    tested = {name: _tested(values, base) for name, values in observations.items() if name != reference}
    adjusted = holm([p for _, p, _ in tested.values()])
    return [
        Comparison(method, reference, difference, p, adjusted_p, test)
        for (method, (difference, p, test)), adjusted_p in zip(tested.items(), adjusted, strict=True)
    ]


def observed_mean(samples: Sequence[float | None]) -> float | None:
    """The mean of the samples that are not missing; None if all are."""
    present = [value for value in samples if value is not None]
    return fmean(present) if present else None


def _tested(values: Clusters, base: Clusters) -> tuple[Estimate, float | None, str]:
    if any(len(samples) != 1 or not isinstance(samples[0], bool | None) for samples in chain(values, base)):
        return *paired_bootstrap(values, base, seed=0), "permutation"
    difference, _ = _paired(values, base, seed=0)
    return difference, mcnemar([flag for (flag,) in values], [flag for (flag,) in base]), "mcnemar"  # type: ignore[misc]


def _sign_flip_test(differences: np.ndarray, seed: int) -> float:
    """Two-sided p-value of the mean of paired differences, exact where few enough are not 0."""
    differences = differences[differences != 0]  # a sign does not change 0
    if len(differences) < 2:
        return 1.0
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",  # of a single sample: its signs
        n_resamples=PERMUTATIONS,
        batch=max(1, NUMBERS_AT_ONCE // len(differences)),
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _independent_units(clusters: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    units = [cluster for cluster in clusters if len(cluster)]
    return [[value] for value in units[0]] if len(units) == 1 else units


def _three_digits(value: float) -> str:
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")
