"""The parallel schedule (EMNLP 2024, the second of two): the policy and R are updated at the same time.

Both start from the states of the last round. Round i's policy steps use R_{i-1}, fitted on samples of p_{i-2},
while R_i is being fitted on samples of p_{i-1}. There is no R yet in the first round, whose policy steps are plain CE;
and none is fitted in the last one, since nobody would use it.

Who fits R is a `Worker`: `RayWorker` in another process, on whatever a Ray cluster gives it, or `LocalWorker`, which
takes turns with the policy and gives the same result, bit for bit.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bridle.errors import RunStopped, UserError
from bridle.models.hidden import causal_lm
from bridle.training.precomputed import Upcoming, make_targets, upcoming
from bridle.training.regulariser import DomainRegulariser
from bridle.training.schedule import SequentialSchedule
from bridle.training.state import RegulariserState, Weights, trainable_weights
from bridle.utils.distributed import from_main, is_main

if TYPE_CHECKING:
    from bridle.training.trainer import ConstrainedTrainer


class Pending(Protocol):
    """The states of all regularisers after a round, on their way."""

    def check(self) -> None:
        """Raises `RunStopped` if whoever makes them is known to have failed."""
        ...

    def result(self) -> list[RegulariserState]:
        """Waits for them. Raises `RunStopped` if they will never come."""
        ...


class Worker(Protocol):
    """Where the regulariser's role is played."""

    def submit(self, round_index: int, weights: Weights, rows: list[Upcoming] | None = None) -> Pending:
        """Begins a round of every regulariser, on samples of the policy with these weights.

        Args:
            round_index: 1 for the first round.
            weights: the policy's, those that are trained.
            rows: what each regulariser will look at in the next round, where targets are to be made for it.
        """
        ...

    def restore(self, states: list[RegulariserState]) -> None:
        """Goes on from the states that an earlier run's worker had reached."""
        ...

    def close(self) -> None:
        """Lets go of what the worker holds."""
        ...


class RegulariserRole:
    """What a worker does, wherever it runs: refreshes R from the policies that it is sent.

    Args:
        regularisers: with a model of their own, the same one for all.
    """

    def __init__(self, regularisers: list[DomainRegulariser]):
        self.regularisers = regularisers
        if regularisers:  # the trainer's patches of `forward` lead to the trainer's own model
            vars(causal_lm(regularisers[0].model)).pop("forward", None)

    def update(self, round_index: int, weights: Weights, rows: list[Upcoming] | None = None) -> list[RegulariserState]:
        """Sample → score → fit R_i from the policy as it stood when round i began → targets for round i + 1."""
        states: list[RegulariserState] = []
        for regulariser in self.regularisers:
            regulariser.set_policy(weights)
            try:
                measured = regulariser.update(round_index)
            except (RunStopped, UserError) as error:  # not raised here, where what was sampled would be lost
                return [*states, replace(regulariser.state(), stopped=error)]
            if rows is not None and regulariser.active and regulariser.targets is None:
                began = time.perf_counter()
                regulariser.targets = make_targets(regulariser, rows[regulariser.index], round_index)
                measured["seconds_targets"] = time.perf_counter() - began
            states.append(regulariser.state(measured))
        return states

    def restore(self, states: list[RegulariserState]) -> None:
        """Goes on from these states."""
        for regulariser, state in zip(self.regularisers, states, strict=True):
            regulariser.adopt(state)


class Done:
    """States that are there already."""

    def __init__(self, states: list[RegulariserState]):
        self.states = states

    def check(self) -> None:
        pass

    def result(self) -> list[RegulariserState]:
        return self.states


class LocalWorker:
    """Fits R in this process while the policy waits: the plain loop of the same recurrence."""

    def __init__(self, regularisers: list[DomainRegulariser]):
        self.role = RegulariserRole(deepcopy(regularisers))

    def submit(self, round_index: int, weights: Weights, rows: list[Upcoming] | None = None) -> Pending:
        return Done(self.role.update(round_index, weights, rows))

    def restore(self, states: list[RegulariserState]) -> None:
        self.role.restore(states)

    def close(self) -> None:
        pass


