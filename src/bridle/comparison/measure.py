"""Measuring one candidate on everything a plan names, through the same evaluator as `bridle evaluate`."""

from pathlib import Path
from typing import Any

from bridle.comparison.methods import Candidate
from bridle.comparison.plan import Evaluation
from bridle.data import texts_of
from bridle.evaluation import FORMAT, Evaluator
from bridle.models.guidance import guided
from bridle.models.loading import load_for_inference
from bridle.recipes.recipe import Recipe
from bridle.utils.provenance import environment


def measure(candidate: Candidate, plan: Evaluation, recipe: Recipe, folder: Path, seed: int) -> dict[str, Any]:
    """A candidate's figures, in the format of `results.json`; what they were made from is written to `folder`.

    Args:
        candidate: what is measured.
        plan: on what.
        recipe: its base model reads the completions, for their perplexity.
        folder: where the observations go.
        seed: of sampling and bootstraps.
    """
    model, tokenizer = load_for_inference(candidate.model, recipe.dtype)
    base = load_for_inference(recipe.model, recipe.dtype)
    with guided(model, candidate.guide) as guide:
        evaluator = Evaluator(model, tokenizer, guide, plan.batch_size, seed)
        results: dict[str, Any] = {
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
    return results | {"environment": environment(seed)}
