"""The frozen model p_a that the target q is built on: a snapshot of whatever the policy trains.

Only trainable parameters are kept, so with LoRA the anchor is a copy of the adapter and nothing else. A
snapshot, and not the base model with its adapter switched off: training may begin from a trained adapter.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Anchor:
    """A snapshot of a model's trainable parameters, and the means to run the model as it was then.

    Args:
        model: the policy; the snapshot is taken now, and again at each `refresh`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.weights: dict[str, Tensor] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the snapshot anew."""
        self.weights = {name: parameter.detach().clone() for name, parameter in self._trainable()}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the model is the anchor: its weights, evaluation mode, no gradients.

        Do not run it between a policy forward and its backward.
        """
        training = self.model.training
        self.model.eval()
        self._swap()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()
            self.model.train(training)

    def state_dict(self) -> dict[str, Tensor]:
        """The snapshot, for a checkpoint."""
        return self.weights

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Puts a saved snapshot back."""
        device = {name: parameter.device for name, parameter in self._trainable()}
        self.weights = {name: weights[name].to(device[name]) for name in device}

    def _swap(self) -> None:
        for name, parameter in self._trainable():
            parameter.data, self.weights[name] = self.weights[name], parameter.data

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