class SharedWorker:
    """A worker that the main one of several processes talks to, for all of them.

    Args:
        make: makes it; called in the main process.
    """

    def __init__(self, make: Callable[[], Worker]):
        self.worker = make() if is_main() else None

    def submit(self, round_index: int, weights: Weights, rows: list[Upcoming] | None = None) -> Pending:
        return SharedPending(None if self.worker is None else self.worker.submit(round_index, weights, rows))

    def restore(self, states: list[RegulariserState]) -> None:
        if self.worker is not None:
            self.worker.restore(states)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


class SharedPending:
    """What the main process waits for, for all of them."""

    def __init__(self, pending: Pending | None):
        self.pending = pending

    def check(self) -> None:
        if self.pending is not None:
            self.pending.check()

    def result(self) -> list[RegulariserState]:
        return from_main(self.pending.result() if self.pending is not None else [])


class ParallelSchedule(SequentialSchedule):
    """Sends the policy to the worker at the beginning of each round, and takes what it made of the last one.

    Args:
        trainer: whose regularisers are updated; its `args.rounds` divide the policy's steps evenly.
    """

    def __init__(self, trainer: "ConstrainedTrainer"):
        super().__init__(trainer)
        self.worker: Worker | None = None  # a `RayWorker`, unless one is put here before training
        self.pending: Pending | None = None  # R_i, during round i

    def _refresh(self, index: int) -> None:
        """Takes R_{i-1}, and has R_i fitted from here on."""
        if self.pending is not None:
            began = time.perf_counter()
            states = self._received(self.pending, index - 1)
            self._record["seconds_waiting"] = time.perf_counter() - began
            for regulariser, state in zip(self.trainer.regularisers, states, strict=True):
                regulariser.adopt(state)
                self._note(index - 1, regulariser, _of_worker(state.measured))
        self.pending = None
        self._drop_old_targets()
        if index < self.trainer.args.rounds:
            self.worker = self.worker or self._ray_worker()
            rows = upcoming(self.trainer, index + 1) if self.trainer.args.targets == "shipped" else None
            self.pending = self.worker.submit(index, trainable_weights(self.trainer.model), rows)

    def _received(self, pending: Pending, index: int) -> list[RegulariserState]:
        """The states of round `index`; raises what stopped it, once what it sampled is written."""
        states = pending.result()
        for regulariser, state in zip(self.trainer.regularisers, states, strict=False):
            self._keep_rollouts(index, regulariser.name, state.rollouts)
            if state.stopped is not None:
                raise state.stopped
        return states

    def _ray_worker(self) -> Worker:
        from bridle.training.ray_worker import RayWorker  # Ray is optional

        trainer, args = self.trainer, self.trainer.args
        return SharedWorker(lambda: RayWorker(trainer.regularisers, args.parallel, Path(args.output_dir)))

    def on_step_end(self, args, state, control, **kwargs):
        if self.pending is not None:
            self.pending.check()  # a dead worker stops the policy at its next step, and not at the round's end
        return super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if self.worker is not None:
            self.worker.close()

    # ------------------------------------------------------------------ resume

    def _save_states(self, checkpoint: Path) -> None:
        """Waits for R_i, which a resumed run could not fit again: its policy p_{i-1} is gone."""
        super()._save_states(checkpoint)
        if self.pending is not None:
            states = self._received(self.pending, self.round)
            self.pending = Done(states)
            for regulariser, made in zip(self.trainer.regularisers, states, strict=True):
                if is_main():
                    made.save(checkpoint / "pending" / regulariser.name)

    def load(self, checkpoint: Path) -> None:
        super().load(checkpoint)
        if (folder := checkpoint / "pending").is_dir():
            states = [RegulariserState.load(folder / regulariser.name) for regulariser in self.trainer.regularisers]
            self.pending = Done(states)
            self.worker = self.worker or self._ray_worker()
            self.worker.restore(states)


def _of_worker(measured: dict[str, Any]) -> dict[str, Any]:
    """Times of the worker lie beside those of the policy and must not be added to them."""
    return {f"worker_{key}" if key.startswith("seconds") else key: value for key, value in measured.items()}
