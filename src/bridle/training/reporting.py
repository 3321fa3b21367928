"""What a run tells while it goes on: progress for people, `metrics.jsonl` for programs."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from bridle.environment import append_text, write_text
from bridle.progress import Progress
from bridle.ranks import is_main
from bridle.reading import checked, parse, read_text


class MetricsFile(TrainerCallback):
    """Appends every log record to `metrics.jsonl`, one JSON object a line.

    A resumed run drops the records written after its checkpoint, so that no step stands there twice. Of several
    processes the main one writes.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        kept = []
        if not is_main():
            return
        if state.global_step and self.path.is_file():
            *whole, _ = read_text(self.path).split("\n")  # the last may have been cut off
            steps = [_step(line, f"{self.path} row {number}") for number, line in enumerate(whole, start=1)]
            kept = [line for line, step in zip(whole, steps, strict=True) if step <= state.global_step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102
        if not is_main():
            return
        record = {"step": state.global_step, **{key: _finite(value) for key, value in (logs or {}).items()}}
        append_text(self.path, json.dumps(record, allow_nan=False) + "\n")


class TrainingProgress(TrainerCallback):
    """Shows the policy's steps with rate and time left, and a line at the end of each round.

    Args:
        description: what is being trained.
    """

    _progress: Progress

    def __init__(self, description: str = "training the policy"):
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self._progress = Progress(self.description, state.max_steps, "steps")
        self._progress.update(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        self._progress.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102
        if logs and "round" in logs:
            self._progress.write(round_line(logs, args.rounds))

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        self._progress.close()


def round_line(record: dict[str, Any], rounds: int) -> str:
    """One line that says what a round measured."""
    parts = [f"round {record['round']}/{rounds}:"]
    for key, value in record.items():
        name, _, what = key.rpartition("/")
        if what == "compliance" and value is not None:
            low, high = record[f"{name}/compliance_low"], record[f"{name}/compliance_high"]
            parts.append(f"{name} complies {value:.3f} [{low:.3f}, {high:.3f}]")
        elif what == "r_ece":
            parts.append(f"R's calibration error {value:.3f}")
        elif name == "kl":
            parts.append(f"KL({what}) {value:.4f}")
    parts.append(f"CE {record['ce']:.3f}" if "ce" in record else "no policy step")
    return "  ".join(parts)


def _step(line: str, place: str) -> int:
    record = checked(dict[str, Any], parse(line, place), place)
    return checked(int, record.get("step"), f"{place}: step")


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a number that is none is missing."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
