"""Numbers with their uncertainty: every estimate carries its interval, its n and what is missing.

Samples drawn for one prompt resemble each other, so where a prompt has several the unit that is
resampled is the prompt (a cluster), not the sample: otherwise K samples a prompt would pass for K times
as much evidence as there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

Interval = tuple[float, float]

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

    def to_json(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        value = "missing" if self.value is None else _three_digits(self.value)
        if self.low is not None and self.high is not None:
            value += f" [{_three_digits(self.low)}, {_three_digits(self.high)}]"
        return f"{value} n={self.n}" + (f" missing={self.missing}" if self.missing else "")


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
    units = _independent_units(clusters)
    totals, counts = np.array([sum(unit) for unit in units]), np.array([len(unit) for unit in units])

    def mean_of(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        # Sums before the division, so that a cluster that lost samples weighs less.
        return np.asarray(totals[rows].sum(axis=axis) / counts[rows].sum(axis=axis))

    n = int(counts.sum())
    low, high = bootstrap_interval(np.arange(len(units)), mean_of, seed=seed) or (None, None)
    return Estimate(float(totals.sum() / n) if n else None, low, high, n, missing)


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


def _independent_units(clusters: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    units = [cluster for cluster in clusters if len(cluster)]
    return [[value] for value in units[0]] if len(units) == 1 else units


def _three_digits(value: float) -> str:
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")
