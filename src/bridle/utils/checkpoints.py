"""Checkpoints of a run: which are whole, and which go.

One is whole once the file is there that is written last.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridle.errors import UserError
from bridle.utils.files import read_json


def whole_checkpoints(folder: str | Path, last: str) -> list[Path]:
    """A run's whole checkpoints by their steps; those that a dead run left half-written are passed over.

    Args:
        folder: the run's.
        last: the file of a checkpoint that is written last, JSON.
    """
    found = [path.parent for path in Path(folder).glob(f"checkpoint-*/{last}") if _is_whole(path)]
    return sorted(found, key=lambda path: int(_number(path)))


def last_whole(folder: str | Path, last: str) -> Path | None:
    """The last of `whole_checkpoints`; None where there is none."""
    return next(reversed(whole_checkpoints(folder, last)), None)


def _is_whole(mark: Path) -> bool:
    try:
        read_json(mark, dict[str, Any])
    except UserError:
        return False
    return _number(mark.parent).isdecimal()


def _number(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


@contextmanager
def whole_or_gone(checkpoint: Path, last: str) -> Iterator[None]:
    """Inside the block a checkpoint is written; one that cannot be is removed, or it would keep a full disk full."""
    (checkpoint / last).unlink(missing_ok=True)  # of an older one, which is written over
    try:
        yield
    except Exception:
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def keep_last(folder: str | Path, last: str, count: int | None, spared: str | None = None) -> None:
    """Removes all whole checkpoints but the last ones.

    Args:
        folder, last: as in `whole_checkpoints`.
        count: how many stay; None for all.
        spared: one that stays anyway.
    """
    for checkpoint in whole_checkpoints(folder, last)[: -count if count else 0]:
        if spared is None or not checkpoint.samefile(spared):
            (checkpoint / last).unlink()  # first, so that one half removed does not look whole
            shutil.rmtree(checkpoint)
