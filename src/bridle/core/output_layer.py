"""The output layer: from hidden states to the equations' logits, with the architecture's scale and soft cap.

(docs: concepts/method)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Keys of a configuration by which Cohere and Falcon-H1 multiply their logits."""


@dataclass(frozen=True)
class OutputLayer:
    """A snapshot of an output layer.

    Attributes:
        weight: [vocabulary, hidden], whole.
        bias: [vocabulary], or None.
        config: of the language model; its attributes may name a scale or a soft cap.
    """

    weight: Tensor
    bias: Tensor | None
    config: Any = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "OutputLayer":
        """The same layer with `change` applied to weight and bias, [...] -> [...]."""
        return replace(self, weight=change(self.weight), bias=None if self.bias is None else change(self.bias))

    def detach(self, copy: bool = False) -> "OutputLayer":
        """The same values without a graph, unaffected by later changes of the model's weights.

        Args:
            copy: needed for a sharded model, which reuses the memory of gathered weights.
        """
        return self.each(lambda part: part.detach().clone() if copy else part.detach())

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]"""
        return self.shape(F.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias))

    def shape(self, logits: Tensor) -> Tensor:
        """Scale and soft cap; the same tensor where there is neither. [..., vocabulary] -> [..., vocabulary]"""
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:  # Granite divides
            logits = logits / scaling
        for name in MULTIPLIERS:
            if (scale := getattr(self.config, name, None)) is not None:
                logits = logits * scale
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits
