"""Evaluation of a model's outputs and knowledge, each figure with its uncertainty."""

from bridle.evaluation.evaluator import Evaluator
from bridle.evaluation.generation import (
    GenerationResult,
    distinct,
    evaluate_constraints,
    evaluate_generations,
    generate_completions,
    output_perplexity,
)
from bridle.evaluation.judge_examination import HumanText, JudgeExamination, examine_judge
from bridle.evaluation.judges import ChatJudge, Comparison, LikelihoodJudge, LocalJudge, Verdict
from bridle.evaluation.prompt_sets import PromptSet, prompt_set
from bridle.evaluation.results import FORMAT, read_results, validate_results, write_results
from bridle.evaluation.served import ServedModel
from bridle.evaluation.statistics import (
    Estimate,
    bootstrap_interval,
    compare_methods,
    holm,
    mcnemar,
    paired_bootstrap,
    wilson_interval,
)
from bridle.evaluation.utility import Perplexity, TextLikelihood, likelihoods, perplexity
from bridle.evaluation.win_rate import WinRates, read_methods, win_rates

__all__ = [
    "FORMAT",
    "ChatJudge",
    "Comparison",
    "Estimate",
    "Evaluator",
    "GenerationResult",
    "HumanText",
    "JudgeExamination",
    "LikelihoodJudge",
    "LocalJudge",
    "Perplexity",
    "PromptSet",
    "ServedModel",
    "TextLikelihood",
    "Verdict",
    "WinRates",
    "bootstrap_interval",
    "compare_methods",
    "distinct",
    "evaluate_constraints",
    "evaluate_generations",
    "examine_judge",
    "generate_completions",
    "holm",
    "likelihoods",
    "mcnemar",
    "output_perplexity",
    "paired_bootstrap",
    "perplexity",
    "prompt_set",
    "read_methods",
    "read_results",
    "validate_results",
    "wilson_interval",
    "win_rates",
    "write_results",
]
