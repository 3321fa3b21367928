"""One progress display for every phase: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from bridle.errors import plain
from bridle.utils.distributed import is_main

T = TypeVar("T")

PLAIN_LINE_EVERY = 10.0  # seconds between two lines where there is no terminal


class Progress:
    """Shows work done, its rate and the time left, as a context manager. Only a run's main process shows it.

    Args:
        description: of the work, e.g. "sampling".
        total: number of units, if known.
        unit: name of the units, e.g. "texts".
        shown: false hides it.
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "it", shown: bool = True):
        self.description, self.total, self.unit = plain(description), total, unit
        self.done, self.started = 0, time.monotonic()
        self._last_line = self.started
        self._bar = None
        self._shown = shown and is_main()
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(desc=self.description, total=total, unit=unit, leave=False, dynamic_ncols=True)

    def update(self, n: int = 1) -> None:
        """Adds `n` units."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._shown and time.monotonic() - self._last_line >= PLAIN_LINE_EVERY:
            self._last_line = time.monotonic()
            self._print_line()

    def write(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(plain(line), file=sys.stderr)
        elif self._shown:
            print(plain(line), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the display, with a last line if the phase was long enough to have shown one."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown and time.monotonic() - self.started >= PLAIN_LINE_EVERY:
            self._print_line()

    def _print_line(self) -> None:
        rate = (self.done, self.total, time.monotonic() - self.started)
        line = tqdm.format_meter(*rate, ncols=80, prefix=self.description, unit=self.unit, ascii=True)
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yields `items` and shows progress."""
    with Progress(description, total, unit) as progress:
        for item in items:
            yield item
            progress.update()
