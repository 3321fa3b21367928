"""Retention: a regulariser without a constraint, R = 1, whose q is the model before tuning, p_0."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bridle.models.anchor import Anchor
from bridle.training.batches import Mask, Prefixes
from bridle.training.measures import measure_samples
from bridle.training.regulariser import DomainRegulariser
from bridle.utils.timing import timed


@dataclass
class Retention(DomainRegulariser):
    """λ·KL(p_0 ‖ p_θ) on rows of the corpus, on rollouts of p_0 or of the policy, or on both kinds."""

    def __post_init__(self) -> None:
        self.anchor = Anchor(self.model)

    @property
    def active(self) -> bool:
        """Whether the term is on: λ is not 0, and there are the rollouts that it looks at."""
        return self.options.weight > 0 and (self.has_begun or not self.options.samples)

    @property
    def settled(self) -> bool:
        """Whether neither its rollouts nor q will change."""
        return self.options.rollouts_of == "anchor" and (self.has_begun or not self.options.samples)

    def update(self, round_index: int) -> dict[str, Any]:
        """Draws the round's rollouts, which nothing scores; those of p_0 once for all rounds.

        Args:
            round_index: 1 for the first round.

        Returns:
            The round's metrics; see `docs/metrics.md`.
        """
        if self.settled or self.options.weight == 0:
            return {}
        self.targets = None
        seconds: dict[str, float] = {}
        with self._sampled_model(self.options.rollouts_of == "anchor"), timed(seconds, "seconds_sampling"):
            self.rollouts, _ = self.draw(round_index, None)
        self.rollout_cursor, self.has_begun = 0, True
        return measure_samples(self.rollouts) | seconds

    def reaches(self, prefixes: Prefixes) -> Mask:
        """All of the prefixes: there is no R that would have to be fitted there."""
        return np.ones_like(prefixes.mask)
