"""Loading of weights without pickles, foreign code and the libraries' own reports."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging


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


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences transformers' reports on weights and settings; the caller reports what matters in one line."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
