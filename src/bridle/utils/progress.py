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
    """Counts work done, with its rate and the time left.

    Use it as a context manager and call `update(n)`, or iterate over `track(...)`. Of several processes that work on
    one run only the main one shows anything.

    Args:
        description: what is being done, e.g. "sampling".
        total: how many units there are, if known.
        unit: the name of one unit, e.g. "texts".
        shown: whether anything is.
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
        """Counts `n` more units as done."""
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
        """Ends the display; a phase long enough to have shown a line shows its last one."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown and time.monotonic() - self.started >= PLAIN_LINE_EVERY:
            self._print_line()

    def _print_line(self) -> None:
        elapsed = time.monotonic() - self.started
        print(
            tqdm.format_meter(
                self.done, self.total, elapsed, ncols=80, prefix=self.description, unit=self.unit, ascii=True
            ),
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yields `items` and shows how far they are."""
    with Progress(description, total, unit) as progress:
        for item in items:
            yield item
            progress.update()
