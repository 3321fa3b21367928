"""All regularisers of a run: their prefixes, their rollouts in the batch, their terms of the loss."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bridle.core.loss import Divergence
from bridle.data import Rollout
from bridle.models.sharding import is_sharded
from bridle.training.batches import Mask, Prefixes
from bridle.training.regulariser import DomainRegulariser
from bridle.training.running_means import RunningMeans
from bridle.utils.distributed import gathered, rank, world

Riders = Sequence[tuple[DomainRegulariser, list[Rollout]]]
"""The rollouts of one micro-batch, by regulariser."""


class RegulariserSet(Sequence[DomainRegulariser]):
    """The regularisers of a run, in order.

    Args:
        regularisers: of one policy.
        domains: names of the corpus's domains, in the order of their indices.
        means: collects the share of prefixes that no rollout can reach.
    """

    def __init__(self, regularisers: Sequence[DomainRegulariser], domains: Sequence[str], means: RunningMeans):
        self.regularisers, self.domains, self.means = list(regularisers), list(domains), means
        self._sampled: dict[int, int] = {}  # sampled tokens in the update, on all processes, by regulariser

    def __len__(self) -> int:
        return len(self.regularisers)

    def __getitem__(self, index):
        return self.regularisers[index]

    def corpus_rows(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> Mask:
        """Which rows of a batch are of a regulariser's domains. [batch]"""
        return np.isin(prefixes.domain, [self.domains.index(name) for name in regulariser.corpus])

    def share_rollouts(self, batches: Sequence[Prefixes]) -> tuple[list[Riders], int]:
        """Rollouts for the micro-batches of an update: one for each row of a regulariser's domains.

        The processes exchange their counts once per update, and take rollouts in the order of one global batch.

        Returns:
            The rollouts of each micro-batch; and the update's tokens on all processes, including theirs.
        """
        looking = [one for one in self if one.active and one.options.kl_on != "corpus"]
        rows = [[int(self.corpus_rows(one, batch).sum()) for batch in batches] for one in looking]
        everyone = gathered((rows, sum(int(batch.tokens.sum()) for batch in batches)))
        tokens = sum(of_process for _, of_process in everyone)
        shares = []
        for place, regulariser in enumerate(looking):
            taken, self._sampled[regulariser.index] = regulariser.take([counts[place] for counts, _ in everyone])
            tokens += sum(len(r.prompt_ids) + len(r.completion_ids) for part in taken for r in part)
            shares.append(taken[rank() :: world()])
        riders: list[Riders] = [
            [(one, share[index]) for one, share in zip(looking, shares, strict=True) if share[index]]
            for index in range(len(batches))
        ]
        return riders, tokens

    def masks(self, prefixes: Prefixes) -> list[Mask]:
        """The prefixes of a batch that each regulariser uses. [batch, time - 1] each"""
        return [self._mask(regulariser, prefixes) for regulariser in self]

    def _mask(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> Mask:
        if not regulariser.active:
            return np.zeros_like(prefixes.mask)
        mask = prefixes.mask & (prefixes.regulariser == regulariser.index)[:, None]
        if regulariser.options.kl_on == "rollouts":
            return mask
        corpus = reached = prefixes.mask & self.corpus_rows(regulariser, prefixes)[:, None]
        if regulariser.config.targets == "computed":  # precomputed targets are built before the rollouts are known
            reached = corpus & regulariser.reaches(corpus)  # R was not fitted elsewhere
        unreached = torch.tensor(corpus.sum() - reached.sum(), device=regulariser.config.device)
        self.means.add(f"kl_unreached/{regulariser.name}", unreached, corpus.sum())
        return mask | reached

    def divergences(
        self,
        hidden_states: Tensor,
        inputs: dict[str, Tensor],
        prefixes: Prefixes,
        masks: Sequence[Mask],
        seen: Mask,
        divisor: Tensor,
    ) -> Iterator[Divergence]:
        """λ_d·KL(q_d ‖ p) of each regulariser with prefixes in a batch (EMNLP 2024).

        Those on the corpus are divided by the corpus's tokens, as the cross-entropy is, since the optimum
        (p_data + λ·q)/(1 + λ) needs one divisor for both; those on rollouts by their own tokens, so that λ has
        the same effect for any length of rows and rollouts.

        Args:
            hidden_states: [batch, time, hidden] of the policy, without a graph.
            inputs: `input_ids` and `attention_mask`, [batch, time].
            prefixes: of the batch.
            masks: [batch, time - 1] each, from `masks`.
            seen: [batch, time - 1], true at the positions whose logits are computed.
            divisor: [], the corpus's tokens in the whole update, by which the whole loss is divided.
        """
        place = seen.cumsum().reshape(seen.shape) - 1  # of each position among those seen
        for regulariser, mask in zip(self, masks, strict=True):
            # A sharded anchor runs on all processes or on none.
            if not mask.any() and not (regulariser.active and is_sharded(regulariser.model)):
                continue
            rows = hidden_states, inputs["input_ids"], inputs["attention_mask"]
            target = regulariser.target(*rows, mask, prefixes.mask)
            sampled = np.broadcast_to((prefixes.regulariser >= 0)[:, None], mask.shape)[mask]
            on_rollouts = divisor / self._sampled.get(regulariser.index, int(sampled.sum()) or 1)
            weights = torch.where(torch.from_numpy(sampled).to(divisor.device), on_rollouts, 1.0)
            weights = weights.float() * regulariser.weight
            yield Divergence(regulariser.name, torch.from_numpy(place[mask]), weights, target)
