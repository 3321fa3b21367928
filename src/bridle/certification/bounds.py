"""Exact one-sided bounds on a rate, from independent observations: pure functions of numbers.

An observation is 1 where a completion violates and 0 where it complies, or that times an importance weight. Every bound
holds at each sample size, not only asymptotically.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

FRACTIONS = (0.25, 0.5, 0.75, 0.9, 0.99)
"""Of the largest bet. A fraction f suits a true rate of (1 − f) times the target; their mixture suits them all."""

HALVINGS = 40  # of the interval that holds a betting bound


def upper_bound(violations: int, n: int, confidence: float) -> float:
    """The one-sided Clopper–Pearson upper bound on a rate (Biometrika 1934): the largest p with P(Bin(n, p) ≤ k) ≥ α.

    Args:
        violations: k of n.
        confidence: 1 − α.
    """
    return 1.0 if violations >= n else float(stats.beta.ppf(confidence, violations + 1, n - violations))


def lower_bound(successes: int, n: int, confidence: float) -> float:
    """The one-sided Clopper–Pearson lower bound on a rate, as `upper_bound`."""
    return 0.0 if successes == 0 else float(stats.beta.ppf(1 - confidence, successes, n - successes + 1))


def prompts_needed(rate: float, confidence: float, violations: int = 0) -> int:
    """The fewest observations for which `upper_bound` is at most `rate`, if `violations` of them violate."""
    return _first(lambda n: bool(stats.binom.cdf(violations, n, rate) <= 1 - confidence), violations + 1)


def log_wealth(values: ArrayLike, rate: float, largest: float = 1.0) -> np.ndarray:
    """The log of the wealth of a bettor who bets that the mean of bounded observations is below `rate`.

    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (JRSS B 2024). With X_i in [0, B]
    and bets λ that do not depend on X_i,

        W_t(m) = Π_{i≤t} (1 − λ·(X_i − m)),    0 ≤ λ ≤ 1 / (B − m),

    is a non-negative supermartingale where the mean of every X_i, given those before it, is at least m. By Ville's
    inequality it ever reaches 1/α with a probability of at most α, however often one looks. This is the mean of W_t
    over the bets λ = f / (B − m), f in `FRACTIONS`, which is one too. It increases in m.

    Args:
        values: [..., n] observations in the order in which they were made.
        rate: m, below `largest`.
        largest: B.

    Returns:
        [..., n] log W_t for t = 1 .. n.
    """
    excess = (np.asarray(values, dtype=float) - rate) / (largest - rate)
    parts = (np.log1p(-fraction * excess).cumsum(axis=-1) for fraction in FRACTIONS)
    total = np.full(excess.shape, -np.inf)
    for part in parts:
        np.logaddexp(total, part, out=total)
    return total - np.log(len(FRACTIONS))


def betting_bound(values: ArrayLike, confidence: float, largest: float = 1.0) -> float:
    """The upper end of a betting confidence sequence for the mean: the smallest rate that `log_wealth` rules out.

    It holds at all times at once, so that sampling may stop whenever it is low enough.

    Args:
        values: [n] observations in [0, `largest`], in the order in which they were made.
        confidence: 1 − α.
        largest: the largest value that an observation can have.
    """
    values = np.asarray(values, dtype=float)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS if values.size else 0):
        middle = (low + high) / 2
        is_ruled_out = log_wealth(values, middle, largest).max() >= -np.log1p(-confidence)
        low, high = (low, middle) if is_ruled_out else (middle, high)
    return high


def prompts_needed_by_betting(rate: float, confidence: float, violations: int = 0, largest: float = 1.0) -> int:
    """The fewest observations for which `betting_bound` is at most `rate`, if `violations` are `largest`, others 0."""
    bets = np.array(FRACTIONS) / (largest - rate)

    def rules_out(n: int) -> bool:
        parts = violations * np.log1p(-bets * (largest - rate)) + (n - violations) * np.log1p(bets * rate)
        return bool(np.logaddexp.reduce(parts) - np.log(len(bets)) >= -np.log1p(-confidence))

    return _first(rules_out, violations + 1)


def true_rate_bound(flagged: float, sensitivity: float, false_alarms: float) -> float:
    """An upper bound on the true violation rate π, from bounds on how often an oracle flags a text.

    The oracle flags a share ρ = π·s + (1 − π)·f, with sensitivity s and false-alarm rate f = 1 − specificity
    (Rogan and Gladen, Am. J. Epidemiol. 1978), so that

        π = (ρ − f) / (s − f),

    which rises in ρ and falls in s and in f. Where the bounds contradict each other, ρ < f, nothing is subtracted.

    Args:
        flagged: upper bound on ρ.
        sensitivity: lower bound on s.
        false_alarms: lower bound on f.

    Returns:
        At most 1, which says nothing: also where the oracle is not shown to tell violating texts from others.
    """
    subtracted = false_alarms if false_alarms <= flagged else 0.0
    told_apart = sensitivity - subtracted
    return min(1.0, (flagged - subtracted) / told_apart) if told_apart > 0 else 1.0


class Tested(Protocol):
    """The outcome of a test."""

    @property
    def passed(self) -> bool:
        """Whether the test was passed."""
        ...


T = TypeVar("T", bound=Tested)


def fixed_sequence(tests: Iterable[T]) -> list[T]:
    """Makes tests in an order that was fixed before, up to the first that fails: all that were made.

    Each is made at the full level α. To pass any candidate wrongly, the first in the order that must not pass has to,
    which has a probability of at most α. Several tests cost no more than one (Maurer, Hothorn and Lehmacher, 1995).
    """
    made = []
    for test in tests:
        made.append(test)
        if not test.passed:
            break
    return made


def _first(holds: Callable[[int], bool], least: int) -> int:
    """The smallest whole number from `least` on for which a condition holds that stays true."""
    most = least
    while not holds(most):
        most *= 2
    return bisect_left(range(most + 1), True, lo=least, key=holds)
