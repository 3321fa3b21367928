"""How long the phases of a round take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Notes under `phase` how long the block takes."""
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started
