"""Folders in the user's cache, each named by a hash of its inputs."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock

from bridle.errors import UserError
from bridle.utils.files import cache_folder, digest
from bridle.utils.oom import is_disk_full

KEPT = 4  # folders of one name: those used last


def cached(name: str, shaped_by: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """Returns a folder that `make` has filled, now or in an earlier call with the same inputs.

    The folder appears once it is complete; of two processes the second waits for the first.

    Args:
        name: prefix of the folder's name.
        shaped_by: inputs that determine the content, as JSON.
        make: fills an empty folder.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache_folder() / f"{name}-{digest(shaped_by)[:16]}"
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.is_dir():
                    _fill(folder, make)
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_full(error):
            raise
        raise UserError(f"{folder.parent}: cannot be written ({error}); set BRIDLE_CACHE to a folder") from error
    with suppress(OSError):  # a read-only cache still serves
        folder.touch()
        _drop_old(folder.parent, name)
    return folder


def _fill(folder: Path, make: Callable[[Path], None]) -> None:
    unfinished = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _drop_old(caches: Path, name: str) -> None:
    folders = [path for path in caches.glob(f"{name}-*") if path.is_dir()]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)
