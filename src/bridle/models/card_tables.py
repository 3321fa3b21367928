"""What the tables of a model card show: of a recipe, of its run, and of what was measured afterwards."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from bridle.constraints.spec import RETENTION
from bridle.models.card_text import (
    MISSING,
    interval,
    number,
    one_line,
    set_name,
    setting_text,
    source_text,
)
from bridle.models.sampling import Decoding

NO_FIT = dict.fromkeys(("kept", "none"), "no fit: all labels alike") | {"unlabelled": "no fit: no label"}

ROUND_SETTINGS = (
    *("schedule", "rounds", "rollouts_per_round", "max_new_tokens", "prompt_tokens", "max_missing", "entropy_floor"),
    "auxiliary",
)
SETTINGS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    *("packing", "optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("dtype", "bf16", "fp16", "lora", "seed"),
    # Of reinforcement learning:
    *("algorithm", "beta", "num_generations", "batch_size", "soft_reward", "max_completion_length"),
)
"""The keys of a recipe that a card shows, where they are set. Any other key, such as a token, never appears."""


class Figure(NamedTuple):
    """One measured number: its metric in words and as an identifier, what it was measured on, and the estimate."""

    words: str
    metric: str
    on: str
    estimate: Mapping[str, Any]


def tables(
    recipe: Mapping[str, Any],
    rows: Mapping[str, int],
    environment: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
) -> dict[str, Any]:
    """The tables of `card.md.jinja` by the names that it gives them; the arguments are those of `write_card`."""
    constraints, regularisers = (recipe.get(key) or {} for key in ("constraints", "regularisers"))
    return {
        "constraints": {name: setting_text(spec) for name, spec in constraints.items()},
        "data": _data(recipe, rows),
        "regularisers": [_regulariser(name, options) for name, options in regularisers.items()],
        "settings": _settings(recipe),
        "made": _made(environment),
        "rounds": [*_rounds(metrics)],
        "targets": [*_targets(metrics)],
        "best": _best(metrics),
        "figures": [_figure(figure) for figure in figures_of(results)],
        "prompt_sets": [_prompt_set(name, how) for name, how in results.get("prompt_sets", {}).items()],
    }


def description_of(recipe: Mapping[str, Any]) -> str:
    """What held the outputs to a constraint, in one sentence."""
    regularisers = (recipe.get("regularisers") or {}).values()
    if regularisers:
        nearest = "the distribution nearest to the anchor whose outputs comply with the constraint"
        target = "the model before tuning" if all(map(is_retention, regularisers)) else nearest
        return f"While it learnt, a term λ·KL(q‖p) pulled it towards q, {target}."
    if recipe.get("constraints"):
        return "The constraint below had a part in its training."
    return "Nothing held its outputs to a constraint while it learnt."


def _data(recipe: Mapping[str, Any], rows: Mapping[str, int]) -> list[tuple]:
    corpus = recorded(recipe)
    weights = {name: float(domain.get("weight", 1.0)) for name, domain in corpus.items()}
    return [
        (
            name,
            source_text(domain),
            setting_text({key: domain.get(key) for key in ("rows", "where", "shuffle")}) or "all",
            rows.get(name, "not recorded"),
            f"{weights[name] / sum(weights.values()):.1%}"
            + ("" if domain.get("learn", True) else ", held, not learnt"),
        )
        for name, domain in corpus.items()
    ]


def recorded(recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The domains whose source is known."""
    return {name: domain for name, domain in recipe["corpus"].items() if "path" in domain}


def _regulariser(name: str, options: Mapping[str, Any]) -> tuple:
    labels, start = "–", "–"
    if not is_retention(options):
        labels = "degrees" if options.get("soft_labels") else "yes or no"
    if not is_retention(options) or options.get("kl_on", "corpus") != "corpus":
        start = source_text(options["prompts"]) if options.get("prompts") else "the domain's rows"
    if options.get("target"):
        options = {**options, "weight": f"from {options['weight']}; target {setting_text(options['target'])}"}
    chosen = (options.get(key, "default") for key in ("weight", "anchor", "kl_on", "guidance_scale"))
    return name, setting_text(options.get("domain", name) or "all"), options["constraint"], *chosen, labels, start


