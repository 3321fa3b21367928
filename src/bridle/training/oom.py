"""Micro-batches in parts: where that spares padding, and where memory runs out.

The loss is a sum over rows, divided by the tokens of the whole accumulated batch, so its gradient does not depend on
how the batch is cut.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from trl import SFTTrainer

from bridle.utils.oom import RowLimit


class OomSafeTrainer(SFTTrainer):
    """An `SFTTrainer` that cuts its micro-batches, with the same effective batch.

    Where memory runs out nothing is cut with several processes, since one that starts an update again would exchange
    gradients more often than the others; nor with a mixture of experts that adds a mean over the rows of a micro-batch
    to the loss.

    Attributes:
        row_limit: rows of a micro-batch in memory at once.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        alone = self.accelerator.distributed_type == DistributedType.NO
        self.row_limit = RowLimit("training the policy", can_cut=alone and not self.aux_loss_enabled)
        self._micro_batches: list[dict[str, Tensor]] = []  # of the current update
        self._before_update: Any = None  # the trainer's own state when it began

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Adds a micro-batch's gradients to those of the update; its inputs are [batch, ...], its loss is a scalar.

        Memory may run out during a backward, so the whole update restarts in smaller parts.
        """
        if num_items_in_batch is None:  # the loss is a mean over the micro-batch
            return super().training_step(model, inputs)
        if not self._micro_batches:
            self._before_update = self._snapshot()
        self._micro_batches.append(inputs)
        todo = [inputs]
        while True:
            try:
                loss = [self._in_parts(model, batch, num_items_in_batch) for batch in todo][-1]
                break
            except RuntimeError as error:
                self.row_limit.lower(
                    error, max(len(part["input_ids"]) for batch in todo for part in self._parts(batch))
                )
            model.zero_grad()
            self._restore(self._before_update)
            todo = self._micro_batches
        if self.accelerator.sync_gradients:
            self._micro_batches = []
        return loss

    def parts(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """A micro-batch, or parts of it that together take less time."""
        return [inputs]

    def _in_parts(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int) -> Tensor:
        step = super().training_step
        *others, last = self._parts(inputs)
        with self.accelerator.no_sync(model) if others else nullcontext():  # the last backward exchanges gradients
            losses = [step(model, part, num_items_in_batch) for part in others]
        return torch.stack([*losses, step(model, last, num_items_in_batch)]).sum()

    def _parts(self, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Its parts, of as many rows as fit into memory."""
        for part in self.parts(inputs):
            rows = len(part["input_ids"])
            size = self.row_limit.rows or rows
            for start in range(0, rows, size):
                yield {key: values[start : start + size] for key, values in part.items()}

    def _snapshot(self) -> Any:
        """The state that a micro-batch changes besides gradients."""
        return deepcopy((self._metrics, self._total_train_tokens))

    def _restore(self, snapshot: Any) -> None:
        self._metrics, self._total_train_tokens = deepcopy(snapshot)
