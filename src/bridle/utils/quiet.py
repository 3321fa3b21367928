"""Silences libraries."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
