"""Files: JSON and text with errors that name file, row and key; atomic writes; a folder's lock; the cache folder."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from math import isfinite
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from pydantic import TypeAdapter, ValidationError

from bridle.errors import UserError, first_line

LOCK = ".lock"  # of a folder, held by the process that writes there

T = TypeVar("T")


def cache_folder() -> Path:
    """Returns `$BRIDLE_CACHE`, or else the folder `bridle` in the user's cache folder."""
    return Path(os.environ.get("BRIDLE_CACHE") or user_cache_path("bridle")).expanduser()


# ------------------------------------------------------------------- reading


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads UTF-8 text. Raises UserError if the file cannot be read or is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def read_json(path: str | os.PathLike[str], kind: type[T]) -> T:
    """Reads a JSON file as `kind`. Raises UserError as `read_text`, `parse` and `checked` do."""
    return checked(kind, parse(read_text(path), str(path)), str(path))


def read_rows(path: str | os.PathLike[str], *, grows: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place, for errors, and the mapping of each row of a JSON lines file; skips blank lines.

    A file that `grows` is written to by another process: a part of a row at its end is left out.
    """
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path} row {number}"
        try:
            row = parse(line, place)
        except UserError:
            if grows and number == len(lines):
                return
            raise
        yield place, checked(dict[str, Any], row, place)


def parse(text: str, place: str) -> Any:
    """Parses JSON, with None for numbers that are not finite. Raises UserError if it is malformed."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: malformed JSON: {error}") from error


def checked(kind: type[T], value: Any, place: str) -> T:
    """Converts a JSON value to a dataclass or another type, without unknown fields.

    Raises UserError, with place and key, if a value is wrong or missing.
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


def digest(value: Any) -> str:
    """The SHA-256 of a JSON value, whatever the order of its keys."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------- writing


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises a UserError that names the file if the block cannot write it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which replaces `path` when the block ends; creates missing parent folders.

    A reader sees the old file or the new one, never a part; if the block fails, the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a rename is atomic only within a file system
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Yields a folder to write to, whose files replace those in `folder` when the block ends. Other files stay."""
    temporary = folder / ".unfinished"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that died
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
    """Waits until every file below a folder is on the disk."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    with path.open("r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text with `atomic_file`, or raises UserError; lone surrogates become "?"."""
    with writing(path), atomic_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes JSON as `write_text` does. Raises ValueError for NaN and infinities, which are not JSON."""
    try:
        text = json.dumps(obj, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written, since JSON cannot hold it: {error}") from error
    write_text(path, text + "\n")


def write_rows(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Writes JSON lines as `write_text` does, without escaping characters."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Appends UTF-8 text; if the disk has no room for all of it, appends nothing and raises OSError."""
    content = text.encode("utf-8", errors="replace")
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        if file.write(content) < len(content):
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))


def check_output(*paths: str | os.PathLike[str] | None) -> None:
    """Raises UserError if an output file, unless None, cannot be written: for use before long work."""
    for path in (Path(path) for path in paths if path is not None):
        with writing(path):
            if path.is_dir():
                raise UserError(f"{path}: is a folder; name a file")
            with TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
                pass  # writing creates the folders below it


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Locks a folder for this process while the block runs; creates the folder if it is missing.

    The operating system drops the lock when the process ends, however it ends. Raises UserError if another process
    holds the lock, or the folder cannot be created or written to.
    """
    folder = Path(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another run is writing here; wait for it, or name another --output_dir") from None
    except (OSError, ValueError) as error:  # ValueError: not a possible path
        raise UserError(f"{folder}: cannot be written to ({first_line(error)}); name another --output_dir") from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: str | Path) -> bool | None:
    """Whether a process holds the lock of `only_writer`; None where nobody has held it, or it cannot be known."""
    path = Path(folder) / LOCK
    try:
        if not path.exists():
            return None
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, ValueError):
        return None
