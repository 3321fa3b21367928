"""Batches that remember which domain each row belongs to, and rollouts as further rows of a batch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bridle.core.tokens import IGNORE, completion_positions, length_mask, pad_right
from bridle.data import DOMAIN, Rollout

NO_DOMAIN = -1  # the domain of a rollout's row
PREFIXES = "prefixes"  # the batch's key for its `Prefixes`

Mask = NDArray[np.bool_]


@dataclass
class Prefixes:
    """The rows of a batch and the prefixes in them that regularisers look at.

    It stays on the CPU: reading it never waits for an accelerator.

    Attributes:
        domain: [batch] index of the corpus's domain; `NO_DOMAIN` for a rollout.
        regulariser: [batch] index of the regulariser a rollout was drawn for; -1 for the corpus.
        mask: [batch, time - 1] true at the prefixes before a labelled or sampled token.
        tokens: [batch] length of each row.
        learnt: [batch] whether the cross-entropy counts: not in rollouts, nor in rows of a held domain.
        is_text: [batch] whether a row is plain text, without a prompt.
    """

    domain: NDArray[np.int64]
    regulariser: NDArray[np.int64]
    mask: Mask
    tokens: NDArray[np.int64]
    learnt: NDArray[np.bool_]
    is_text: NDArray[np.bool_]

    @classmethod
    def of_corpus(
        cls, domain: Sequence[int], labels: Tensor, attention_mask: Tensor, held: Collection[int] = ()
    ) -> "Prefixes":
        """Every prefix whose next token is labelled.

        Args:
            domain: [batch].
            labels, attention_mask: [batch, time].
            held: indices of the domains that are not learnt.
        """
        indices = np.asarray(domain, dtype=np.int64)
        tokens, learnt = attention_mask.sum(-1).numpy(), ~np.isin(indices, list(held))
        mask = (labels[:, 1:] != IGNORE).numpy()  # position t predicts token t + 1
        is_text = (labels[:, :2] != IGNORE).all(-1).numpy()  # a prompt of one token has no label itself
        return cls(indices, np.full_like(indices, -1), mask, tokens, learnt, is_text)

    @property
    def trained_on(self) -> Mask:
        """[batch, time - 1] the prefixes whose next token the cross-entropy counts."""
        return self.mask & self.learnt[:, None]

    def tokens_before(self, rows: NDArray[np.bool_]) -> int:
        """The number of labelled or sampled tokens in some rows, which are [batch]."""
        return int(self.mask[rows].sum())

    def __getitem__(self, rows: slice | NDArray[np.bool_]) -> "Prefixes":
        return Prefixes(*(part[rows] for part in vars(self).values()))


@dataclass
class DomainCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which pads `input_ids` and `labels`, and the batch's `Prefixes`.

    Attributes:
        held: indices of the domains that are not learnt; their rows lose their labels.
    """

    held: Collection[int] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of some rows, tensors of [batch, time], with its `Prefixes`."""
        batch = super().torch_call(examples)
        domains = [example.get(DOMAIN, NO_DOMAIN) for example in examples]
        prefixes = Prefixes.of_corpus(domains, batch["labels"], batch["attention_mask"], self.held)
        batch["labels"][torch.from_numpy(~prefixes.learnt)] = IGNORE
        batch[PREFIXES] = prefixes
        return batch


def flat_positions(mask: Mask) -> Tensor:
    """Where the positions of a mask lie in a flattened batch, in ascending order, on the CPU.

    Args:
        mask: [batch, time - 1].

    Returns:
        [n] indices into [batch · time].
    """
    rows, positions = mask.nonzero()
    return torch.from_numpy(rows * (mask.shape[1] + 1) + positions)


def run_lengths(mask: Mask) -> NDArray[np.int64]:
    """How many true positions in a row end at each position: 0 where it is false. [batch, time] -> [batch, time]"""
    counted = mask.cumsum(-1)
    return counted - np.maximum.accumulate(np.where(mask, 0, counted), axis=-1)


def beginnings(mask: Mask, is_text: NDArray[np.bool_], longest: int) -> Tensor:
    """Where completions begin in rows.

    In a row with a prompt, at the prompt's end. In plain text, at every prefix that a rollout may start from: so what
    comes after has as many tokens of a completion before it as a rollout may have.

    Args:
        mask, is_text: of `Prefixes`.
        longest: tokens of the longest prompt.

    Returns:
        [batch, time], on the CPU, true at the last token before a completion.
    """
    begins = mask & (run_lengths(mask) <= np.where(is_text[:, None], longest, 1))
    return torch.from_numpy(np.pad(begins, ((0, 0), (0, 1))))


def reachable(mask: Mask, is_text: NDArray[np.bool_], shortest: int, longest: int, horizon: int) -> Mask:
    """The prefixes of corpus rows that a rollout can reach.

    In text, prompts have certain lengths, and rollouts continue up to the horizon. In a row with a prompt, rollouts
    start at its end.

    Args:
        mask, is_text: of `Prefixes`.
        shortest, longest: tokens of prompts.
        horizon: tokens of the longest rollout.
    """
    depth = run_lengths(mask)  # tokens of a row up to a position
    of_text = (depth >= shortest) & (depth < longest + horizon)
    return np.where(is_text[:, None], of_text, depth <= horizon)


def without_unread(inputs: dict[str, Any], kl_domains: Collection[int], joined: bool) -> dict[str, Any]:
    """Drops the rows that nothing looks at: prompts alone, and held rows of which only rollouts count.

    A forward needs a row, so that one of two tokens is left where no other is.

    Args:
        inputs: a batch of the corpus, as for `append_rollouts`.
        kl_domains: indices of the domains whose rows a regulariser looks at.
        joined: whether rollouts will be added.
    """
    prefixes = inputs[PREFIXES]
    kept = prefixes.learnt | (np.isin(prefixes.domain, list(kl_domains)) & prefixes.mask.any(-1))
    if kept.all():
        return inputs
    time = int(prefixes.tokens[kept].max(initial=1))
    if not (kept.any() or joined):
        kept[0], time = True, min(2, inputs["input_ids"].shape[1])
    return _cut(inputs, kept, time)


def append_rollouts(
    inputs: dict[str, Any], rollouts: Sequence[Rollout], regulariser: int, pad: int, multiple: int = 1
) -> dict[str, Any]:
    """Adds rollouts as rows that the cross-entropy ignores, so that one forward can serve corpus and rollouts.

    Args:
        inputs: `input_ids`, `attention_mask`, `labels`, all [batch, time], and their `Prefixes`.
        rollouts: rows to add, at least one.
        regulariser: index of the regulariser they were drawn for.
        pad: token id that fills rows.
        multiple: the rows' length is padded to a multiple of it.
    """
    ids, attention_mask, mask = rollout_rows(rollouts, pad)
    time = ceil(max(inputs["input_ids"].shape[1], ids.shape[1]) / multiple) * multiple
    added = {
        "input_ids": (ids, pad),
        "attention_mask": (attention_mask, 0),
        "labels": (torch.full_like(ids, IGNORE), IGNORE),
    }
    joined = {key: _stack(inputs[key], new, time, fill) for key, (new, fill) in added.items()}
    known, new = inputs[PREFIXES], np.ones(len(ids), dtype=np.int64)
    masks = (np.pad(part, ((0, 0), (0, time - 1 - part.shape[1]))) for part in (known.mask, mask.numpy()))
    prefixes = Prefixes(
        domain=np.concatenate([known.domain, NO_DOMAIN * new]),
        regulariser=np.concatenate([known.regulariser, regulariser * new]),
        mask=np.concatenate(list(masks)),
        tokens=np.concatenate([known.tokens, attention_mask.sum(-1).numpy()]),
        learnt=np.concatenate([known.learnt, np.zeros(len(ids), dtype=bool)]),
        is_text=np.concatenate([known.is_text, np.zeros(len(ids), dtype=bool)]),
    )
    return {**inputs, **joined, PREFIXES: prefixes}


def worth_a_forward(device: torch.device) -> int:
    """Positions of padding that a second forward and backward must spare.

    It reads all weights and starts every kernel once more. The CPU's number is measured (docs: benchmarks), the other
    estimated.
    """
    return 128 if device.type == "cpu" else 2048


def apart(inputs: dict[str, Any], multiple: int = 1) -> list[dict[str, Any]]:
    """Corpus and rollouts as two batches, each as long as its longest row, if that spares enough padding.

    Args:
        inputs: from `append_rollouts`; a batch without `Prefixes` stays as it is.
        multiple: the rows' length is padded to a multiple of it.
    """
    prefixes = inputs.get(PREFIXES)
    if prefixes is None:
        return [inputs]
    corpus = int((prefixes.regulariser < 0).sum())
    parts = [
        _cut(inputs, rows, ceil(int(prefixes.tokens[rows].max()) / multiple) * multiple)
        for rows in (slice(corpus), slice(corpus, None))
        if len(prefixes.tokens[rows])
    ]
    ids = inputs["input_ids"]
    spared = ids.numel() - sum(part["input_ids"].numel() for part in parts)
    return parts if len(parts) > 1 and spared >= worth_a_forward(ids.device) else [inputs]


def _cut(inputs: dict[str, Any], rows: slice | NDArray[np.bool_], time: int) -> dict[str, Any]:
    """Some rows of a batch, and of them the first `time` tokens."""
    prefixes = inputs[PREFIXES][rows]
    cut = {PREFIXES: replace(prefixes, mask=prefixes.mask[:, : time - 1])}
    for key in ("input_ids", "attention_mask", "labels"):
        chosen = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(inputs[key].device)
        cut[key] = inputs[key][chosen, :time]
    return {**inputs, **cut}


def rollout_rows(rollouts: Sequence[Rollout], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rollouts as rows.

    Args:
        rollouts: at least one.
        pad: token id that fills rows.

    Returns:
        input_ids and attention_mask, [batch, time]; and [batch, time - 1], true at the prefixes before a sampled token.
    """
    ids, attention_mask = pad_right([rollout.prompt_ids + rollout.completion_ids for rollout in rollouts], pad)
    lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
    starts = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts])
    mask = torch.zeros(len(rollouts), ids.shape[1], dtype=torch.bool)
    inside = length_mask(lengths, int(lengths.max()))
    at = completion_positions(starts, inside.shape[1])
    mask[torch.arange(len(rollouts))[:, None].expand_as(at)[inside], at[inside]] = True
    return ids, attention_mask, mask[:, :-1]


def _stack(above: Tensor, below: Tensor, time: int, fill: int | bool) -> Tensor:
    """Stacks two batches of rows, padded on the right to the length `time`."""
    parts = [
        torch.nn.functional.pad(part, (0, time - part.shape[1]), value=fill) for part in (above, below.to(above.device))
    ]
    return torch.cat(parts)
