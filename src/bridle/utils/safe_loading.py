"""Loading of weights without pickles and foreign code."""

import os
import re
from pathlib import Path

FILES = (".gguf", ".safetensors", ".json", ".jsonl", ".csv", ".parquet", ".txt", ".yaml", ".jinja", ".j2")
"""How names of files end, and of no model on the hub."""

ON_THE_HUB = {"cache_dir", "revision", "subfolder", "token", "local_files_only"}
"""Options of `from_pretrained` that say where a file is."""


def refusal(name: str | Path, error: Exception) -> str | None:
    """Returns why a model is refused, given a library's error; None if it fails for another reason."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which Bridle does not run; use a model that transformers supports"
    if os.path.isdir(name) and holds(name, "*.bin") and not holds(name, "*.safetensors"):
        return "its weights are pickled; convert them: load them with transformers, and save_pretrained to a new folder"
    return None


def holds(folder: str | Path, pattern: str) -> bool:
    """Whether a folder has a file whose name matches a pattern."""
    return any(Path(folder).glob(pattern))


def is_path(name: str) -> bool:
    """Whether a model's name can only be a folder or a file, so that the hub need not be asked."""
    hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
    return hub_name is None or name.lower().endswith(FILES)
