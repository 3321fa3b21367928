"""Where and how a result was made: versions, git, devices, the command and its seed."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("bridle", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def environment(seed: int) -> dict[str, Any]:
    """Returns where and how a result was made, as JSON values.

    They are `versions` of Python and the libraries (None if one is not installed), `git` (the commit of the working
    directory's repository and whether tracked files differ from it; None outside a repository), `platform`, `devices`
    (names of the accelerators), `threads`, `command` (without the hub's token), `seed` and `time` (UTC, ISO 8601).
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
    """Returns an argument list with stars in place of the hub's token."""
    hidden = []
    for before, argument in zip(["", *command], command, strict=False):
        option, equals, _ = argument.partition("=")
        value = "***" if _is_token(before) else argument
        hidden.append(f"{option}=***" if equals and _is_token(option) else value)
    return hidden


def _is_token(option: str) -> bool:
    return option.replace("-", "_") == "__hub_token"


@cache
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
    """Returns git's output; None without git, a repository or a commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
