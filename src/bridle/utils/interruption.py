"""SIGINT and SIGTERM: what may not be cut short is finished first, and the end says what was kept."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):  # no Exception: nothing that makes the best of errors is to go on after it
    """The process was asked to end.

    Attributes:
        signal: the signal's number.
        kept: what of the work is kept, for people; empty if nothing was to be kept.
    """

    def __init__(self, number: int, kept: str = ""):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.signal, self.kept = number, kept


class _Interruption:
    """Whether a signal came, and whether it waits for work to be finished."""

    def __init__(self) -> None:
        self.deferred = False
        self.pending: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler: raises `Interrupted`, or keeps the first signal for later where it is deferred."""
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
    """Whether a signal came that is to end the process once the work under way is finished."""
    return _interruption.pending is not None


def raise_pending() -> None:
    """Raises `Interrupted` if a signal `is_pending`."""
    number, _interruption.pending = _interruption.pending, None
    if number is not None:
        raise Interrupted(number)


@contextmanager
def deferring() -> Iterator[None]:
    """Work that looks at `is_pending` at places where it can end; a second signal ends it at once."""
    with _interruption.at(deferred=True):
        yield
    raise_pending()


@contextmanager
def at_once() -> Iterator[None]:
    """Work within `deferring` that can end anywhere."""
    with _interruption.at(deferred=False):
        yield


@contextmanager
def catching_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted`, or wait: see `deferring`. For the main thread."""
    before = {number: signal.signal(number, _interruption.handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
