"""The parallel schedule (EMNLP 2024, the second of two): the policy and R are updated at the same time.

Both start from the states of the last round. Round i's policy steps use R_{i-1}, fitted on samples of p_{i-2},
while R_i is being fitted on samples of p_{i-1}. There is no R_0: the first round's policy steps wait for R_1, or are
plain CE (`parallel.first_round`). None is fitted in the last round, since nothing would use it.

A `Worker` fits R: `RayWorker`, in other processes.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bridle.training.config import ConstrainedConfig
from bridle.training.guards import Supervisor
from bridle.training.regulariser_set import RegulariserSet
from bridle.training.schedule import Log, SequentialSchedule
from bridle.training.state import RegulariserState, trainable_weights
from bridle.training.worker import Done, Pending, Worker
from bridle.utils.distributed import is_main


class ParallelSchedule(SequentialSchedule):
    """Sends the policy to the worker at the start of each round, and takes the last round's R.

    Args:
        regularisers, config, supervisor, evaluates: as in `SequentialSchedule`.
        make_worker: called in the first round that needs a worker.
    """

    def __init__(
        self,
        regularisers: RegulariserSet,
        config: ConstrainedConfig,
        supervisor: Supervisor,
        evaluates: bool,
        make_worker: Callable[[], Worker],
    ):
        super().__init__(regularisers, config, supervisor, evaluates)
        self.make_worker = make_worker
        self.worker: Worker | None = None
        self.pending: Pending | None = None  # R_i, during round i

    def _refresh(self, index: int, log: Log) -> None:
        """Takes R_{i-1}, and starts fitting R_i; takes R_1 at once if the first round waits for it."""
        if self.pending is not None:
            self._take(self.pending, index - 1, log)
        self.pending = None
        waits = index == 1 and self.config.parallel.first_round == "wait"
        goes_on = index < self.config.rounds
        if all(regulariser.settled for regulariser in self.regularisers):
            for regulariser in self.regularisers:
                self._note(index, regulariser, {}, log)
        elif waits or goes_on:
            self.worker = self.worker or self.make_worker()
            self.pending = self.worker.submit(index, trainable_weights(self.regularisers[0].model))
            if waits:
                noted = [replace(made, measured={}) for made in self._take(self.pending, index, log)]
                self.pending = Done(noted) if goes_on else None  # for round 2

    def _take(self, pending: Pending, index: int, log: Log) -> list[RegulariserState]:
        """Waits for R of round `index` and uses it."""
        began = time.perf_counter()
        states = self._received(pending, index)
        self._record["seconds_waiting"] = time.perf_counter() - began
        for regulariser, made in zip(self.regularisers, states, strict=True):
            if not regulariser.settled:  # else nothing is new, and its rollouts go on where the last round ended
                regulariser.load_state(made)
            self._note(index, regulariser, made.measured, log)
        return states

    def _received(self, pending: Pending, index: int) -> list[RegulariserState]:
        """The states of round `index`; if it failed, writes its samples and raises its error."""
        states = pending.result()
        for regulariser, state in zip(self.regularisers, states, strict=False):
            regulariser.keep_rollouts(index, state.rollouts)
            if state.stopped is not None:
                raise state.stopped
        return states

    @staticmethod
    def recorded_as(key: str) -> str:
        """The worker's times overlap with the policy's and must not be added to them."""
        return f"worker_{key}" if key.startswith("seconds") else key

    def on_step_end(self, args, state, control, **kwargs):
        if self.pending is not None:
            self.pending.check()  # a dead worker stops the policy at its next step, not at the end of the round
        return super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if self.worker is not None:
            self.worker.close()

    def _save_states(self, checkpoint: Path) -> None:
        """Waits for R_i, which a resumed run cannot fit again: its policy p_{i-1} is gone."""
        super()._save_states(checkpoint)
        if self.pending is not None:
            states = self._received(self.pending, self.round)
            self.pending = Done(states)
            for regulariser, made in zip(self.regularisers, states, strict=True):
                if is_main():
                    made.save(checkpoint / "pending" / regulariser.name)

    def load(self, checkpoint: Path) -> None:
        super().load(checkpoint)
        if (folder := checkpoint / "pending").is_dir():
            states = [RegulariserState.load(folder / regulariser.name) for regulariser in self.regularisers]
            self.pending = Done(states)
            self.worker = self.worker or self.make_worker()
            self.worker.restore(states)
