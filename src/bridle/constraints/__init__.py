"""Policies on whole outputs: prompt and completion in, score out. No model under training is known here."""

from bridle.constraints.async_scoring import AsyncScoring
from bridle.constraints.base import AllOf, AnyOf, Constraint, Not, Score
from bridle.constraints.cache import Cached, ScoreCache
from bridle.constraints.classifier import Classifier
from bridle.constraints.function import PythonFunction
from bridle.constraints.guard import Guard
from bridle.constraints.nli import NLI
from bridle.constraints.reading import Given, Messages, Reads
from bridle.constraints.remote import Remote
from bridle.constraints.reward import Reward
from bridle.constraints.rules import Length, Regex, WordList
from bridle.constraints.similarity import Similarity
from bridle.constraints.spec import build_constraint

__all__ = [
    "NLI",
    "AllOf",
    "AnyOf",
    "AsyncScoring",
    "Cached",
    "Classifier",
    "Constraint",
    "Given",
    "Guard",
    "Length",
    "Messages",
    "Not",
    "PythonFunction",
    "Reads",
    "Regex",
    "Remote",
    "Reward",
    "Score",
    "ScoreCache",
    "Similarity",
    "WordList",
    "build_constraint",
]
