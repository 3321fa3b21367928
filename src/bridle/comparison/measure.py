"""Measuring one candidate on everything a plan names, through the same evaluator as `bridle evaluate`."""

from pathlib import Path

import torch

from bridle.comparison.methods import Candidate
from bridle.comparison.plan import Evaluation
from bridle.data import texts_of
from bridle.environment import environment
from bridle.evaluation import FORMAT, Evaluator, write_results
from bridle.evaluation.observations import Observations
from bridle.models.guidance import guided
from bridle.models.loading import load_model, load_tokenizer
from bridle.training.recipe import Recipe


def measure(candidate: Candidate, plan: Evaluation, recipe: Recipe, folder: Path, seed: int) -> Observations:
    """Writes a candidate's `results.json`, and beside it what the figures were made from.

    Args:
        candidate: what is measured.
        plan: on what.
        recipe: its base model reads the completions, for their perplexity.
        folder: where the files go.
        seed: of sampling and bootstraps.
    """
    model, tokenizer = _load(candidate.model, recipe.dtype)
    base = _load(recipe.model, recipe.dtype)
    with guided(model, candidate.guide) as guide:
        evaluator = Evaluator(model, tokenizer, guide, plan.batch_size, seed)
        results = {
            "format": FORMAT,
            "model": candidate.model,
            "guide": candidate.guide,
            "settings": {"samples": plan.samples, "max_new_tokens": plan.max_new_tokens},
            "prompt_sets": {name: prompts.describe() for name, prompts in plan.prompts.items()},
            "constraints": {name: constraint.describe() for name, constraint in plan.constraints.items()},
        }
        results |= evaluator.generation(
            list(plan.prompts.values()),
            plan.constraints,
            samples=plan.samples,
            max_new_tokens=plan.max_new_tokens,
            base=base,
        )
        held_out = {name: texts_of(source) for name, source in plan.perplexity.items()}
        results["perplexity"] = evaluator.perplexity(held_out)
        if plan.classification and plan.label:
            rows = plan.classification.test, plan.classification.validation
            results["classification"] = evaluator.classification(*rows, plan.label)
        if plan.tasks:
            results["tasks"] = evaluator.tasks(plan.tasks, task_data=plan.task_data, limit=plan.limit, shots=plan.shots)
    evaluator.observations.write(folder)
    write_results(folder / "results.json", results | {"environment": environment(seed)})
    return evaluator.observations


def _load(name: str, dtype: str):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(name, dtype=dtype, device=device), load_tokenizer(name)
