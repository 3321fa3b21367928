"""What a certificate is to show, and the test that shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bridle.certification.bounds import betting_bound, prompts_needed, prompts_needed_by_betting, upper_bound
from bridle.errors import UserError
from bridle.utils.percent import percent

Method = Literal["count", "importance"]

SEEK = 0.1
"""By default. Seeking finds most of what R foresees already at this share, and a larger one needs more prompts for the
violations that R does not foresee (docs: concepts/certificate)."""

RANGES = {"rate": (1e-12, 1), "confidence": (0, 1), "seek": (0, 0.999)}
"""Exclusive. A betting bound, found to 2⁻⁴⁰, never reaches a lower rate; a larger share gives weights that no
number of prompts makes up for."""

SHOWN = (0, 1, 2, 3, 5, 10)  # numbers of violations for which a plan says how many prompts are needed


@dataclass(frozen=True)
class Goal:
    """What is to be shown, and how.

    Attributes:
        rate: at most this share of the completions violates.
        confidence: 1 − α, with which the statement holds.
        method: `count` draws from the model and counts violations. `importance` also draws from q⁻, where R expects
            violations, and weighs them.
        anytime: sampling stops as soon as the result is settled, by a bound that holds at all times at once.
        seek: the share of q⁻ in the mixture that `importance` draws from.

    Raises:
        UserError: a number is out of range; the message begins with the field.
    """

    rate: float = 0.01
    confidence: float = 0.95
    method: Method = "count"
    anytime: bool = False
    seek: float = SEEK

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            if not low < getattr(self, name) < high:
                raise UserError(f"{name}: must lie between {low:g} and {high:g}, not {getattr(self, name)}")

    @property
    def bets(self) -> bool:
        """Whether the bound is a betting confidence sequence, and not that of Clopper and Pearson."""
        return self.anytime or self.method == "importance"

    @property
    def largest(self) -> float:
        """The largest value of an observation: 1, or the largest importance weight."""
        return 1 / (1 - self.seek) if self.method == "importance" else 1.0

    def bound(self, values: Sequence[float], confidence: float | None = None) -> float:
        """The upper bound on the rate.

        Args:
            values: [n] for each completion 0 where it complies and its weight where it violates, in order.
            confidence: the goal's by default.
        """
        confidence = confidence or self.confidence
        if self.bets:
            return betting_bound(values, confidence, self.largest)
        return upper_bound(sum(value > 0 for value in values), len(values), confidence)

    def can_be_reached(self, values: Sequence[float], remaining: int) -> bool:
        """Whether the bound reaches the rate if all of the `remaining` completions comply."""
        return self.bound([*values, *[0.0] * remaining]) <= self.rate

    def needed(self, violations: int = 0) -> int:
        """The fewest prompts if `violations` completions violate; with `importance`, at the largest weight."""
        if self.bets:
            return prompts_needed_by_betting(self.rate, self.confidence, violations, self.largest)
        return prompts_needed(self.rate, self.confidence, violations)

    def plan(self) -> str:
        """How many prompts are needed, in words."""
        none, *some = (f"{self.needed(violations):,}" for violations in SHOWN)
        goal = f"to show at most {percent(self.rate)} with {percent(self.confidence)} confidence takes {none} prompts"
        if self.method == "importance":
            return f"{goal} if none violates, and more by the weights of those that do"
        return f"{goal} if none violates, " + ", ".join(
            f"{needed} with {violations} violation{'s' * (violations > 1)}"
            for needed, violations in zip(some, SHOWN[1:], strict=True)
        )

    def __str__(self) -> str:
        bound = "betting confidence sequence" if self.bets else "Clopper–Pearson bound"
        sought = f"importance, {percent(self.seek)} seek violations; " if self.method == "importance" else ""
        return f"{sought}{bound}{', stopped when settled' if self.anytime else ''}"
