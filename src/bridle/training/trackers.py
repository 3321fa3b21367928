"""Logs a run to TensorBoard, W&B, MLflow, trackio and the like: the numbers of each record, and rollouts as tables."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from bridle.data.rollouts import Rollout, read_rollouts
from bridle.errors import UserError, first_line
from bridle.training.config import ConstrainedConfig

ROLLOUTS = 64  # of a regulariser and a round, evenly spaced
COLUMNS = ("round", "prompt", "completion", "value", "complies", "reason", "finished")

SETTINGS = {
    "wandb": "WANDB_MODE=offline to log to a folder",
    "mlflow": "MLFLOW_TRACKING_URI to where it should log",
}
"""By tracker, the environment variable that lets it begin."""

Columns = dict[str, list[Any]]


def log_to_trackers(callbacks: Iterable[TrainerCallback]) -> None:
    """Makes trackers among the callbacks log what they can show.

    Each gets the numbers of every record, and no other value. At the end of a round W&B, MLflow and trackio get some of
    its rollouts, with their scores, as a table `rollouts/REGULARISER`. One that cannot begin raises a `UserError`.
    """
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    for callback in (callback for callback in callbacks if type(callback) in names):
        callback.on_train_begin = _beginning(names[type(callback)], callback.on_train_begin)  # type: ignore[method-assign]
        callback.on_log = _Log(callback)  # type: ignore[method-assign]


def _beginning(name: str, begin: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the `on_train_begin` of a tracker, whose libraries raise errors with no common base."""

    def on_train_begin(*args: Any, **kwargs: Any) -> Any:
        try:
            return begin(*args, **kwargs)
        except Exception as error:
            hint = f"or set {SETTINGS[name]}, or leave it out" if name in SETTINGS else "leave it out"
            raise UserError(f"report_to: {name}: {first_line(error).rstrip('.')}; {hint}") from error

    return on_train_begin


class _Log:
    """Replaces the `on_log` of a tracker."""

    def __init__(self, callback: TrainerCallback):
        self.callback, self.on_log = callback, callback.on_log
        self.write = next((write for name, write in TABLES.items() if _is(callback, name)), None)
        self.logged: set[Path] = set()  # rollouts

    def __call__(
        self,
        args: ConstrainedConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        answer = self.on_log(args, state, control, logs=scalars(logs or {}), **kwargs)
        if self.write is not None and logs and "round" in logs and state.is_world_process_zero:
            # In the parallel schedule the samples of a round may arrive with the next one.
            for number in range(logs["round"] - (args.schedule == "parallel"), logs["round"] + 1):
                for path in sorted((Path(args.output_dir) / "rollouts").glob(f"round-{number}.*.jsonl")):
                    if path not in self.logged:
                        self.write(self.callback, path, _columns(read_rollouts(path)), state.global_step)
                        self.logged.add(path)
        return answer


def _is(callback: TrainerCallback, name: str) -> bool:
    return isinstance(callback, INTEGRATION_TO_CALLBACK[name])


def _columns(rollouts: list[Rollout]) -> Columns:
    shown = rollouts[:: max(1, -(-len(rollouts) // ROLLOUTS))]
    return {name: [getattr(one, name) for one in shown] for name in COLUMNS}


def _to_wandb(callback: Any, path: Path, columns: Columns, step: int) -> None:
    callback._wandb.log({_name(path): callback._wandb.Table(**_as_rows(columns)), "train/global_step": step})


def _to_trackio(callback: Any, path: Path, columns: Columns, step: int) -> None:
    callback._trackio.log({_name(path): callback._trackio.Table(**_as_rows(columns)), "train/global_step": step})


def _to_mlflow(callback: Any, path: Path, columns: Columns, step: int) -> None:
    callback._ml_flow.flush_async_logging()  # `log_table` reads the run, which a folder may hold half written
    callback._ml_flow.log_table(columns, artifact_file=f"rollouts/{path.stem}.json")


TABLES: dict[str, Callable[[Any, Path, Columns, int], None]] = {
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "mlflow": _to_mlflow,
}
"""How the trackers that have tables take one, by the names of `report_to`."""


def _name(path: Path) -> str:
    """The table's name: round-1.rude.jsonl is of rollouts/rude."""
    return f"rollouts/{path.stem.partition('.')[2]}"


def _as_rows(columns: Columns) -> dict[str, Any]:
    return {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}


def scalars(record: Any, key: str = "") -> dict[str, int | float]:
    """The numbers in a record by key, e.g. "calibration/0/count" if nested; for warnings, their count."""
    if isinstance(record, list) and all(isinstance(value, str) for value in record):
        return {key: len(record)}
    if isinstance(record, list):
        record = {str(index): value for index, value in enumerate(record)}
    if isinstance(record, Mapping):
        parts = (scalars(value, f"{key}/{name}" if key else name) for name, value in record.items())
        return {name: value for part in parts for name, value in part.items()}
    return {key: +record} if isinstance(record, int | float) and math.isfinite(record) else {}  # +True is 1
