"""Padding, positions and masks.

Masks come from lengths or labels, never from token ids, since a pad token may equal the end token.
A causal model's output at position t scores token t + 1. The losses work on aligned tensors: position t of `logits`,
`targets` and `mask` refers to the same token.
"""

import torch
from torch import Tensor

IGNORE = -100
"""The label of a token that is not trained on, as in `transformers` and `torch`."""


def length_mask(lengths: Tensor, time: int) -> Tensor:
    """True at the first `lengths[b]` of `time` positions. Shapes: [batch] -> [batch, time]."""
    return torch.arange(time, device=lengths.device) < lengths[:, None]


def pad_right(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Packs token lists into (ids [batch, time], attention mask [batch, time]), padded on the right."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    time = max(1, int(lengths.max()))
    ids = torch.tensor([sequence + [pad] * (time - len(sequence)) for sequence in sequences])
    return ids, length_mask(lengths, time).long()


def pad_left(sequences: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """As `pad_right`, padded on the left: the last position of every row is its last token. Both [batch, time]."""
    ids, mask = pad_right([sequence[::-1] for sequence in sequences], pad)
    return ids.flip(1), mask.flip(1)


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token in its own row, so that padding on the left changes nothing. [batch, time]."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def completion_positions(prompt_lengths: Tensor, time: int) -> Tensor:
    """Where, in right-padded rows of prompt + completion, the completion's tokens are predicted.

    Args:
        prompt_lengths: [batch], each at least 1.
        time: how many completion positions to list.

    Returns:
        [batch, time]: entry [b, j] is the position whose output scores completion token j of row b.
    """
    return prompt_lengths[:, None] - 1 + torch.arange(time, device=prompt_lengths.device)
