"""What a result needs beside it to be believed later, and a file that is whole or not there at all."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from bridle.errors import UserError

PACKAGES = ("bridle", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def environment(seed: int) -> dict[str, Any]:
    """Where and how a result was made, ready for `write_json`.

    Args:
        seed: the seed the run was given.

    Returns:
        `versions` of Python and the libraries (`None` where one is not installed), `git` (commit of the
        working directory's repository and whether tracked files differ from it; `None` outside a
        repository), `platform`, `devices` (names of the accelerators), `threads`, `command` (the
        argument list, without the hub's token), `seed` and `time` (UTC, ISO 8601).
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": _git_state(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "command": redacted(sys.argv),
        "seed": seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def redacted(command: Sequence[str]) -> list[str]:
    """An argument list with stars in the place of the hub's token."""
    hidden = []
    for before, argument in zip(["", *command], command, strict=False):
        option, equals, _ = argument.partition("=")
        value = "***" if _is_token(before) else argument
        hidden.append(f"{option}=***" if equals and _is_token(option) else value)
    return hidden


def _is_token(option: str) -> bool:
    return option.replace("-", "_") == "__hub_token"


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    """What git prints, or `None` where there is no git, no repository or no commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
