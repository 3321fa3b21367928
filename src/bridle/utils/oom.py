"""Exhausted memory and disks: work continues on smaller batches, or the run stops with a message of one line."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames
from typing import Any, Protocol, TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from bridle.errors import RunStopped, first_line

logger = logging.getLogger(__name__)
T = TypeVar("T")
Rows = TypeVar("Rows", bound="Sliceable")

FULL = (
    *(os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)),
    "database or disk is full",  # SQLite
    *("iostream error", "unexpected pos", "PytorchStreamWriter failed"),  # torch, which does not say more
)
"""Parts of the messages for a full disk, as not every library raises an OSError."""


class Sliceable(Protocol):
    """A list, a range, a tensor."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Any: ...


class RowLimit:
    """How many rows to process at once: all, or as many as fit, and half as many each time that memory runs out.

    Args:
        work: names the work in the warning.
        can_cut: false if several processes make each call together, as the others would not know of a cut.
        row_bytes: roughly what a row needs; rows that together need more than half of the free memory are cut at once,
            since a CPU's memory can run out without an error. None if not known.
        device: where they need it.

    Attributes:
        rows: the limit; None if there is none yet.
    """

    def __init__(
        self, work: str, can_cut: bool = True, row_bytes: int | None = None, device: torch.device | None = None
    ):
        self.work, self.can_cut = work, can_cut
        self.rows: int | None = None
        if can_cut and row_bytes and device is not None:
            self.rows = max(1, free_memory(device) // (2 * row_bytes))

    def run(self, work: Callable[[Rows], T], rows: Rows) -> list[T]:
        """Returns what `work` returns for each part of the rows that fits into memory, in order."""
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
        """Halves the limit after an error with `rows` rows.

        Raises:
            RuntimeError: the error itself, if memory did not run out or one row is too many.
        """
        rows = min(rows, self.rows or rows)
        if not (self.can_cut and rows > 1 and is_out_of_memory(error)):
            raise error
        self.rows = -(-rows // 2)
        logger.warning("%s: memory ran out with %d rows at once; the limit is now %d", self.work, rows, self.rows)
        clear_frames(error.__traceback__)  # they refer to the tensors that filled the memory
        clear_device_cache(garbage_collection=True)


def free_memory(device: torch.device) -> int:
    """Bytes that a device can still give; on a CPU those of the machine."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of a device or the CPU ran out."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def is_disk_full(error: Exception) -> bool:
    """Whether a disk or a quota is full, by any library's error."""
    return any(sign in str(error) for sign in FULL)


@contextmanager
def stopping_when_exhausted(folder: str | Path) -> Iterator[None]:
    """Stops the run that writes to a folder if the disk is full, or if smaller batches cannot save memory.

    Raises:
        RunStopped: in place of the error.
    """
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise RunStopped(
                f"{folder}: the disk is full ({first_line(error)}); free some space, and --resume "
                "continues from the last complete checkpoint"
            ) from error
        if is_out_of_memory(error):
            raise RunStopped(
                f"{folder}: memory ran out where no batch could be smaller; the page on troubleshooting names what to "
                "lower, and --resume --accept_changes continues from the last complete checkpoint"
            ) from error
        raise
