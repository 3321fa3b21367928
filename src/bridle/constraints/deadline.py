"""Scoring that takes too long is given up."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

BATCH = 64
"""Texts that a constraint without batches of its own scores within one `timeout`."""


class TimedOut(Exception):  # noqa: N818 - an event, as `RunStopped` is
    """Work was not done in time. The message is the reason of the scores that are missing."""

    def __init__(self, seconds: float):
        super().__init__(f"timed out: {seconds:g} s are over for its batch")


def within(seconds: float, work: Callable[[], T]) -> T:
    """Returns what `work` returns, or raises what it raises. It runs in a thread of its own.

    Raises:
        TimedOut: it is not done in time. Nothing can stop a thread, so it goes on, and ends with the process at last.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # SystemExit too
            done.set_exception(error)

    Thread(target=run, name="scoring in time", daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():  # it is the work's own
            raise
        raise TimedOut(seconds) from None


def batches(items: Sequence[T], size: int = BATCH) -> Iterator[Sequence[T]]:
    """Yields the items in parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
