"""Logs the numbers of each record to TensorBoard, trackio, MLflow and the like."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK


def log_scalars_to_trackers(callbacks: Iterable[TrainerCallback]) -> None:
    """Passes only the numbers of each record to trackers among the callbacks (TensorBoard, trackio, MLflow, ...)."""
    for callback in callbacks:
        if type(callback) in INTEGRATION_TO_CALLBACK.values():
            callback.on_log = partial(_log_scalars, callback.on_log)  # type: ignore[method-assign]


def _log_scalars(on_log: Callable[..., Any], *args: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    return on_log(*args, logs=scalars(logs or {}), **kwargs)


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
