"""All regularisers of a run: their prefixes, their rollouts in the batch, their terms of the loss."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridle.core.loss import Divergence
from bridle.data import Rollout
from bridle.models.sharding import is_sharded
from bridle.training.batches import Mask, Prefixes
from bridle.training.regulariser import DomainRegulariser
from bridle.training.running_means import RunningMeans
from bridle.utils.distributed import all_gather, rank, world_size

RolloutBatch = Sequence[tuple[DomainRegulariser, list[Rollout]]]
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
        kl_domains = {name for one in self if one.options.kl_on != "rollouts" for name in one.corpus}
        self.kl_domains = [self.domains.index(name) for name in kl_domains]  # whose rows count, not rollouts alone
        # In the update, on all processes, by regulariser:
        self._sampled: dict[int, int] = {}  # tokens of its rollouts
        self._held: dict[int, int] = {}  # tokens of its domains that are held and not learnt

    def __len__(self) -> int:
        return len(self.regularisers)

    def __getitem__(self, index):
        return self.regularisers[index]

    def corpus_rows(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> Mask:
        """Which rows of a batch are of a regulariser's domains. [batch]"""
        return np.isin(prefixes.domain, [self.domains.index(name) for name in regulariser.corpus])

    def share_rollouts(self, batches: Sequence[Prefixes]) -> tuple[list[RolloutBatch], int]:
        """Rollouts for the micro-batches of an update: one for each row of a regulariser's domains.

        The processes exchange their counts once per update, and take rollouts in the order of one global batch.

        Returns:
            The rollouts of each micro-batch; and the update's tokens on all processes, including theirs.
        """
        looking = [one for one in self if one.active and one.options.kl_on != "corpus"]
        rows = [[int(self.corpus_rows(one, batch).sum()) for batch in batches] for one in looking]
        held = {one.index: sum(self._held_tokens(one, batch) for batch in batches) for one in self}
        of_processes = all_gather((rows, held, sum(int(batch.tokens.sum()) for batch in batches)))
        all_rows, all_held, all_tokens = zip(*of_processes, strict=True)
        self._held = {index: sum(counts[index] for counts in all_held) for index in held}
        tokens = sum(all_tokens)
        shares = []
        for place, regulariser in enumerate(looking):
            taken, self._sampled[regulariser.index] = regulariser.take([counts[place] for counts in all_rows])
            tokens += sum(len(r.prompt_ids) + len(r.completion_ids) for part in taken for r in part)
            shares.append(taken[rank() :: world_size()])
        rollout_batches: list[RolloutBatch] = [
            [(one, share[index]) for one, share in zip(looking, shares, strict=True) if share[index]]
            for index in range(len(batches))
        ]
        return rollout_batches, tokens

    def _held_tokens(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> int:
        return prefixes.tokens_before(~prefixes.learnt & self.corpus_rows(regulariser, prefixes))

    def masks(self, prefixes: Prefixes) -> list[Mask]:
        """The prefixes of a batch that each regulariser uses. [batch, time - 1] each"""
        return [self._mask(regulariser, prefixes) for regulariser in self]

    def _mask(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> Mask:
        if not regulariser.active:
            return np.zeros_like(prefixes.mask)
        mask = prefixes.mask & (prefixes.regulariser == regulariser.index)[:, None]
        if regulariser.options.kl_on == "rollouts":
            return mask
        corpus = prefixes.mask & self.corpus_rows(regulariser, prefixes)[:, None]
        reached = corpus & regulariser.reaches(prefixes)  # R was not fitted elsewhere
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

        Those on rows that are learnt are divided by the learnt tokens, as the cross-entropy is, since the optimum
        (p_data + λ·q)/(1 + λ) needs one divisor for both; those on held rows and on rollouts by their own tokens, so
        that λ has the same effect for any length of them, in the updates that have some.

        Args:
            hidden_states: [batch, time, hidden] of the policy, without a graph.
            inputs: `input_ids` and `attention_mask`, [batch, time].
            prefixes: of the batch.
            masks: [batch, time - 1] each, from `masks`.
            seen: [batch, time - 1], true at the positions whose logits are computed.
            divisor: [], the learnt tokens in the whole update, by which the whole loss is divided.
        """
        place = seen.cumsum().reshape(seen.shape) - 1  # of each position among those seen
        for regulariser, mask in zip(self, masks, strict=True):
            # A sharded anchor runs on all processes or on none.
            if not mask.any() and not (regulariser.active and is_sharded(regulariser.model)):
                continue
            rows = hidden_states, inputs["input_ids"], inputs["attention_mask"]
            target = regulariser.target(*rows, mask, regulariser.begins(prefixes))
            tokens = np.broadcast_to(self._own_tokens(regulariser, prefixes)[:, None], mask.shape)[mask]
            own = torch.from_numpy(tokens).to(divisor.device)
            weights = torch.where(own > 0, divisor / own.clamp(min=1), 1.0).float() * regulariser.weight
            yield Divergence(regulariser.name, torch.from_numpy(place[mask]), weights, target)

    def _own_tokens(self, regulariser: DomainRegulariser, prefixes: Prefixes) -> NDArray[np.int64]:
        """The tokens in the update of a row's kind, by which its KL is divided; 0 if it is learnt. [batch]"""
        index, sampled = regulariser.index, prefixes.regulariser >= 0
        of_rollouts = self._sampled.get(index, prefixes.tokens_before(prefixes.regulariser == index))
        of_held = self._held.get(index, self._held_tokens(regulariser, prefixes))
        return np.where(prefixes.learnt, 0, np.where(sampled, of_rollouts, of_held))
