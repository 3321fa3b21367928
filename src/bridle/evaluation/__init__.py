"""Measuring what a model says and what it knows, each figure with its uncertainty."""

from bridle.evaluation.generation import (
    GenerationResult,
    distinct,
    evaluate_generations,
    generate_completions,
    score_completions,
    summarise,
)
from bridle.evaluation.statistics import (
    Estimate,
    bootstrap_interval,
    estimate_mean,
    estimate_rate,
    wilson_interval,
)
from bridle.evaluation.utility import Perplexity, TextLikelihood, likelihoods, perplexity

__all__ = [
    "Estimate",
    "GenerationResult",
    "Perplexity",
    "TextLikelihood",
    "bootstrap_interval",
    "distinct",
    "estimate_mean",
    "estimate_rate",
    "evaluate_generations",
    "generate_completions",
    "likelihoods",
    "perplexity",
    "score_completions",
    "summarise",
    "wilson_interval",
]
