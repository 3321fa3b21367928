"""Batches that remember which domain each row belongs to, and rollouts as further rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bridle.core.tokens import IGNORE, completion_positions, length_mask, pad_right, shift
from bridle.data import DOMAIN, Rollout

NO_DOMAIN = -1  # the domain of a row that is not of the corpus


@dataclass
class DomainCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which pads `input_ids` and `labels`, and the `domain` of each row: [batch]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:  # noqa: D102
        batch = super().torch_call(examples)
        batch[DOMAIN] = torch.tensor([example.get(DOMAIN, NO_DOMAIN) for example in examples])
        return batch


@dataclass
class Prefixes:
    """The rows of a batch and the prefixes in them that regularisers look at.

    Attributes:
        domain: [batch] index of the corpus's domain; `NO_DOMAIN` for a rollout.
        regulariser: [batch] index of the regulariser a rollout was drawn for; -1 for the corpus.
        mask: [batch, time - 1] true at the prefixes before a trained-on or sampled token.
    """

    domain: Tensor
    regulariser: Tensor
    mask: Tensor

    @classmethod
    def of_corpus(cls, domain: Tensor, labels: Tensor) -> "Prefixes":
        """Every prefix whose next token is trained on. Shapes: [batch], [batch, time]."""
        return cls(domain, torch.full_like(domain, -1), shift(labels)[1])


def append_rollouts(
    inputs: dict[str, Tensor], prefixes: Prefixes, rollouts: Sequence[Rollout], regulariser: int, pad: int
) -> tuple[dict[str, Tensor], Prefixes]:
    """Adds rollouts as rows that the cross-entropy ignores, so that one forward serves corpus and rollouts.

    Args:
        inputs: `input_ids`, `attention_mask`, `labels`, all [batch, time].
        prefixes: of the same batch.
        rollouts: rows to add, at least one.
        regulariser: index of the regulariser they were drawn for.
        pad: token id that fills rows.
    """
    ids, attention_mask, mask = rollout_rows(rollouts, pad)
    added = {
        "input_ids": (ids, pad),
        "attention_mask": (attention_mask, 0),
        "labels": (torch.full_like(ids, IGNORE), IGNORE),
    }
    joined = {key: _stack(inputs[key], new, fill) for key, (new, fill) in added.items()}
    device = prefixes.domain.device
    full = torch.full((len(ids),), NO_DOMAIN, device=device)
    return {**inputs, **joined}, Prefixes(
        domain=torch.cat([prefixes.domain, full]),
        regulariser=torch.cat([prefixes.regulariser, torch.full_like(full, regulariser)]),
        mask=_stack(prefixes.mask, mask, False),
    )


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


def _stack(above: Tensor, below: Tensor, fill: int | bool) -> Tensor:
    """Stacks two batches of rows, the shorter one padded on the right to the other's length."""
    time = max(above.shape[1], below.shape[1])
    parts = [
        torch.nn.functional.pad(part, (0, time - part.shape[1]), value=fill) for part in (above, below.to(above.device))
    ]
    return torch.cat(parts)