def _settings(recipe: Mapping[str, Any]) -> dict[str, str]:
    keys = [*(ROUND_SETTINGS if recipe.get("regularisers") else ()), *SETTINGS]
    if (recipe.get("max_steps") or -1) > 0:
        keys.remove("num_train_epochs")  # which then has no effect
    unset = (None, -1)
    return {key: setting_text(recipe[key]) for key in keys if recipe.get(key) not in unset and recipe[key] is not False}


def _made(environment: Mapping[str, Any]) -> dict[str, str]:
    made = {name: version for name, version in (environment.get("versions") or {}).items() if version}
    if git := environment.get("git"):
        made["git"] = git["commit"] + (" with local changes" if git.get("dirty") else "")
    if devices := environment.get("devices"):
        made["devices"] = ", ".join(devices)
    if "time" in environment:
        made["time"] = environment["time"]
    return made


def _rounds(metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple]:
    for record in metrics:
        names = [key.removesuffix("/compliance") for key in record if key.endswith("/compliance")]
        for name in names if "round" in record else []:
            of = _of_regulariser(name, record)
            missing = of.get("rollouts_missing") or 0
            no_fit = NO_FIT.get(str(of.get("fit")))
            yield (
                *(record["round"], name),
                interval(of["compliance"], of.get("compliance_low"), of.get("compliance_high")),
                *((of.get("rollouts") or 0) - missing, missing),
                *(no_fit or number(of.get("r_ece")), no_fit or number(of.get("r_brier"))),
            )


def _of_regulariser(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(f"{name}/"): value for key, value in record.items() if key.startswith(f"{name}/")}


def _targets(metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple]:
    """What the trained model reached of each target."""
    for record in metrics:
        for name in [key.removesuffix("/violation_reached") for key in record if key.endswith("/violation_reached")]:
            of = _of_regulariser(name, record)
            allowed, reached, bound = of["target"], of["violation_reached"], of.get("violation_bound")
            yield (
                *(name, f"{allowed:.2%}"),
                f"{reached:.2%} [{of['violation_reached_low']:.2%}, {of['violation_reached_high']:.2%}]",
                "none" if bound is None else f"{bound:.2%}",
                "met" if (reached if bound is None else bound) <= allowed else "missed",
            )


def _best(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The update whose weights were kept, where a rule chose it."""
    chosen = next((record for record in reversed(metrics) if "best_step" in record), None)
    return chosen and {key: value if key == "best_step" else number(value) for key, value in chosen.items()}


def figures_of(results: Mapping[str, Any]) -> Iterator[Figure]:
    """Every number of results in the format of `results.schema.json`."""
    for prompts, found in results.get("generation", {}).items():
        for constraint, figures in found.items():
            words = f"violation rate under {one_line(constraint)}"
            yield Figure(words, "violation_rate", set_name(prompts), figures["violation_rate"])
    for held_out, figures in results.get("perplexity", {}).items():
        yield Figure("perplexity per token", "perplexity", set_name(held_out), figures["per_token"])
        yield Figure("bits per byte", "bits_per_byte", set_name(held_out), figures["bits_per_byte"])
    for task, figures in results.get("tasks", {}).items():
        yield Figure("accuracy", "accuracy", one_line(task), figures["accuracy"])
    for metric, figure in results.get("classification", {}).items():
        if isinstance(figure, Mapping) and {"value", "low", "high"} <= figure.keys():
            yield Figure(metric.replace("_", " "), metric, "classification", figure)


def _figure(figure: Figure) -> tuple:
    value, low, high = (figure.estimate.get(key) for key in ("value", "low", "high"))
    n, missing = (figure.estimate.get(key, MISSING) for key in ("n", "missing"))
    return figure.words, figure.on, interval(value, low, high), n, missing


def _prompt_set(name: str, how: Mapping[str, Any]) -> tuple:
    """How the prompts of a set were made and completed."""
    decoding = Decoding(**{field.name: how[field.name] for field in fields(Decoding) if field.name in how})
    counts = (how.get(key, MISSING) for key in ("samples", "max_new_tokens"))
    return set_name(name), how.get("prompt_tokens") or "all", *counts, str(decoding)


def is_retention(options: Mapping[str, Any]) -> bool:
    """Whether a regulariser keeps a domain as it was, and asks no constraint."""
    return options.get("constraint") == RETENTION
