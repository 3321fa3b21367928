"""Models whose memory runs out and disks that are full, for tests of what is done then."""

import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch


@contextmanager
def room_for(module, rows, *, training=False, backward=False, after=0):
    """Inside the block a module has memory for so many rows at once; yields how many there were when it ran out.

    Args:
        after: so many batches, each may be as large as it likes.
        training: only batches in training mode count.
        backward: memory runs out as the gradient comes back to the module and not on the way there.
    """
    seen, refused = [], []

    def refuse(count):
        refused.append(count)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def check(module, _, batch):
        if training and not module.training:
            return
        seen.append(len(batch))
        if len(batch) > rows and len(seen) > after:
            if not backward:
                refuse(len(batch))
            batch.register_hook(lambda gradient: refuse(len(gradient)))

    handle = module.register_forward_hook(check)
    try:
        yield refused
    finally:
        handle.remove()


@dataclass
class Disk:
    """A file system of its own.

    Attributes:
        folder: where it is mounted.
    """

    folder: Path

    def resize(self, size):
        """Gives it so many bytes; what is on it stays."""
        subprocess.run(["mount", "-o", f"remount,size={int(size)}", self.folder], check=True)


@contextmanager
def mounted(folder, size):
    """A disk of so many bytes; the test is skipped where none can be mounted."""
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` to make a small disk with")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small disk can be mounted: {made.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # targets may still be mapped into memory


def used(folder):
    """Bytes that a folder's files take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*"))
