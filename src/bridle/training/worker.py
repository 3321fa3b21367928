"""The worker that runs the parallel schedule's regularisers: the protocol, and what a worker does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from bridle.errors import RunStopped, UserError
from bridle.models.hidden import causal_lm
from bridle.training.regulariser import DomainRegulariser
from bridle.training.state import RegulariserState, Weights
from bridle.utils.distributed import broadcast_object, is_main


class Pending(Protocol):
    """The pending states of all regularisers after a round."""

    def check(self) -> None:
        """Raises `RunStopped` if the worker is known to have failed."""
        ...

    def result(self) -> list[RegulariserState]:
        """Waits for the states. Raises `RunStopped` if the worker failed."""
        ...


class Worker(Protocol):
    """Runs the regularisers' rounds."""

    def submit(self, round_index: int, weights: Weights) -> Pending:
        """Starts a round of every regulariser, on samples of the policy with these weights.

        Args:
            round_index: 1 for the first round.
            weights: the policy's trainable weights.
        """
        ...

    def restore(self, states: list[RegulariserState]) -> None:
        """Resumes from the states of an earlier run's worker."""
        ...

    def close(self) -> None:
        """Releases what the worker holds."""
        ...


class RegulariserRole:
    """The work of a worker in any process: refreshes R from each policy that it receives.

    Args:
        regularisers: with a model of their own, the same one for all.
    """

    def __init__(self, regularisers: Sequence[DomainRegulariser]):
        self.regularisers = regularisers
        if regularisers:  # the trainer's patches of `forward` call the trainer's own model
            vars(causal_lm(regularisers[0].model)).pop("forward", None)

    def update(self, round_index: int, weights: Weights) -> list[RegulariserState]:
        """Sample → score → fit R_i from the policy at the start of round i."""
        states: list[RegulariserState] = []
        for regulariser in self.regularisers:
            regulariser.set_policy(weights)
            try:
                states.append(regulariser.state(regulariser.update(round_index)))
            except (RunStopped, UserError) as error:  # not raised here, which would lose the samples
                return [*states, replace(regulariser.state(), stopped=error)]
        return states

    def restore(self, states: list[RegulariserState]) -> None:
        """Resumes from these states."""
        for regulariser, state in zip(self.regularisers, states, strict=True):
            regulariser.load_state(state)


class Done:
    """States that are already there."""

    def __init__(self, states: list[RegulariserState]):
        self.states = states

    def check(self) -> None:
        pass

    def result(self) -> list[RegulariserState]:
        return self.states


class SharedWorker:
    """A worker that the main process uses on behalf of all.

    Args:
        make: creates it; called in the main process.
    """

    def __init__(self, make: Callable[[], Worker]):
        self.worker = make() if is_main() else None

    def submit(self, round_index: int, weights: Weights) -> Pending:
        return SharedPending(None if self.worker is None else self.worker.submit(round_index, weights))

    def restore(self, states: list[RegulariserState]) -> None:
        if self.worker is not None:
            self.worker.restore(states)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


class SharedPending:
    """A round that the main process waits for on behalf of all."""

    def __init__(self, pending: Pending | None):
        self.pending = pending

    def check(self) -> None:
        if self.pending is not None:
            self.pending.check()

    def result(self) -> list[RegulariserState]:
        return broadcast_object(self.pending.result() if self.pending is not None else [])
