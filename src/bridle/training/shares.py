"""A share of the outputs in place of each output: the target of distributional control.

With φ(y) = 1 where an output complies and 0 elsewhere, the distribution that is closest to p_a among those with
E[φ] = m is q(y) ∝ p_a(y)·exp(w·φ(y)) (Khalifa et al., "A distributional approach to controlled text generation", ICLR
2021), and of a φ that is 0 or 1

    w = logit(m) − logit(E_{p_a}[φ]).

That is a constraint of degrees, C(y) = exp(w·φ(y)) / max(1, e^w), so that R, fitted on these degrees, breaks it down to
tokens as any other. Each round measures E_{p_a}[φ] on plain rollouts; m is the nearest share that is allowed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from bridle.constraints.options import Probability
from bridle.data import Rollout
from bridle.errors import UserError
from bridle.utils.settings import check_fields


@dataclass
class ShareOptions:
    """The share of outputs that should comply.

    Attributes:
        at_least: the lowest share.
        at_most: the highest share.

    Raises:
        UserError: a value out of range, an empty range, or one that allows any share; it begins with the field.
    """

    at_least: Probability = 0.0
    at_most: Probability = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.at_least > self.at_most:
            raise UserError(f"at_least: {self.at_least:g} is above at_most, {self.at_most:g}")
        if (self.at_least, self.at_most) == (0, 1):
            raise UserError("at_least: any share is allowed; set at_least, at_most or both")
        if self.at_least == 1 or self.at_most == 0:
            raise UserError("at_least: that all outputs comply, or none, is a constraint; leave `share` out")


def degree(tilt: float, complies: bool) -> float:
    """C of an output under the tilt w, 1 for the kind that should be more frequent."""
    return exp(min(tilt, 0.0)) if complies else exp(min(-tilt, 0.0))


def tilt_of(options: ShareOptions | None, rollouts: Sequence[Rollout], before: float | None = None) -> float | None:
    """The tilt w that brings the plain rollouts' share of complying outputs into the range; None without a share.

    It is 0 where the share is allowed as it is, and that of `before`, or 0, where no rollout counts.

    It is exact for one prompt. Where prompts differ in their share, q falls short of the bound, since log-odds do not
    average; the next round measures what is left.

    A rollout without a score, or one that sought violations, does not count.
    """
    if options is None:
        return None
    known = [rollout.complies for rollout in rollouts if rollout.complies is not None and not rollout.sought]
    if not known:
        return before or 0.0
    share = (sum(known) + 0.5) / (len(known) + 1)  # above 0 where none complies, and below 1 where all do
    nearest = min(max(share, options.at_least), options.at_most)
    return _logit(nearest) - _logit(share)


def _logit(share: float) -> float:
    return log(share / (1 - share))
