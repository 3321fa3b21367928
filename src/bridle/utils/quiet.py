"""Silences libraries."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Hides the progress bars of `transformers` and `datasets` in this process; long phases have our own."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def only_errors(*loggers: str) -> Iterator[None]:
    """Silences the warnings of loggers, and what they report below that, during the block."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
