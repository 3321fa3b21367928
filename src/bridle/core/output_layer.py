"""The output layer: a linear map from hidden states to logits, and what the architecture does to its result.

Its logits are what the equations are about. (docs: concepts/method)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class OutputLayer:
    """An output layer as it stands.

    Attributes:
        weight: [vocabulary, hidden], whole.
        bias: [vocabulary], or None.
        config: of the language model; an object whose attributes name a scale or a soft cap.
    """

    weight: Tensor
    bias: Tensor | None
    config: Any = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "OutputLayer":
        """The same layer with `change` applied to weight and bias, [...] -> [...]."""
        return replace(self, weight=change(self.weight), bias=None if self.bias is None else change(self.bias))

    def detach(self, copy: bool = False) -> "OutputLayer":
        """The same values without a graph; they stay when the model's weights are exchanged.

        Args:
            copy: a sharded model needs it, since the memory of gathered weights is used again.
        """
        return self.each(lambda part: part.detach().clone() if copy else part.detach())

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]"""
        return self.shape(F.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias))

    def shape(self, logits: Tensor) -> Tensor:
        """Scale and soft cap; the same tensor where there is neither. [..., vocabulary] -> [..., vocabulary]"""
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:  # Granite divides
            logits = logits / scaling
        if (scale := getattr(self.config, "logit_scale", None)) is not None:  # Cohere multiplies
            logits = logits * scale
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits
