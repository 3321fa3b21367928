"""Model cards: the README.md beside a trained model, with the metadata header that the hub reads.

What a recipe says is untrusted. In the text every value is escaped for Markdown, the header is dumped as YAML, only
settings named here are told, and of a local path only its last part.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bridle.constraints import Constraint
from bridle.constraints.spec import RETENTION
from bridle.utils.files import write_text

CARD_FILE = "README.md"
MISSING = "missing"
DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".txt"}  # "data/rows.jsonl" looks like a hub name

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
"""Keys of a recipe that a card tells, where they are set. What is not named here, a token say, is never told."""


class Figure(NamedTuple):
    """One measured number: its metric, in words and as an identifier, on what, and the estimate in JSON."""

    words: str
    metric: str
    on: str
    estimate: Mapping[str, Any]


def write_card(
    model_folder: str | Path,
    recipe: Mapping[str, Any],
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    results: Mapping[str, Any] | None = None,
    method: str | None = None,
    description: str | None = None,
    rows: Mapping[str, int] | None = None,
    environment: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> Path:
    """Writes `README.md` into a model's folder, over any that stands there.

    Args:
        model_folder: what `save_pretrained` wrote: a whole model or an adapter.
        recipe: what was done, as in a recipe file, with only what the method used: its constraints, say, but no
            regularisers. A constraint may be one already. A domain without a `path` is named, and no more is told
            of the data. Defaults that should be told must be written out.
        metrics: records of `metrics.jsonl`; those of rounds are read.
        results: what was measured afterwards, in the format of `results.schema.json`.
        method: what was done to the model, as a noun: "filtration and fine-tuning". If not given, constrained
            fine-tuning, or fine-tuning where the recipe has no regularisers.
        description: one sentence on how the method held the outputs to the constraint; made from `recipe` if not given.
        rows: how many rows each domain gave.
        environment: from `bridle.utils.provenance.environment`; its command is not told.
        license: the model's licence, by the hub's identifier, where it is known.

    Returns:
        The file.

    Raises:
        UserError: the file cannot be written.
    """
    folder = Path(model_folder)
    adapter = (folder / "adapter_config.json").is_file()
    method = method or ("constrained fine-tuning" if recipe.get("regularisers") else "fine-tuning")
    header = _header(recipe, method, adapter, license, [*_figures(results or {})])
    body = _template().render(
        title=_title(recipe, method),
        base=public_name(recipe["model"]),
        base_model=_hub_name(recipe["model"]),
        method=method,
        method_heading=method[:1].upper() + method[1:],
        domains=", ".join(map(str, recipe["corpus"])),
        description=description or _description(recipe),
        constraints=_constraints(recipe),
        data=_data(recipe, rows or {}),
        regularisers=_regularisers(recipe),
        settings=_settings(recipe),
        made=_made(environment or {}),
        rounds=[*_rounds(metrics)],
        best=_best(metrics),
        figures=[_figure_row(figure) for figure in _figures(results or {})],
        adapter=adapter,
        guided=any(not _is_retention(options) for options in _mapping(recipe, "regularisers").values()),
    )
    write_text(folder / CARD_FILE, f"---\n{header.to_yaml()}\n---\n\n{body}")
    return folder / CARD_FILE


def public_name(path: Any) -> str:
    """A hub name as it is, and of a local path the last part: a card tells nothing of the machine it is written on."""
    return _hub_name(path) or PureWindowsPath(_line(path)).name or "a local folder"


def told(value: Any, key: str = "") -> str:
    """A setting or a constraint in one line; of files only their names, of a list of words only how many it holds."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {told(v, k)}" for k, v in value.items() if v is not None and k != "name")
    if key in ("model", "file"):
        return public_name(value)
    if key == "words":
        return f"{len(value)} listed"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(f"({told(item)})" if isinstance(item, Mapping) else told(item) for item in value)
    return _line(value)


def with_names(options: Any) -> dict[str, Any]:
    """A regulariser's options as a recipe has them: constraint and prompts by name."""
    constraint = RETENTION if options.constraint is None else options.constraint.name
    return {**vars(options), "constraint": constraint, "prompts": options.prompts and options.prompts.place}


# ---------------------------------------------------------------------- the header


def _header(
    recipe: Mapping[str, Any], method: str, adapter: bool, license: str | None, figures: Sequence[Figure]
) -> ModelCardData:
    datasets = [_hub_dataset(str(domain["path"])) for domain in _recorded(recipe).values()]
    kinds = [method, *_mapping(recipe, "constraints"), *(["lora"] if adapter else [])]
    return ModelCardData(
        base_model=_hub_name(recipe["model"]),
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["bridle", "controlled-generation", *filter(None, map(_slug, kinds))],
        datasets=[*dict.fromkeys(filter(None, datasets))] or None,
        model_name=_slug(_title(recipe, method)),
        eval_results=[_eval_result(figure) for figure in figures if _is_number(figure.estimate.get("value"))] or None,
    )


def _eval_result(figure: Figure) -> EvalResult:
    estimate = figure.estimate
    return EvalResult(
        task_type="text-generation",
        dataset_type=_slug(figure.on),
        dataset_name=figure.on,
        metric_type=figure.metric,
        metric_name=figure.words,
        metric_value=estimate["value"],
        metric_args={
            "interval_95": [estimate.get("low"), estimate.get("high")],
            "n": estimate.get("n"),
            "missing": estimate.get("missing"),
        },
    )


def _title(recipe: Mapping[str, Any], method: str) -> str:
    repository = recipe.get("hub_model_id")
    return _line(repository).rpartition("/")[2] if repository else f"{public_name(recipe['model'])}, {method}"


# ---------------------------------------------------------------------- the tables, row by row


def _description(recipe: Mapping[str, Any]) -> str:
    regularisers = _mapping(recipe, "regularisers").values()
    if not regularisers and recipe.get("constraints"):
        return "The constraint below had a part in its training."
    if not regularisers:
        return "Nothing held its outputs to a constraint while it learnt."
    nearest = "the distribution nearest to the anchor whose outputs comply with the constraint"
    target = "the model before tuning" if all(map(_is_retention, regularisers)) else nearest
    return f"While it learnt, a term λ·KL(q‖p) pulled it towards q, {target}."


def _constraints(recipe: Mapping[str, Any]) -> list[tuple]:
    return [(name, told(_described(spec))) for name, spec in _mapping(recipe, "constraints").items()]


def _described(constraint: Any) -> Any:
    return constraint.describe() if isinstance(constraint, Constraint) else constraint


def _data(recipe: Mapping[str, Any], rows: Mapping[str, int]) -> list[tuple]:
    corpus = _recorded(recipe)
    weights = {name: float(domain.get("weight", 1.0)) for name, domain in corpus.items()}
    return [
        (
            name,
            _source(domain),
            told({key: domain.get(key) for key in ("rows", "where", "shuffle")}) or "all",
            rows.get(name, "not recorded"),
            f"{weights[name] / sum(weights.values()):.1%}",
        )
        for name, domain in corpus.items()
    ]


def _recorded(recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The domains of which it is known where their rows came from."""
    return {name: domain for name, domain in recipe["corpus"].items() if "path" in domain}


def _regularisers(recipe: Mapping[str, Any]) -> list[tuple]:
    return [
        (
            name,
            told(options.get("domain", name) or "all"),
            options["constraint"],
            *(options.get(key, "default") for key in ("weight", "anchor", "on", "power")),
            *(("–", "–") if _is_retention(options) else _rollouts(options)),
        )
        for name, options in _mapping(recipe, "regularisers").items()
    ]


def _rollouts(options: Mapping[str, Any]) -> tuple[str, str]:
    labels = "degrees" if options.get("soft_labels") else "yes or no"
    return labels, _source(options["prompts"]) if options.get("prompts") else "the domain's rows"


def _settings(recipe: Mapping[str, Any]) -> list[tuple]:
    named = [*(ROUND_SETTINGS if recipe.get("regularisers") else ()), *SETTINGS]
    if (recipe.get("max_steps") or -1) > 0:
        named.remove("num_train_epochs")  # which then decides nothing
    return [(key, told(recipe[key])) for key in named if _is_set(recipe.get(key))]


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != -1  # 0 is a setting, though it equals False


def _made(environment: Mapping[str, Any]) -> list[tuple]:
    git = environment.get("git") or {}
    changed = " with local changes" if git.get("dirty") else ""
    versions = {name: found for name, found in _mapping(environment, "versions").items() if found}
    state = {"git": f"{git['commit']}{changed}"} if git else {}
    devices = {"devices": ", ".join(environment["devices"])} if environment.get("devices") else {}
    return [*(versions | state | devices | {k: environment[k] for k in ("time",) if k in environment}).items()]


def _rounds(metrics: Sequence[Mapping[str, Any]]) -> Iterator[tuple]:
    for record in metrics:
        if "round" not in record:
            continue
        for name in [key.removesuffix("/compliance") for key in record if key.endswith("/compliance")]:
            of = {key: record.get(f"{name}/{key}") for key in ("rollouts", "rollouts_missing", "r_ece", "r_brier")}
            missing = of["rollouts_missing"] or 0
            fit = "no fit: all labels alike" if record.get(f"{name}/fit") in ("kept", "none") else None
            yield (
                *(record["round"], name),
                _interval(*(record.get(f"{name}/compliance{end}") for end in ("", "_low", "_high"))),
                *((of["rollouts"] or 0) - missing, missing),
                *(fit or _number(of["r_ece"]), fit or _number(of["r_brier"])),
            )


def _best(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of which update the weights are, where a rule chose them."""
    chosen = next((record for record in reversed(metrics) if "best_step" in record), None)
    return chosen and {key: value if key == "best_step" else _number(value) for key, value in chosen.items()}


def _figures(results: Mapping[str, Any]) -> Iterator[Figure]:
    for prompts, found in _mapping(results, "generation").items():
        for constraint, figures in found.items():
            words = f"violation rate under {_line(constraint)}"
            yield Figure(words, "violation_rate", _set_name(prompts), figures["violation_rate"])
    for held_out, figures in _mapping(results, "perplexity").items():
        yield Figure("perplexity per token", "perplexity", _set_name(held_out), figures["per_token"])
        yield Figure("bits per byte", "bits_per_byte", _set_name(held_out), figures["bits_per_byte"])
    for task, figures in _mapping(results, "tasks").items():
        yield Figure("accuracy", "accuracy", _line(task), figures["accuracy"])
    for metric, figure in _mapping(results, "classification").items():
        if isinstance(figure, Mapping) and {"value", "low", "high"} <= figure.keys():
            yield Figure(metric.replace("_", " "), metric, "classification", figure)


def _figure_row(figure: Figure) -> tuple:
    estimate = figure.estimate
    interval = _interval(*(estimate.get(key) for key in ("value", "low", "high")))
    return figure.words, figure.on, interval, estimate.get("n", MISSING), estimate.get("missing", MISSING)


# ---------------------------------------------------------------------- words


def _source(source: Any) -> str:
    path = str(source["path"] if isinstance(source, Mapping) else source)
    return path if _hub_dataset(path) else public_name(path)


def _set_name(name: str) -> str:
    """The name of a prompt set or held-out file, which may be FILE,rows=90%: from a command line."""
    path, comma, options = name.partition(",")
    return _line(public_name(path) + comma + options)


def _is_retention(options: Mapping[str, Any]) -> bool:
    return options.get("constraint") == RETENTION


def _interval(value: Any, low: Any, high: Any) -> str:
    if not _is_number(value):
        return MISSING
    return _number(value) + (f" [{_number(low)}, {_number(high)}]" if _is_number(low) and _is_number(high) else "")


def _number(value: Any) -> str:
    if not _is_number(value):
        return MISSING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _hub_name(name: Any) -> str | None:
    """The name, where it can only be one on the hub."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return None
    return None if Path(name).suffix.lower() in DATA_SUFFIXES or Path(name).exists() else str(name)


def _hub_dataset(path: str) -> str | None:
    """The repository of a data set on the hub, "name" or "name:config"; None for a local one."""
    return _hub_name(path.partition(":")[0]) if re.fullmatch(r"[\w./-]+(:[\w.-]+)?", path) else None


def _slug(text: Any) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", _line(text).lower()).strip("-.")


def _line(value: Any) -> str:
    """One line of printable text."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def _mapping(container: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return container.get(key) or {}


# ---------------------------------------------------------------------- Markdown


def _template() -> Any:
    environment = Environment(
        autoescape=True,  # for `Markup`, which tells what is escaped from what is not
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(files("bridle.models").joinpath("card.md.jinja").read_text("utf-8"))


def _escaped(value: Any) -> Markup:
    """A value as plain text in Markdown: it can open no markup, no HTML and no further cell of a table."""
    return value if isinstance(value, Markup) else Markup(re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", _line(value)))
