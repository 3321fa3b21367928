"""The frozen model p_a that the target q is built on: a snapshot of whatever the policy trains.

Only trainable parameters are kept, so with LoRA the anchor is a copy of the adapter and nothing else. A
snapshot, and not the base model with its adapter switched off: training may begin from a trained adapter.

Where the policy is sharded (FSDP2) so is the snapshot: each process keeps and exchanges its own shards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bridle.models.sharding import in_shards, is_sharded, local, reshard, shard_like, trainable, whole


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
        with in_shards(self.model):
            self.weights = {name: parameter.detach().clone() for name, parameter in trainable(self.model)}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the model is the anchor: its weights, evaluation mode, no gradients.

        A backward of the policy that is still to come finds everything as it was.
        """
        training = self.model.training
        self.model.eval()
        with in_shards(self.model):
            self._swap()
            try:
                with torch.no_grad():
                    yield
            finally:
                self._swap()
                self.model.train(training)

    def state_dict(self) -> dict[str, Tensor]:
        """The snapshot, for a checkpoint: whole, on every process."""
        return {name: whole(weight) for name, weight in self.weights.items()}

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Puts a saved snapshot back."""
        with in_shards(self.model):
            self.weights = {name: shard_like(weights[name], parameter) for name, parameter in trainable(self.model)}

    def _swap(self) -> None:
        """Exchanges what the model has and what the snapshot has."""
        reshard(self.model)
        for name, parameter in trainable(self.model):
            if is_sharded(self.model):  # FSDP2 gathers from the memory that it laid out, which therefore must stay
                kept = self.weights[name] = shard_like(self.weights[name], parameter)
                mine, others = local(parameter), local(kept)
                before = mine.clone()
                mine.copy_(others)
                others.copy_(before)
            else:
                parameter.data, self.weights[name] = self.weights[name], parameter.data
