"""λ by dual ascent: a highest violation takes the place of a fixed λ, and each round's measurement moves λ.

    log λ ← log λ + η·log(v̂ / a),  within [least, most]

v̂ is the violation of a round's plain rollouts, and a the one that λ is steered to: a share of ε, the highest that is
allowed, or with a confidence a rate at which most samples show ε. The constraint v ≤ a is taken as log v ≤ log a: on
this scale a step depends on the ratio alone, so that one η fits targets of 10% and of 0.1%.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, floor, log
from typing import Annotated

from pydantic import Field, PositiveFloat
from scipy.special import betaincinv

from bridle.constraints.options import Probability
from bridle.data import Rollout
from bridle.errors import UserError
from bridle.utils.settings import check_fields

Fraction = Annotated[float, Field(ge=0, lt=1)]
Confidence = Annotated[float, Field(gt=0.5, lt=1)]

LARGEST_ERROR = log(4)
"""The largest |log(v̂/a)| of a step: a model that is far from its target would else move λ by orders of magnitude."""

VIOLATION_OF_NONE = 0.5
"""Added to a round's violations, and 1 to its rollouts: where none violates, the rate's logarithm stays finite."""


@dataclass
class TargetOptions:
    """The highest violation that a regulariser allows: one of `rate`, `mean` and `base`. λ follows from it.

    Attributes:
        rate: highest share of outputs that violate.
        mean: lowest mean score, from 0 (violates) to 1 (complies).
        base: highest violation rate as a multiple of the base model's, which the first round measures before any
            update: 1 for at most the base's rate.
        confidence: the confidence with which a round's rollouts must show that the violation is at most `rate`
            (a one-sided Clopper–Pearson bound).
        margin: share of ε that is left as room: λ is steered to (1 − margin)·ε. With a confidence, the probability
            that the rollouts of a model at the rate aimed at do not show `rate`.
        step: η, the change of log λ for a violation that is e times the one aimed at. A round changes λ by a factor of
            at most 4^η, without momentum.
        momentum: share of the last change of log λ that is added to the next one in the same direction.
        least: lower bound of λ.
        most: upper bound of λ.

    Raises:
        UserError: a value of the wrong kind or outside its range, or not exactly one of `rate`, `mean` and `base`; the
            message begins with the field.
    """

    rate: Probability | None = None
    mean: Probability | None = None
    base: PositiveFloat | None = None
    confidence: Confidence | None = None
    margin: Fraction = 0.1
    step: PositiveFloat = 1.0
    momentum: Fraction = 0.0
    least: PositiveFloat = 0.1
    most: PositiveFloat = 100.0

    def __post_init__(self) -> None:
        check_fields(self)
        given = [name for name in ("rate", "mean", "base") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"{' and '.join(given) or 'rate'}: a target has exactly one of rate, mean and base")
        if self.rate == 0:
            raise UserError("rate: must be above 0; no number of samples shows that nothing violates")
        if self.rate == 1 and self.confidence is not None:
            raise UserError("rate: must be below 1 with a confidence; any model meets 1")
        if self.mean == 1:
            raise UserError("mean: must be below 1; no number of samples shows that nothing violates")
        if self.confidence is not None and self.margin == 0:
            raise UserError("margin: must be above 0 with a confidence: any model may miss it by chance")
        if self.confidence is not None and self.rate is None:
            raise UserError("confidence: is of a rate, which counts; leave it out, or set rate")
        if self.least > self.most:
            raise UserError(f"least: {self.least:g} is above most, {self.most:g}")

    def violations(self, rollouts: Sequence[Rollout]) -> list[float]:
        """What each plain rollout with a score adds to the violation: 0 or 1 for a rate, 1 − score for a mean."""
        scores = [(r.value, r.complies) for r in rollouts if r.value is not None and not r.sought]
        return [1 - value if self.mean is not None else float(not complies) for value, complies in scores]

    def limit(self, base: float | None) -> float:
        """ε, given the base's violation rate.

        Raises:
            UserError: it depends on the base's rate, which is None.
        """
        if self.rate is not None:
            return self.rate
        if self.mean is not None:
            return 1 - self.mean
        assert self.base is not None
        if base is None:
            raise UserError(
                "target.base: the first round did not measure the base's rate; start a new run, or set rate"
            )
        return min(1.0, self.base * base)

    def aim(self, limit: float, samples: int) -> float:
        """The violation that λ is steered to: below ε by the margin, or low enough for `samples` to show ε."""
        if self.confidence is None:
            return limit * (1 - self.margin)
        counts = range(floor(limit * samples) + 1)  # the bound rises with the count
        shown = max(0, bisect_right(counts, limit, key=lambda count: self.bound(count, samples)) - 1)
        # The rate at which at most `shown` of the samples violate with probability 1 − margin.
        return float(betaincinv(shown + 1, samples - shown, self.margin))

    def can_fall(self, limit: float, plain: int, samples: int) -> bool:
        """Whether λ falls after `plain` rollouts of which none violates, if `samples` samples will have to show ε."""
        return VIOLATION_OF_NONE / (plain + 1) < self.aim(limit, samples)

    def bound(self, violations: int, samples: int) -> float:
        """The one-sided Clopper–Pearson upper bound (Biometrika 1934) on a rate, at `confidence`."""
        assert self.confidence is not None
        return float(betaincinv(violations + 1, samples - violations, self.confidence)) if violations < samples else 1.0


@dataclass(frozen=True)
class DualState:
    """λ and what its next step depends on.

    Attributes:
        weight: λ.
        change: of log λ in the last step.
        steps: taken so far.
        limit: ε; None until the first round has been measured.
        since: first round whose updates λ acted in; None before.
        base: the base model's violation rate, if the first round measured it.
        ceiling: highest λ that is still allowed, once the policy has lost its entropy; None before.
        ceiling_since: first round whose updates the ceiling acts in; None before.
    """

    weight: float
    change: float = 0.0
    steps: int = 0
    limit: float | None = None
    since: int | None = None
    base: float | None = None
    ceiling: float | None = None
    ceiling_since: int | None = None

    @property
    def last_weight(self) -> float:
        """λ before the last step."""
        return self.weight * exp(-self.change)

    def lowered(self, options: TargetOptions, acts_in: int) -> "DualState":
        """The state after the policy lost its entropy: λ is at most half of the last one, from round `acts_in` on."""
        ceiling = max(options.least, self.last_weight / 2)
        weight = min(self.weight, ceiling)
        return replace(self, weight=weight, change=0.0, ceiling=ceiling, ceiling_since=acts_in)

    def measured(
        self,
        options: TargetOptions,
        round_index: int,
        violations: Sequence[float],
        acts_in: int | None,
        shown_on: int | None = None,
    ) -> "DualState":
        """The state after a round's measurement.

        λ moves only if it acted on the policy that was measured: an error that λ could not change would wind it up.

        Args:
            options: the target.
            round_index: the round, from 1, at whose start the policy was sampled.
            violations: as from `TargetOptions.violations`.
            acts_in: the round whose updates come next; None if λ does not act in them.
            shown_on: on how many samples the trained model will have to show ε; as many as `violations` if not given.

        Raises:
            UserError: as `TargetOptions.limit`.
        """
        state = self if violations else replace(self, change=0.0)
        if violations:
            violation = (sum(violations) + VIOLATION_OF_NONE) / (len(violations) + 1)  # above 0 where nothing violates
            if round_index == 1:
                state = replace(state, base=violation)
            state = replace(state, limit=options.limit(state.base))
            if state.limit is not None and state.since is not None and state.since < round_index:
                stepped = state.stepped(options, violation, shown_on or len(violations))
                # With few samples v̂ can exceed a low a even where nothing violates; λ then stays.
                rises = stepped.weight > state.weight and not any(violations)
                state = replace(state, change=0.0, steps=stepped.steps) if rises else stepped
        return replace(state, since=acts_in) if state.since is None else state

    def stepped(self, options: TargetOptions, violation: float, samples: int = 1) -> "DualState":
        """The state after one step of dual ascent for a violation above 0; `samples` will have to show ε.

        Against windup, momentum never acts against the error, and at a bound only the change that took place is kept.
        """
        assert self.limit is not None
        error = log(violation / options.aim(self.limit, samples))
        error = max(-LARGEST_ERROR, min(LARGEST_ERROR, error))
        momentum = options.momentum * self.change if self.change * error > 0 else 0.0
        most = options.most if self.ceiling is None else min(options.most, self.ceiling)
        change = min(options.step * error + momentum, log(most / self.weight) + 1)  # more would overflow
        weight = max(options.least, min(most, self.weight * exp(change)))
        return replace(self, weight=weight, change=log(weight / self.weight), steps=self.steps + 1)
