"""Policies on whole outputs: prompt and completion in, score out. No model under training is known here."""

from bridle.constraints.async_scoring import AsyncScoring
from bridle.constraints.base import AllOf, AnyOf, Constraint, Not, Score
from bridle.constraints.cache import Cached, ScoreCache
from bridle.constraints.classifier import Classifier
from bridle.constraints.function import PythonFunction
from bridle.constraints.reading import Given, Messages, Reads
from bridle.constraints.remote import Remote
from bridle.constraints.rules import Length, Regex, WordList
from bridle.constraints.spec import build_constraint

__all__ = [
    "AllOf",
    "AnyOf",
    "AsyncScoring",
    "Cached",
    "Classifier",
    "Constraint",
    "Given",
    "Length",
    "Messages",
    "Not",
    "PythonFunction",
    "Reads",
    "Regex",
    "Remote",
    "Score",
    "ScoreCache",
    "WordList",
    "build_constraint",
]
