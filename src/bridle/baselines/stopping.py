"""When a run of reinforcement learning ends: its time is up, or its reward has converged; and its progress."""

import math
import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerState

from bridle.utils.progress import Progress


def update_records(state: TrainerState) -> list[dict[str, Any]]:
    """The records of the updates, without TRL's last record, which summarises the run."""
    return [record for record in state.log_history if "reward" in record]


def mean_of(key: str, records: Sequence[dict[str, Any]]) -> float | None:
    """The mean of the records' values of `key`; None without values."""
    values = [record[key] for record in records if record.get(key) is not None]
    return sum(values) / len(values) if values else None


class StoppingRule(TrainerCallback):
    """Ends a run, with a checkpoint, after the first update that meets its condition."""

    reason: str
    met = False

    def is_met(self, state: TrainerState) -> bool:
        """Whether the run should end, given the records of its updates."""
        raise NotImplementedError

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in (logs or {}) and self.is_met(state):
            self.met = control.should_training_stop = control.should_save = True


class TimeBudget(StoppingRule):
    """Ends a run when its time is up.

    It writes the elapsed seconds into each record, from which a resumed run continues to count.

    Args:
        seconds: the time limit; None for no limit.
    """

    reason = "time"

    def __init__(self, seconds: float | None):
        self.seconds = math.inf if seconds is None else seconds
        self._began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        used = [record["seconds"] for record in update_records(state)]
        self._began = time.monotonic() - (used[-1] if used else 0.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in (logs or {}):
            state.log_history[-1]["seconds"] = time.monotonic() - self._began
        super().on_log(args, state, control, logs, **kwargs)

    def is_met(self, state):
        return state.log_history[-1]["seconds"] >= self.seconds


class Convergence(StoppingRule):
    """Ends a run whose reward no longer rises.

    Args:
        window: number of updates in a window, which is compared with the previous one.
        tolerance: the largest rise of the mean reward that does not count.
    """

    reason = "converged"

    def __init__(self, window: int, tolerance: float):
        self.window, self.tolerance = window, tolerance

    def is_met(self, state):
        records, window = update_records(state), self.window
        if len(records) % window or len(records) < 2 * window:
            return False
        before = mean_of("reward", records[-2 * window : -window])
        last = mean_of("reward", records[-window:])
        return before is not None and last is not None and last - before <= self.tolerance


class StepsProgress(TrainerCallback):
    """Shows the finished updates; `total` is None if time decides."""

    def __init__(self, total: int | None):
        self.total = total

    def on_train_begin(self, args, state, control, **kwargs):
        self._progress = Progress("reinforcing the policy", self.total, "steps")
        self._progress.update(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._progress.update(1)

    def on_train_end(self, args, state, control, **kwargs):
        self._progress.close()
