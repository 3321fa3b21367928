"""When a run of reinforcement learning ends: its time is up, or its reward has converged; and its progress."""

import time
from collections.abc import Sequence
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState

from bridle.utils.interruption import is_pending
from bridle.utils.progress import Progress


def update_records(state: TrainerState) -> list[dict[str, Any]]:
    """The records of the updates, without TRL's last record, which summarises the run."""
    return [record for record in state.log_history if "reward" in record]


def mean_of(key: str, records: Sequence[dict[str, Any]]) -> float | None:
    """The mean of the records' values of `key`; None without values."""
    values = [record[key] for record in records if record.get(key) is not None]
    return sum(values) / len(values) if values else None


class Stopping(TrainerCallback):
    """Ends a run, with a checkpoint, when its time is up or, without a time limit, when its reward no longer rises.

    It does so after the update in which a signal arrives, too.

    Each record of an update gets the elapsed seconds, from which a resumed run continues to count.

    Args:
        seconds: the time limit.
        window: number of updates in a window, whose mean reward is compared with that of the previous window.
        tolerance: the largest rise that does not count.
    """

    reason: Literal["time", "converged"] | None = None

    def __init__(self, seconds: float | None, window: int, tolerance: float):
        self.seconds, self.window, self.tolerance = seconds, window, tolerance
        self._began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        records = update_records(state)
        self._began = time.monotonic() - (records[-1]["seconds"] if records else 0.0)
        if records:  # the run may have been stopped after its last checkpoint
            self._decide(records, control)

    def on_step_end(self, args, state, control, **kwargs):
        if is_pending():
            control.should_training_stop = control.should_save = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in (logs or {}):
            return
        state.log_history[-1]["seconds"] = time.monotonic() - self._began
        self._decide(update_records(state), control)

    def _decide(self, records: list[dict[str, Any]], control: TrainerControl) -> None:
        if self.seconds is not None and records[-1]["seconds"] >= self.seconds:
            self.reason = "time"
        elif self.seconds is None and self._has_converged(records):
            self.reason = "converged"
        if self.reason:
            control.should_training_stop = control.should_save = True

    def _has_converged(self, records: list[dict[str, Any]]) -> bool:
        window = self.window
        if len(records) % window or len(records) < 2 * window:
            return False
        before, last = (mean_of("reward", part) for part in (records[-2 * window : -window], records[-window:]))
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
