"""Where the parallel schedule's regularisers work: the protocol, and a worker in this process."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Protocol

from bridle.errors import RunStopped, UserError
from bridle.models.hidden import causal_lm
from bridle.training.regulariser import DomainRegulariser
from bridle.training.state import RegulariserState, Weights
from bridle.utils.distributed import from_main, is_main


class Pending(Protocol):
    """The states of all regularisers after a round, on their way."""

    def check(self) -> None:
        """Raises `RunStopped` if the worker is known to have failed."""
        ...

    def result(self) -> list[RegulariserState]:
        """Waits for them. Raises `RunStopped` if they will never come."""
        ...


class Worker(Protocol):
    """Runs the regularisers' rounds."""

    def submit(self, round_index: int, weights: Weights) -> Pending:
        """Begins a round of every regulariser, on samples of the policy with these weights.

        Args:
            round_index: 1 for the first round.
            weights: the policy's, those that are trained.
        """
        ...

    def restore(self, states: list[RegulariserState]) -> None:
        """Resumes from the states that an earlier run's worker had reached."""
        ...

    def close(self) -> None:
        """Releases what the worker holds."""
        ...


class RegulariserRole:
    """What a worker does, wherever it runs: refreshes R from the policies that it is sent.

    Args:
        regularisers: with a model of their own, the same one for all.
    """

    def __init__(self, regularisers: Sequence[DomainRegulariser]):
        self.regularisers = regularisers
        if regularisers:  # the trainer's patches of `forward` lead to the trainer's own model
            vars(causal_lm(regularisers[0].model)).pop("forward", None)

    def update(self, round_index: int, weights: Weights) -> list[RegulariserState]:
        """Sample → score → fit R_i from the policy as it stood when round i began."""
        states: list[RegulariserState] = []
        for regulariser in self.regularisers:
            regulariser.set_policy(weights)
            try:
                states.append(regulariser.state(regulariser.update(round_index)))
            except (RunStopped, UserError) as error:  # not raised here, where what was sampled would be lost
                return [*states, replace(regulariser.state(), stopped=error)]
        return states

    def restore(self, states: list[RegulariserState]) -> None:
        """Resumes from these states."""
        for regulariser, state in zip(self.regularisers, states, strict=True):
            regulariser.load_state(state)


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

    def __init__(self, regularisers: Sequence[DomainRegulariser]):
        self.role = RegulariserRole(deepcopy(list(regularisers)))

    def submit(self, round_index: int, weights: Weights) -> Pending:
        return Done(self.role.update(round_index, weights))

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

    def submit(self, round_index: int, weights: Weights) -> Pending:
        return SharedPending(None if self.worker is None else self.worker.submit(round_index, weights))

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
