"""SIGINT and SIGTERM end a process where its work can end, with a report of what is kept."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):  # not an Exception, so that no handler of errors catches it
    """The process received a signal to end.

    Attributes:
        signal: its number.
        kept: which work is kept, in words; "" if none was to be kept.
    """

    def __init__(self, number: int, kept: str = ""):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.signal, self.kept = number, kept


class _Interruption:
    """Whether a signal came, and whether it is deferred."""

    def __init__(self) -> None:
        self.deferred = False
        self.pending: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: raises `Interrupted`, or defers the first one."""
        if not self.deferred or self.pending is not None:
            self.pending = None
            raise Interrupted(number)
        self.pending = number

    @contextmanager
    def at(self, deferred: bool) -> Iterator[None]:
        before, self.deferred = self.deferred, deferred
        try:
            if not deferred:
                raise_pending()
            yield
        finally:
            self.deferred = before


_interruption = _Interruption()


def is_pending() -> bool:
    """Whether a deferred signal waits for the current work to finish."""
    return _interruption.pending is not None


def raise_pending() -> None:
    """Raises `Interrupted` if a signal `is_pending`."""
    number, _interruption.pending = _interruption.pending, None
    if number is not None:
        raise Interrupted(number)


@contextmanager
def deferring() -> Iterator[None]:
    """Defers a signal during the block, which checks `is_pending` where it can end; a second signal ends it at once."""
    with _interruption.at(deferred=True):
        yield
    raise_pending()


@contextmanager
def at_once() -> Iterator[None]:
    """Lets a signal end the block, within `deferring`, at once."""
    with _interruption.at(deferred=False):
        yield


@contextmanager
def catching_signals() -> Iterator[None]:
    """Handles SIGINT and SIGTERM in the block, for the main thread: they raise `Interrupted` or are deferred."""
    before = {number: signal.signal(number, _interruption.handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
