"""A run's reports: progress for people, `metrics.jsonl` for programs."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from transformers import TrainerCallback

from bridle.utils.distributed import is_main
from bridle.utils.files import append_text, checked, parse, read_text, write_text
from bridle.utils.progress import Progress

WIDEST_LINE = 100  # columns
LONGEST_NAME = 30  # of a regulariser, in a line for people


@dataclass
class Stamp:
    """What every record has: its update, the seconds since training began, and the run's length."""

    step: int
    seconds: float
    max_steps: int
    rounds: int


class MetricsFile(TrainerCallback):
    """Appends every log record to `metrics.jsonl`, one JSON object a line.

    Each has the run's length beside it, and the time so far. A resumed run drops the records that its checkpoint does
    not have, so that none occurs twice, and its time continues. Only the main process writes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._began = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        if not is_main():
            return
        kept, seconds = [], 0.0
        if state.global_step and self.path.is_file():
            *whole, _ = read_text(self.path).split("\n")  # the last may be incomplete
            whole = whole[: len(state.log_history)]  # a finished run has records of its end at the checkpoint's step
            rows = ((line, f"{self.path} row {number}") for number, line in enumerate(whole, start=1))
            stamped = [(line, checked(Stamp, parse(line, place), place)) for line, place in rows]
            before = [(line, stamp.seconds) for line, stamp in stamped if stamp.step <= state.global_step]
            kept = [line for line, _ in before]
            seconds = max((so_far for _, so_far in before), default=0.0)
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._began = time.monotonic() - seconds

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not is_main():
            return
        run = {
            "seconds": time.monotonic() - self._began,
            "max_steps": state.max_steps,
            "rounds": getattr(args, "rounds", 1),
        }
        record = {"step": state.global_step, **{key: _finite(value) for key, value in (logs or {}).items()}, **run}
        append_text(self.path, json.dumps(record, allow_nan=False) + "\n")


class TrainingProgress(TrainerCallback):
    """Shows steps, rate and time left, and a line after each round and for each target; `disable_tqdm` hides both."""

    _progress: Progress

    def __init__(self, description: str = "training the policy"):
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):
        self._progress = Progress(self.description, state.max_steps, "steps", shown=not args.disable_tqdm)
        self._progress.update(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._progress.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "round" in logs:
            self._progress.write(round_line(logs, args.rounds))
        elif logs and ("eval_loss" in logs or "eval_completions" in logs):
            self._progress.write(evaluation_line(logs))
        elif logs:
            for line in target_lines(logs):
                self._progress.write(line)

    def on_train_end(self, args, state, control, **kwargs):
        self._progress.close()


def round_line(record: dict[str, Any], rounds: int) -> str:
    """The metrics of a round, in lines of at most `WIDEST_LINE` columns: the policy's, then each regulariser's.

    λ·KL is the regulariser's part of the loss, to compare with CE.
    """
    parts = [f"CE {number(record['ce'], '.3f')}" if "ce" in record else "no cross-entropy"]
    if "held_rows" in record:
        parts.append(f"{record['held_rows']:.0%} of the rows held")
    for name in regularisers_of(record):
        parts.append(f"{shorten(name, LONGEST_NAME, placeholder='…')}: {', '.join(_of_regulariser(record, name))}")
    lines = [f"round {record['round']}/{rounds}"]
    for part in parts:
        if len(lines[-1]) + len(part) + 2 > WIDEST_LINE:
            lines.append(" ")
        lines[-1] += f"  {part}"
    return "\n".join(lines)


def regularisers_of(record: dict[str, Any]) -> list[str]:
    """The names of a round's regularisers."""
    return [key.removesuffix("/lambda") for key in record if key.endswith("/lambda")]


def _of_regulariser(record: dict[str, Any], name: str) -> Iterator[str]:
    compliance, divergence = record.get(f"{name}/compliance"), record.get(f"kl/{name}")
    if compliance is not None:
        low, high = record[f"{name}/compliance_low"], record[f"{name}/compliance_high"]
        yield f"complies {compliance:.3f} [{low:.3f}, {high:.3f}]"
    if f"{name}/r_ece" in record:
        yield f"R's ECE {number(record[f'{name}/r_ece'], '.3f')}"
    if record.get(f"{name}/r_skill") is not None:
        yield f"skill {record[f'{name}/r_skill']:.2f}"
    if divergence is not None:
        yield f"λ·KL {record[f'{name}/lambda'] * divergence:.2g}"


def evaluation_line(record: dict[str, Any]) -> str:
    """The metrics of an evaluation on held-out rows, in one line."""
    parts = [f"held out: loss {number(record['eval_loss'], '.3f')}"] if "eval_loss" in record else ["held out:"]
    for key, value in record.items():
        what, _, name = key.partition("/")
        if what == "eval_violation" and name:
            low, high = record[f"eval_violation_low/{name}"], record[f"eval_violation_high/{name}"]
            n = record["eval_completions"] - record[f"eval_missing/{name}"]
            parts.append(f"{name} violated {value:.3f} [{low:.3f}, {high:.3f}] of {n}")
    return "  ".join(parts)


def target_lines(record: dict[str, Any]) -> Iterator[str]:
    """What the trained model reaches of each target, a line each."""
    for key, value in record.items():
        name, _, what = key.rpartition("/")
        if what == "violation_reached":
            low, high, target = record[f"{key}_low"], record[f"{key}_high"], record[f"{name}/target"]
            yield f"trained model  {name}: violation {value:.3g} [{low:.3g}, {high:.3g}], target {target:.3g}"


def number(value: float | None, form: str) -> str:
    """A figure of a record, where one that is not finite is None."""
    return "–" if value is None else format(value, form)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
