"""Models that are refused for what they are: pickled weights, which run code when they are read, and code itself."""

import os
from pathlib import Path


def refusal(name: str | Path, error: Exception) -> str | None:
    """Why the model of a folder or hub name is refused, given what a library raised; None if it fails otherwise."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which Bridle does not run; use a model that transformers knows by itself"
    if os.path.isdir(name) and holds(name, "*.bin") and not holds(name, "*.safetensors"):
        return "its weights are pickled; convert them: load them with transformers, and save_pretrained to a new folder"
    return None


def holds(folder: str | Path, pattern: str) -> bool:
    """Whether a folder has a file of such a name."""
    return any(Path(folder).glob(pattern))
