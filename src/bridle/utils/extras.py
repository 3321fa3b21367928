"""Packages that only an extra of Bridle installs, as in `pip install ".[eval]"`."""

from collections.abc import Iterator
from contextlib import contextmanager

from bridle.errors import UserError


@contextmanager
def needs_extra(extra: str, feature: str) -> Iterator[None]:
    """Names the extra that installs what the block imports.

    Args:
        extra: its name in Bridle's package metadata.
        feature: what needs it, in the user's words.

    Raises:
        UserError: a module that the block imports is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UserError(f"{feature}: needs the package {package}; {to_install(extra)}") from error


def to_install(extra: str) -> str:
    """What a user does to get an extra, for errors."""
    return f'run pip install ".[{extra}]" in the copy of the repository'
