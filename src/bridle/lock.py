"""One writer for a folder: a second run on it is refused, and a dead one holds nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bridle.errors import UserError, first_line


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
