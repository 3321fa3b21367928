"""The frozen model p_a that the target q is built on: a snapshot of the policy's trainable parameters.

With LoRA that is a copy of the adapter. The base model with its adapter disabled would not do, because training may
start from a trained adapter. Where the policy is sharded (FSDP2), each process keeps and exchanges its own shards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bridle.models.hidden import evaluation_mode
from bridle.models.sharding import in_shards, is_sharded, local, reshard, shard_like, trainable, whole


class Anchor:
    """A snapshot of the policy's trainable parameters, taken now and at each `refresh`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.weights: dict[str, Tensor] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes a new snapshot, one parameter after another, so that two never exist."""
        with in_shards(self.model):
            for name, parameter in trainable(self.model):
                self.weights[name] = parameter.detach().clone()

    def to(self, device: torch.device | str) -> None:
        """Moves the snapshot, as the model is moved."""
        for name, weight in self.weights.items():
            self.weights[name] = weight.to(device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the model is the anchor: its weights, evaluation mode, no gradients.

        A pending backward of the policy is not affected.
        """
        with evaluation_mode(self.model), in_shards(self.model):
            self._swap()
            try:
                with torch.no_grad():
                    yield
            finally:
                self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The snapshot for a checkpoint, gathered from its shards on every process."""
        return {name: whole(weight) for name, weight in self.weights.items()}

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Restores a saved snapshot."""
        with in_shards(self.model):
            for name, parameter in trainable(self.model):
                self.weights[name] = shard_like(weights[name], parameter)

    def _swap(self) -> None:
        """Exchanges the model's parameters and the snapshot."""
        reshard(self.model)
        for name, parameter in trainable(self.model):
            if is_sharded(self.model):  # in place, because FSDP2 gathers from the memory that it allocated
                self.weights[name] = shard_like(self.weights[name], parameter)
                policy, snapshot = local(parameter), local(self.weights[name])
                before = policy.clone()
                policy.copy_(snapshot)
                snapshot.copy_(before)
            else:
                parameter.data, self.weights[name] = self.weights[name], parameter.data
