"""Reading back what Bridle wrote: whatever has become of a file since, it is told in one line by file, row and key."""

import json
import os
from collections.abc import Iterator
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from bridle.errors import UserError, first_line

T = TypeVar("T")


def read_text(path: str | os.PathLike[str]) -> str:
    """A file's text.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def read_json(path: str | os.PathLike[str], kind: type[T]) -> T:
    """A file's JSON, as `kind` wants it.

    Raises:
        UserError: as `read_text`, `parse` and `checked`.
    """
    return checked(kind, parse(read_text(path), str(path)), str(path))


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of JSON lines, each with its place for an error; blank lines are none.

    Raises:
        UserError: as `read_text` and `parse`, or a row is no mapping.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path} row {number}"
            yield place, checked(dict[str, Any], parse(line, place), place)


def parse(text: str, place: str) -> Any:
    """JSON, in which a number that is not finite is missing.

    Raises:
        UserError: it is none.
    """
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: malformed JSON: {error}") from error


def checked(kind: type[T], value: Any, place: str) -> T:
    """A JSON value as a dataclass or another type, fields of which nothing is known left out.

    Raises:
        UserError: naming the place and the key whose value is wrong or missing.
    """
    try:
        return _adapter(kind).validate_python(value)  # type: ignore[arg-type]  # a class is hashable
    except ValidationError as error:
        mistake = error.errors()[0]
        key = ".".join(map(str, mistake["loc"]))
        raise UserError(f"{place}: {f'{key}: ' * bool(key)}{mistake['msg'].lower()}") from error


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if isfinite(number) else None
