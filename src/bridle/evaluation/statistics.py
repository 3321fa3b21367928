"""Numbers with their uncertainty: every estimate carries its interval, its n and what is missing.

Samples drawn for one prompt resemble each other, so where a prompt has several the unit that is
resampled is the prompt (a cluster), not the sample: otherwise K samples a prompt would pass for K times
as much evidence as there is. Methods are compared prompt by prompt, since the prompts differ from each
other more than the methods do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from bridle.errors import UserError

Interval = tuple[float, float]
Clusters = Sequence[Sequence[float | None]]  # [prompts, samples] observations, None where one is missing

PERMUTATIONS = 9999  # the smallest p-value is 2 / 10,000; fewer than 14 prompts that differ are enumerated
RESAMPLES = 2000  # enough for the ends of a 95% interval to be steady in their second digit
NUMBERS_AT_ONCE = 10_000_000  # bounds the memory of one bootstrap to some 160 MB


@dataclass(frozen=True)
class Estimate:
    """One figure of a result.

    Attributes:
        value: the figure; `None` where nothing was there to make it from.
        low: lower end of its 95% interval; `None` where there is no interval.
        high: upper end.
        n: how many observations it is made from.
        missing: how many observations should have been there and were left out.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    missing: int = 0

    def map(self, increasing: Callable[[float], float]) -> "Estimate":
        """The estimate of an increasing function of the figure: percentiles go through it unchanged."""
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
class Comparison:
    """How a method differs from a reference on the same prompts.

    Attributes:
        method: name of the method.
        reference: name of what it is compared with.
        difference: mean over prompts of (method − reference), below 0 where the method is lower; its 95%
            interval is not adjusted for other comparisons. `n` counts prompts, `missing` those left out
            because either method has no observation there.
        p_value: chance of a difference at least as large where there is none; `None` without prompts.
        adjusted_p_value: the same after Holm's correction over all methods compared on this figure.
        test: "mcnemar" or "permutation".
    """

    method: str
    reference: str
    difference: Estimate
    p_value: float | None
    adjusted_p_value: float | None
    test: str

    def to_json(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        p, adjusted = ("missing" if p is None else f"{p:.2g}" for p in (self.p_value, self.adjusted_p_value))
        return f"{self.method} − {self.reference}: {self.difference} p={p}, adjusted p={adjusted}"


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Wilson's score interval for a proportion of independent trials (Wilson, JASA 1927).

    It stays within [0, 1] and keeps its width at 0 and n successes. `None` where n = 0.
    """
    if n == 0:
        return None
    low, high = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Percentile bootstrap interval (Efron, 1979) of a statistic of independent observations.

    Args:
        values: [n] observations.
        statistic: a function of an array and `axis`, as in NumPy, or of a 1-D array alone (slower).
        confidence: share of intervals that should hold the true value.
        seed: the same seed gives the same interval.
        resamples: how many times the observations are drawn anew.

    Returns:
        (low, high), or `None` where the spread is unknown: with fewer than two observations, or where
        all resamples agree, which an interval without width would pass off as certainty.
    """
    values = np.asarray(values)
    if len(values) < 2:
        return None
    result = stats.bootstrap(
        (values,),
        statistic,
        n_resamples=resamples,
        batch=max(1, NUMBERS_AT_ONCE // len(values)),
        confidence_level=confidence,
        method="percentile",  # the default, BCa, is NaN where the statistic hardly varies
        random_state=np.random.default_rng(seed),
    )
    low, high = map(float, result.confidence_interval)
    return (low, high) if low < high else None


def estimate_mean(clusters: Sequence[Sequence[float]], *, missing: int = 0, seed: int = 0) -> Estimate:
    """Mean over all observations, with an interval that resamples whole clusters.

    Args:
        clusters: per prompt its observations; an empty cluster adds nothing. One prompt alone is a
            question about that prompt, and its samples are then the independent observations.
        missing: how many observations were left out.
        seed: of the bootstrap.
    """
    return estimate_ratio([[(value, 1) for value in cluster] for cluster in clusters], missing=missing, seed=seed)


def estimate_ratio(clusters: Sequence[Sequence[tuple[float, int]]], *, missing: int = 0, seed: int = 0) -> Estimate:
    """Σ a / Σ b over all observations (a, b), with an interval that resamples whole clusters.

    Args:
        clusters: as in `estimate_mean`, of pairs; for a text its −log p and its tokens, for instance.
        missing: as in `estimate_mean`.
        seed: of the bootstrap.

    Returns:
        The ratio; its `n` is Σ b.
    """
    units = _independent_units(clusters)
    tops, bottoms = (np.array([sum(pair[part] for pair in unit) for unit in units]) for part in (0, 1))

    def ratio_of(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        # Sums before the division, so that a cluster with fewer observations weighs less.
        return np.asarray(tops[rows].sum(axis=axis) / bottoms[rows].sum(axis=axis))

    n = int(bottoms.sum())
    low, high = bootstrap_interval(np.arange(len(units)), ratio_of, seed=seed) or (None, None)
    return Estimate(float(tops.sum() / n) if n else None, low, high, n, missing)


def estimate_rate(clusters: Sequence[Sequence[bool]], *, missing: int = 0, seed: int = 0) -> Estimate:
    """Share of true observations: Wilson's interval where they are independent, clustered otherwise.

    Where all clusters have the same rate, as when nothing violates, a bootstrap has no width, and the
    interval is Wilson's with each cluster as one trial: the widest reading, in which a prompt's further
    samples tell nothing new.

    Args:
        clusters: as in `estimate_mean`.
        missing: as in `estimate_mean`.
        seed: of the bootstrap.
    """
    units = _independent_units(clusters)
    found = estimate_mean(units, missing=missing, seed=seed)
    clustered = found.n > len(units) and found.low is not None
    if clustered or found.value is None:
        return found
    low, high = wilson_interval(round(found.value * len(units)), len(units)) or (None, None)
    return replace(found, low=low, high=high)


def mcnemar(a: Sequence[bool | None], b: Sequence[bool | None]) -> float | None:
    """Exact two-sided McNemar test of paired yes/no outcomes (McNemar, Psychometrika 1947).

    Where both methods have the same rate, a pair that disagrees does so either way with probability 1/2, so
    the count of one way is binomial. Pairs that agree say nothing.

    Args:
        a: [n] outcomes of one method, None where missing.
        b: [n] outcomes of the other, for the same prompts in the same order.

    Returns:
        The p-value; 1 where no pair disagrees, `None` where no pair is complete.
    """
    pairs = [pair for pair in zip(a, b, strict=True) if None not in pair]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    if only_a + only_b == 0:
        return 1.0 if pairs else None
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)


def paired_bootstrap(a: Clusters, b: Clusters, *, seed: int) -> tuple[Estimate, float | None]:
    """Mean over prompts of (a − b), with a bootstrap interval over prompts and a permutation p-value.

    Each prompt's samples become one mean first, whatever their number, so that all prompts weigh the same.
    The p-value is that of the paired permutation test (Fisher, The Design of Experiments, 1935): where
    the methods are alike, each prompt's difference is as likely with the other sign. A bootstrap's own
    p-value would be below its nominal one with few prompts.

    Args:
        a: [prompts, samples] observations of one method, None where missing.
        b: the same of the other, for the same prompts in the same order; it may have other numbers of samples.
        seed: of the resamples and permutations.

    Returns:
        The difference, as in `Comparison.difference`, and its two-sided p-value (`None` without prompts).
    """
    means = [(_mean(of_a), _mean(of_b)) for of_a, of_b in zip(a, b, strict=True)]
    differences = np.array([x - y for x, y in means if x is not None and y is not None])
    found = estimate_mean([[difference] for difference in differences.tolist()], seed=seed)
    found = replace(found, missing=len(means) - len(differences))
    return found, _sign_flip_test(differences, seed) if len(differences) else None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of p-values for several comparisons (Holm, Scand. J. Statist. 1979).

    Rejecting where the adjusted value is at most α keeps the chance of even one false claim in the family at
    most α, however the comparisons depend on each other. A false discovery rate would bound only the share
    of false claims: fit for screening hundreds of hypotheses, too weak for a table of a few methods of which
    each row is read as a claim.

    Args:
        p_values: in any order; a missing one stays missing and is not counted as a comparison.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


def compare_methods(observations: Mapping[str, Clusters], reference: str, *, seed: int = 0) -> list[Comparison]:
    """Compares the mean of every other method, a violation rate for instance, with a reference on the same prompts.

    With one yes or no a prompt the test is McNemar's, otherwise the permutation test of `paired_bootstrap`,
    which is McNemar's too where both apply. The p-values are adjusted by `holm` over all methods.

    Args:
        observations: per method [prompts, samples]: whether a completion violates, for instance, None where it
            has no score. The prompts are the same, in the same order.
        reference: the method that the others are compared with.
        seed: of the resamples and permutations.

    Raises:
        UserError: there is no such reference, or a method has another number of prompts.
    """
    _check_methods(observations, reference)
    base = observations[reference]
    others = {name: values for name, values in observations.items() if name != reference}
    tested = [_tested(values, base, seed) for values in others.values()]
    adjusted = holm([p for _, p, _ in tested])
    return [
        Comparison(method, reference, difference, p, adjusted_p, test)
        for method, (difference, p, test), adjusted_p in zip(others, tested, adjusted, strict=True)
    ]


def _check_methods(observations: Mapping[str, Clusters], reference: str) -> None:
    if reference not in observations:
        raise UserError(f"reference: {reference!r} is none of the methods {', '.join(map(repr, observations))}")
    wanted = len(observations[reference])
    for method, values in observations.items():
        if len(values) != wanted:
            raise UserError(
                f"method {method!r} has {len(values)} prompts and {reference!r} has {wanted}; "
                "methods are compared on the same prompts"
            )


def _tested(values: Clusters, base: Clusters, seed: int) -> tuple[Estimate, float | None, str]:
    difference, p = paired_bootstrap(values, base, seed=seed)
    every = [*chain(values, base)]
    if any(len(samples) != 1 or not isinstance(samples[0], bool | None) for samples in every):
        return difference, p, "permutation"
    return difference, mcnemar([flag for (flag,) in values], [flag for (flag,) in base]), "mcnemar"  # type: ignore[misc]


def _sign_flip_test(differences: np.ndarray, seed: int) -> float:
    """Two-sided p-value of the mean of paired differences, exact where few enough are not 0."""
    differences = differences[differences != 0]  # a sign makes no difference to 0
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


def _mean(samples: Sequence[float | None]) -> float | None:
    present = [value for value in samples if value is not None]
    return fmean(present) if present else None


def _independent_units(clusters: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    units = [cluster for cluster in clusters if len(cluster)]
    return [[value] for value in units[0]] if len(units) == 1 else units


def _three_digits(value: float) -> str:
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")
