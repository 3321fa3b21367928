"""Time limits for scoring."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any, TypeVar

from bridle.constraints.base import Score
from bridle.utils.progress import Progress

T = TypeVar("T")

BATCH = 64
"""Texts in one `timeout` of a constraint without its own batch size."""


class TimedOut(Exception):  # noqa: N818 - an event, as `RunStopped` is
    """Work took too long. The message is the reason of the missing scores."""

    def __init__(self, seconds: float):
        super().__init__(f"timed out: {seconds:g} s are over for its batch")


def within(seconds: float, work: Callable[[], T]) -> T:
    """Runs `work` in a thread, and returns what it returns or raises what it raises; raises TimedOut if it is late.

    The thread cannot be stopped then; it ends with the process at the latest.
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
        if done.done():  # just now, or the work itself raised it
            return done.result()
        raise TimedOut(seconds) from None


def batches(items: Sequence[T], size: int = BATCH) -> list[Sequence[T]]:
    """Splits items into batches of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def scored(
    name: str, parts: Sequence[Sequence[T]], score: Callable[[Sequence[T]], Sequence[Any]], seconds: float
) -> Iterator[Any]:
    """Yields the scores of each batch, missing for one that takes longer than `seconds`, and shows progress."""
    with Progress(f"scoring ({name})", sum(map(len, parts)), "texts") as progress:
        for part in parts:
            try:
                yield from within(seconds, partial(score, part))
            except TimedOut as late:
                yield from [Score.missing(str(late))] * len(part)
            progress.update(len(part))
