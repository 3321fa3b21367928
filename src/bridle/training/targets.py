"""q at the prefixes of a batch, built a few prefixes at a time, so that it never exists for all of them at once."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from bridle.core.target import SparseTarget, log_target
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.hidden import OutputLayer


@dataclass(frozen=True)
class FrozenAnchor:
    """What a frozen p_a says after the prefixes of a batch.

    Attributes:
        states: [prefixes, hidden] of the anchor.
        layer: its output layer, detached.
    """

    states: Tensor
    layer: OutputLayer


@dataclass(frozen=True)
class Target:
    """q ∝ p_a·R^η at the prefixes of a batch.

    Attributes:
        auxiliary: R; None is retention, R = 1.
        features: [prefixes, hidden], what R's trunk reads.
        power: η.
        anchor: p_a, where it is frozen; None for the policy itself.
    """

    auxiliary: AuxiliaryModel | None
    features: Tensor
    power: float
    anchor: FrozenAnchor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(prefixes, vocabulary) of a target on a frozen anchor."""
        assert self.anchor is not None
        return len(self.anchor.states), len(self.anchor.layer.weight)

    def anchor_logits(self, which: slice, policy_logits: Tensor | None = None) -> Tensor:
        """Of some of the prefixes. [some, vocabulary]"""
        if self.anchor is not None:
            return self.anchor.layer(self.anchor.states[which])
        assert policy_logits is not None, "a live anchor is the policy"
        return policy_logits

    def log_q(self, which: slice, anchor_logits: Tensor) -> Tensor:
        """Of some of the prefixes. [some, vocabulary] -> [some, vocabulary]"""
        if self.auxiliary is None:
            return F.log_softmax(anchor_logits.float(), dim=-1)
        return log_target(anchor_logits, self.auxiliary(self.features[which]), self.power)

    def __call__(self, which: slice, policy_logits: Tensor) -> Tensor:
        """log q of some of the prefixes, given the policy's logits there. [some, vocabulary] -> [some, vocabulary]"""
        return self.log_q(which, self.anchor_logits(which, policy_logits))


@dataclass(frozen=True)
class ShippedTarget:
    """q made ahead, kept as some tokens and the rest.

    Attributes:
        kept: over [prefixes, k] tokens.
    """

    kept: SparseTarget

    def __call__(self, which: slice, policy_logits: Tensor) -> Tensor:
        """log q of some of the prefixes, given the policy's logits there. [some, vocabulary] -> [some, vocabulary]"""
        return self.kept[which].spread(policy_logits)
