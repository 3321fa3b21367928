"""Files: read with errors that name file, row and key; written whole or not at all; and a folder with one writer."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from math import isfinite
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

from filelock import FileLock, Timeout
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


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as JSON, atomically: a reader sees the old file or the new one, never a part.

    Missing folders on the way are made.

    Raises:
        ValueError: `obj` holds NaN or an infinity, which are not JSON. What was at `path` stays.
        UserError: the file cannot be written.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written, since JSON cannot hold it: {error}") from error
    write_text(path, text + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text, atomically, as `write_json` does; lone surrogates become "?".

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    try:
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error


def write_rows(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Writes JSON lines, atomically, as `write_text` does; characters stand as they are.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check_output(*paths: str | os.PathLike[str] | None) -> None:
    """Makes sure that files can be written, before hours of work are done for them; None is no file.

    Raises:
        UserError: one of them is a folder, or its own folder cannot be written to.
    """
    for path in (Path(path) for path in paths if path is not None):
        try:
            if path.is_dir():
                raise UserError(f"{path}: is a folder; name a file")
            with TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
                pass  # the folders below are made when the file is
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}).") from error


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Adds UTF-8 text to a file, all of it or, where the disk has no room for that, nothing.

    Raises:
        OSError: it cannot be written.
    """
    content = text.encode("utf-8", errors="replace")
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        if file.write(content) < len(content):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; what is there at the block's end is put on the disk and takes `path`'s place at once.

    Missing folders on the way are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write files to; at the block's end each takes its place in `folder` at once. Others there stay."""
    temporary = folder / ".unfinished"
    shutil.rmtree(temporary, ignore_errors=True)  # a dead run's
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_files(temporary)
        for file in [path for path in temporary.rglob("*") if path.is_file()]:
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_files(folder: str | os.PathLike[str]) -> None:
    """Waits until every file below a folder is on the disk, so that what is written next says so truly."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Holds a folder, which is made if it is not there, for the process that runs the block.

    The lock is the operating system's: it ends with its process, however that ends. The file it is held on stays.

    Raises:
        UserError: another process holds the folder, or it cannot be made or written to.
    """
    folder = Path(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another run is writing here; wait for it, or name another --output_dir") from None
    except (OSError, ValueError) as error:  # ValueError: no possible path
        raise UserError(f"{folder}: cannot be written to ({first_line(error)}); name another --output_dir") from error
    try:
        yield
    finally:
        lock.release()
