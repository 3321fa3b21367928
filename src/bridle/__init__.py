"""Bridle: fine-tune a language model on a corpus while holding its outputs to a policy.

Meng et al., "Attribute Controlled Fine-tuning for Large Language Models: A Case Study on Detoxification",
Findings of EMNLP 2024.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridle.constraints import Classifier, Constraint, Length, Regex, Score, WordList, build_constraint
    from bridle.models.auxiliary import AuxiliaryModel, load_auxiliary
    from bridle.models.guidance import NADOGuide
    from bridle.models.monitor import Monitor
    from bridle.training.config import ConstrainedConfig, Regulariser
    from bridle.training.trainer import ConstrainedTrainer

__version__ = version("bridle")

_HOMES = {
    "Classifier": "bridle.constraints",
    "Constraint": "bridle.constraints",
    "Length": "bridle.constraints",
    "Regex": "bridle.constraints",
    "Score": "bridle.constraints",
    "WordList": "bridle.constraints",
    "build_constraint": "bridle.constraints",
    "AuxiliaryModel": "bridle.models.auxiliary",
    "load_auxiliary": "bridle.models.auxiliary",
    "Monitor": "bridle.models.monitor",
    "NADOGuide": "bridle.models.guidance",
    "ConstrainedConfig": "bridle.training.config",
    "Regulariser": "bridle.training.config",
    "ConstrainedTrainer": "bridle.training.trainer",
}

__all__ = [
    "AuxiliaryModel",
    "Classifier",
    "ConstrainedConfig",
    "ConstrainedTrainer",
    "Constraint",
    "Length",
    "Monitor",
    "NADOGuide",
    "Regex",
    "Regulariser",
    "Score",
    "WordList",
    "build_constraint",
    "load_auxiliary",
]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: importing everything takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bridle' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
