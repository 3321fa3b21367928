"""Measures one model on everything a plan names, for `bridle evaluate` and each method of `bridle compare`."""

from collections.abc import Callable
from typing import Any

from bridle.comparison.plan import Evaluation
from bridle.data import texts_of
from bridle.evaluation.evaluator import Evaluator
from bridle.evaluation.observations import Observations
from bridle.evaluation.results import FORMAT
from bridle.evaluation.served import ServedModel
from bridle.models.guidance import guided
from bridle.models.loading import load_for_inference, load_tokenizer
from bridle.utils.provenance import environment


def measure(
    model: str,
    plan: Evaluation,
    *,
    guide: str | None = None,
    guidance_scale: float = 1.0,
    base: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
    show: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Observations]:
    """A model's figures, in the format of `results.json`, and the observations behind them.

    Args:
        base: the model for the perplexity of the completions; not measured if not given.
        show: called with each figure.

    Raises:
        UserError: a model or a file cannot be used, or a prompt leaves no room for a completion.
    """
    plan.check_tasks()
    held_out = {name: texts_of(source) for name, source in plan.perplexity.items()}
    lm, tokenizer = load_for_inference(model, dtype, device)
    base_model = load_for_inference(base, dtype, device) if base else None
    results = _described(plan) | {"model": model, "guide": guide, "settings": {"guidance_scale": guidance_scale}}
    with guided(lm, guide, guidance_scale) as guidance:
        evaluator = Evaluator(lm, tokenizer, guidance, plan.batch_size, seed, show)
        results |= evaluator.generation(list(plan.prompts.values()), plan.constraints, base=base_model)
        results["perplexity"] = evaluator.perplexity(held_out)
        if plan.classification and plan.label:
            rows = plan.classification.test, plan.classification.validation
            results["classification"] = evaluator.classification(*rows, plan.label)
        if plan.tasks:
            results["tasks"] = evaluator.tasks(plan.tasks, task_data=plan.task_data, limit=plan.limit, shots=plan.shots)
    return results | {"environment": environment(seed)}, evaluator.observations


def measure_served(
    url: str,
    plan: Evaluation,
    *,
    name: str,
    tokenizer: str | None = None,
    api_key_env: str | None = None,
    seed: int = 0,
    show: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Observations]:
    """As `measure`, what can be measured of a model behind a server: its completions.

    Args:
        url: of an OpenAI-compatible interface.
        name: of the model, as the server knows it.
        tokenizer: folder or name of its tokenizer, which counts the tokens of prompts.
        api_key_env: environment variable that holds the key.

    Raises:
        UserError: as `measure` and `ServedModel`.
    """
    counting = None if tokenizer is None else load_tokenizer(tokenizer)
    served = ServedModel(url, name, counting, api_key_env, seed, show)
    results = _described(plan) | {"model": name, "settings": {"server": url, "tokenizer": tokenizer}}
    results |= served.generation(list(plan.prompts.values()), plan.constraints)
    return results | {"environment": environment(seed)}, served.observations


def _described(plan: Evaluation) -> dict[str, Any]:
    """What the figures will be of."""
    return {
        "format": FORMAT,
        "prompt_sets": {name: prompts.describe() for name, prompts in plan.prompts.items()},
        "constraints": {name: constraint.describe() for name, constraint in plan.constraints.items()},
    }
