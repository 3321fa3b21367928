"""Time limits for scoring."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

BATCH = 64
"""Texts in one `timeout` of a constraint without its own batch size."""


class TimedOut(Exception):  # noqa: N818 - an event, as `RunStopped` is
    """Work took too long. The message is the reason of the missing scores."""

    def __init__(self, seconds: float):
        super().__init__(f"timed out: {seconds:g} s are over for its batch")


def within(seconds: float, work: Callable[[], T]) -> T:
    """Runs `work` in a thread, and returns what it returns or raises what it raises.

    Raises:
        TimedOut: it takes longer. The thread cannot be stopped; it ends with the process at the latest.
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
        if done.done():  # raised by the work itself
            raise
        raise TimedOut(seconds) from None


def batches(items: Sequence[T], size: int = BATCH) -> Iterator[Sequence[T]]:
    """Yields the items in parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
