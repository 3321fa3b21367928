"""When memory or the disk runs out: a batch is cut and the work goes on, or the run stops with a line that says so."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from bridle.errors import RunStopped

logger = logging.getLogger(__name__)
T = TypeVar("T")
Rows = TypeVar("Rows", bound="Sliceable")

FULL = (
    *(os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)),
    "database or disk is full",  # SQLite
    *("iostream error", "unexpected pos", "PytorchStreamWriter failed"),  # torch, which does not say more
)
"""Words that tell a full disk: not every library raises an OSError."""


class Sliceable(Protocol):
    """A list, a range, a tensor."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Any: ...


class RowLimit:
    """How many rows are worked on at once: all that there are, until memory runs out, and half of them from then on.

    Args:
        work: what is done with them, for the warning.
        can_cut: false where each call is one of several processes together, who would not know of a cut.

    Attributes:
        rows: the limit; None as long as there is none.
    """

    def __init__(self, work: str, can_cut: bool = True):
        self.work, self.can_cut = work, can_cut
        self.rows: int | None = None

    def run(self, work: Callable[[Rows], T], rows: Rows) -> list[T]:
        """What `work` returns for some rows or, in order, for each part of them that fits into memory."""
        results: list[T] = []
        while len(rows):
            part = rows[: self.rows]
            try:
                results.append(work(part))
            except RuntimeError as error:
                self.lower(error, len(part))
            else:
                rows = rows[len(part) :]
        return results

    def lower(self, error: RuntimeError, rows: int) -> None:
        """Halves the limit, as so many rows were too many.

        Raises:
            RuntimeError: the error itself, if it is another one or there is nothing to halve.
        """
        rows = min(rows, self.rows or rows)
        if not (self.can_cut and rows > 1 and is_out_of_memory(error)):
            raise error
        self.rows = -(-rows // 2)
        logger.warning("%s: memory ran out with %d rows at once; from here on it is %d", self.work, rows, self.rows)
        clear_frames(error.__traceback__)  # they hold what filled the memory
        clear_device_cache(garbage_collection=True)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of a device, or the CPU's, ran out."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def is_disk_full(error: Exception) -> bool:
    """Whether an error, of whatever library, says that a disk or a quota is full."""
    return any(sign in str(error) for sign in FULL)


@contextmanager
def stopping_when_exhausted(folder: str | Path) -> Iterator[None]:
    """Inside the block a full disk, or memory that cutting batches cannot spare, stops the run that writes to a folder.

    Raises:
        RunStopped: in their place.
    """
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        first_line, *_ = str(error).splitlines() or [""]
        if is_disk_full(error):
            raise RunStopped(
                f"{folder}: no room is left on the disk ({first_line}); free some, and --resume goes on from the last "
                "whole checkpoint"
            ) from error
        if is_out_of_memory(error):
            raise RunStopped(
                f"{folder}: memory ran out where no batch could be cut; the page on troubleshooting names what to "
                "lower, and --resume --accept_changes goes on from the last whole checkpoint"
            ) from error
        raise
