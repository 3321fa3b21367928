"""Loading weights: what is refused for what it is, pickles and code, and the libraries' reports held back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging


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


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Holds back what transformers reports of weights and settings: who loads them says in one line what matters."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
