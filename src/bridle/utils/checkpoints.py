"""Checkpoints of a run, and its end. A checkpoint is complete once it has the file that is written last."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridle.errors import UserError
from bridle.utils.files import read_json


def whole_checkpoints(folder: str | Path, last: str) -> list[Path]:
    """Returns a run's complete checkpoints by step.

    Args:
        folder: of the run.
        last: name of the file, JSON, that is written last.
    """
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{last}") if _is_complete(path)]
    return sorted(found, key=lambda path: int(_step(path)))


def last_whole(folder: str | Path, last: str) -> Path | None:
    """Returns the last of `whole_checkpoints`; None if there is none."""
    return next(reversed(whole_checkpoints(folder, last)), None)


def _is_complete(mark: Path) -> bool:
    try:
        read_json(mark, dict[str, Any])
    except UserError:
        return False
    return _step(mark.parent).isdecimal()


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


@contextmanager
def whole_or_gone(checkpoint: Path, last: str) -> Iterator[None]:
    """Removes a checkpoint if the block that writes it fails, so that it does not keep a full disk full."""
    (checkpoint / last).unlink(missing_ok=True)  # the older checkpoint there is no longer complete
    try:
        yield
    except Exception:
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def keep_last(folder: str | Path, last: str, count: int | None, spared: str | None = None) -> None:
    """Removes all of `whole_checkpoints` but the last `count` (None: keeps all) and `spared`."""
    for checkpoint in whole_checkpoints(folder, last)[: -count if count else 0]:
        if spared is None or not checkpoint.samefile(spared):
            (checkpoint / last).unlink()  # first: one that is half removed is not complete
            shutil.rmtree(checkpoint)


class EndsWhereItEnded:
    """A mixin of trainers: unlike that of `transformers`, they take no further step when a finished run is resumed.

    A run is finished after `max_steps`, or if a callback ends it in `on_train_begin`.
    """

    state: Any
    control: Any

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)  # type: ignore[misc]
