"""The policy's forward, the same for sampling, reading, anchors and the update.

Dropout is off, as in TRL's RLOO and GRPO: with it, the trained policy would differ from the sampled one.
Mixed precision is that of the update. Rows are padded on the right, so positions count from the row's start; only
sampling pads on the left, where `generate` derives positions from the attention mask.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from bridle.models.hidden import capture_hidden_states, without_logits

CACHE = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"
"""The name of keys and values in arguments and outputs of a model: `cache` since transformers 5.24."""


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: of layers, of attention and of whole layers.

    `transformers` keeps some of them as plain attributes of a module, such as `attention_dropout`.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


def mixed_precision(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager:
    """Inside the block matrix products are computed in `dtype`; None keeps the weights' own."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype, enabled=dtype is not None)


def policy_forward(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, dtype: torch.dtype | None = None, **inputs: Any
) -> Tensor:
    """The hidden states that enter the output layer, without the logits: [batch, time, hidden].

    Args:
        model: a causal language model, wrapped by `peft` or `accelerate` or not. Its mode only decides whether
            activations are checkpointed.
        input_ids, attention_mask: [batch, time], padded on the right.
        dtype: of mixed precision; None where there is none, or the model sets its own.
        inputs: further arguments of the model.
    """
    with mixed_precision(model, dtype), capture_hidden_states(model) as hidden, without_logits(model):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    assert hidden.last is not None
    return hidden.last
