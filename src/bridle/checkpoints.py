"""Checkpoints of a run: which are whole, and which go.

One is whole once the file is there that is written last.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def whole_checkpoints(folder: str | Path, last: str) -> list[Path]:
    """A run's whole checkpoints by their steps; those that a dead run left half-written are passed over.

    Args:
        folder: the run's.
        last: the file of a checkpoint that is written last.
    """
    whole = [path.parent for path in Path(folder).glob(f"checkpoint-*/{last}")]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_whole(folder: str | Path, last: str) -> Path | None:
    """The last of `whole_checkpoints`; None where there is none."""
    return next(reversed(whole_checkpoints(folder, last)), None)


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
