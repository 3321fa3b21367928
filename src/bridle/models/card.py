"""Model cards: the README.md of a trained model, with the metadata header that the hub reads.

A recipe is untrusted. The text escapes every value for Markdown, and the header is dumped as YAML. A card shows the
settings named here and nothing else, and of a local path only the last part.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from bridle.constraints import Constraint
from bridle.constraints.spec import RETENTION
from bridle.models.gguf import hub_file, is_gguf
from bridle.models.sampling import Decoding
from bridle.utils.files import read_text, write_text

CARD_FILE = "README.md"
TRAINED_BY = "Trained with Bridle"
CERTIFICATE = "<!-- certificate -->", "<!-- end of the certificate -->"
MISSING = "missing"
NO_FIT = dict.fromkeys(("kept", "none"), "no fit: all labels alike") | {"unlabelled": "no fit: no label"}
FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".txt", ".gguf"}  # "data/rows.jsonl" looks like a hub name

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
    """Writes `README.md` into a model's folder, replacing one that is there, and returns its path.

    Args:
        model_folder: written by `save_pretrained`: a model or an adapter.
        recipe: as in a recipe file, with only what the method used and with the defaults that the card should show.
            A constraint may be a `Constraint`. Of a domain without a `path` only the name is shown.
        metrics: records of `metrics.jsonl`; those of rounds are read.
        results: measured afterwards, in the format of `results.schema.json`.
        method: a noun, such as "filtration and fine-tuning"; by default (constrained) fine-tuning.
        description: one sentence on how the method held the outputs to the constraint; by default made from `recipe`.
        rows: how many rows each domain gave.
        environment: from `bridle.utils.provenance.environment`.
        license: the model's, by the hub's identifier.

    Raises:
        UserError: the file cannot be written.
    """
    folder = Path(model_folder)
    adapter = (folder / "adapter_config.json").is_file()
    regularisers = recipe.get("regularisers") or {}
    method = method or ("constrained fine-tuning" if regularisers else "fine-tuning")
    figures = [*_figures(results or {})]
    base_model, gguf_file = _base_model(recipe)
    header = _header(recipe, method, adapter, license, figures)
    body = _template("card").render(
        title=_title(recipe, method),
        base=public_name(recipe["model"]),
        base_model=base_model,
        gguf_file=gguf_file,
        method=method,
        domains=", ".join(name for name, domain in recipe["corpus"].items() if domain.get("learn", True)),
        description=description or _description(recipe),
        constraints={name: setting_text(spec) for name, spec in (recipe.get("constraints") or {}).items()},
        data=_data(recipe, rows or {}),
        regularisers=[_regulariser(name, options) for name, options in regularisers.items()],
        settings=_settings(recipe),
        made=_made(environment or {}),
        rounds=[*_rounds(metrics)],
        targets=[*_targets(metrics)],
        best=_best(metrics),
        figures=[_figure_row(figure) for figure in figures],
        prompt_sets=[_prompt_set(name, how) for name, how in (results or {}).get("prompt_sets", {}).items()],
        adapter=adapter,
        guided=not all(map(_is_retention, regularisers.values())),
    )
    write_text(folder / CARD_FILE, f"---\n{header.to_yaml()}\n---\n\n{body}")
    return folder / CARD_FILE


def add_certificate(model_folder: str | Path, **content: Any) -> Path:
    """Writes a certificate into the card of a model's folder, in place of an earlier one, and returns the card's path.

    Args:
        model_folder: holds a card.
        content: what `certificate.md.jinja` shows: the statement, its limits, the candidates by heading, and details.

    Raises:
        UserError: the card cannot be read or written.
    """
    path = Path(model_folder) / CARD_FILE
    begin, end = CERTIFICATE
    block = f"{begin}\n{_template('certificate').render(content)}{end}\n\n"
    card = _without_certificate(read_text(path))
    above, heading, below = card.partition("## Intended use")
    write_text(path, f"{above.rstrip()}\n\n{block}{heading}{below}")
    return path


def _without_certificate(card: str) -> str:
    begin, end = CERTIFICATE
    return re.sub(f"{begin}.*?{end}\n*", "", card, flags=re.DOTALL)


def add_to_header(
    model_folder: str | Path,
    *,
    license: str | None = None,
    tags: str | Sequence[str] = (),
    datasets: str | Sequence[str] = (),
) -> None:
    """Adds to the header of a card what cannot be known from a run.

    Args:
        model_folder: holds a card.
        license: the model's, by the hub's identifier; None leaves the card's.
        tags, datasets: beside those that the card has, the data sets by their names on the hub.

    Raises:
        UserError: the card cannot be read or written.
    """
    path = Path(model_folder) / CARD_FILE
    card = ModelCard(read_text(path))
    header: Any = card.data
    header.license = license or header.license
    for key, given in (("tags", tags), ("datasets", datasets)):
        more = [given] if isinstance(given, str) else given
        setattr(header, key, [*dict.fromkeys([*(getattr(header, key) or []), *more])] or None)
    write_text(path, str(card))


def write_export_card(
    folder: str | Path, model_folder: str | Path, *, name: str, dtype: str, guidance_scale: float | None = None
) -> Path:
    """Writes the card of an exported model, and returns its path.

    It is the model's card, if Bridle wrote one, with what changed: the adapters are merged, a certificate is left out,
    and the header has no figures if R is folded in, since they are of the model without it. Otherwise it names the
    model.

    Args:
        folder: holds the exported model.
        model_folder: held the model, with or without a card.
        name: of the model.
        dtype: of the exported weights.
        guidance_scale: η of the R that is folded in.

    Raises:
        UserError: a card cannot be read or written.
    """
    before, source = Path(model_folder) / CARD_FILE, public_name(name)
    section = _template("export").render(source=source, dtype=dtype, guidance_scale=guidance_scale)
    load = "## How to load it\n\n" + _template("loading").render(adapter=False, base_model=None, gguf_file=None)
    text = _without_certificate(read_text(before)) if before.is_file() else ""  # it is of other weights
    if TRAINED_BY in text:
        card = ModelCard(text)
        header = ModelCardData(**card.data.to_dict())
        body = re.sub(
            "## How to load it\n.*?(?=## Citation)", lambda _: f"{load}\n", card.text.lstrip(), flags=re.DOTALL
        )
        body = body.replace("## Intended use", f"{section}## Intended use", 1)
    else:
        header = ModelCardData(base_model=_hub_name(name), pipeline_tag="text-generation", tags=["bridle"])
        body = f"# {_escaped(source)}, exported\n\n{section}{load}"
    header.library_name = "transformers"
    header.tags = [tag for tag in header.tags or () if tag != "lora"]
    if guidance_scale is not None:
        header.tags, header.eval_results = [*header.tags, "nado-decoding"], None
    path = Path(folder) / CARD_FILE
    write_text(path, f"---\n{header.to_yaml()}\n---\n\n{body}")
    return path


def public_name(path: Any) -> str:
    """A hub name, "hub/name:file.gguf" too, unchanged, the last part of a local path."""
    return _hub_name(path) or PureWindowsPath(_line(path)).name or "a local folder"


def setting_text(value: Any, key: str = "") -> str:
    """A setting or a constraint on one line: of files the names only, of a list of words the length only."""
    if isinstance(value, Constraint):
        value = value.describe()
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {setting_text(v, k)}" for k, v in value.items() if v is not None and k != "name")
    if key in ("model", "file"):
        return public_name(value)
    if key == "words":
        return f"{len(value)} listed"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(f"({setting_text(v)})" if isinstance(v, Mapping) else setting_text(v) for v in value)
    return _line(value)


def with_names(options: Any) -> dict[str, Any]:
    """A regulariser's options as in a recipe: constraint and prompts by name."""
    constraint = RETENTION if options.constraint is None else options.constraint.name
    prompts, target = options.prompts and options.prompts.place, options.target and vars(options.target)
    return {**vars(options), "constraint": constraint, "prompts": prompts, "target": target}


# ---------------------------------------------------------------------- the header


def _header(
    recipe: Mapping[str, Any], method: str, adapter: bool, license: str | None, figures: Sequence[Figure]
) -> ModelCardData:
    datasets = [_hub_dataset(path) for domain in _recorded(recipe).values() for path in _paths(domain)]
    kinds = [method, *(recipe.get("constraints") or {}), *(["lora"] if adapter else [])]
    return ModelCardData(
        base_model=_base_model(recipe)[0],
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


# ---------------------------------------------------------------------- the tables


def _description(recipe: Mapping[str, Any]) -> str:
    regularisers = (recipe.get("regularisers") or {}).values()
    if regularisers:
        nearest = "the distribution nearest to the anchor whose outputs comply with the constraint"
        target = "the model before tuning" if all(map(_is_retention, regularisers)) else nearest
        return f"While it learnt, a term λ·KL(q‖p) pulled it towards q, {target}."
    if recipe.get("constraints"):
        return "The constraint below had a part in its training."
    return "Nothing held its outputs to a constraint while it learnt."


def _data(recipe: Mapping[str, Any], rows: Mapping[str, int]) -> list[tuple]:
    corpus = _recorded(recipe)
    weights = {name: float(domain.get("weight", 1.0)) for name, domain in corpus.items()}
    return [
        (
            name,
            _source(domain),
            setting_text({key: domain.get(key) for key in ("rows", "where", "shuffle")}) or "all",
            rows.get(name, "not recorded"),
            f"{weights[name] / sum(weights.values()):.1%}"
            + ("" if domain.get("learn", True) else ", held, not learnt"),
        )
        for name, domain in corpus.items()
    ]


def _recorded(recipe: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The domains whose source is known."""
    return {name: domain for name, domain in recipe["corpus"].items() if "path" in domain}


def _regulariser(name: str, options: Mapping[str, Any]) -> tuple:
    labels, start = "–", "–"
    if not _is_retention(options):
        labels = "degrees" if options.get("soft_labels") else "yes or no"
    if not _is_retention(options) or options.get("kl_on", "corpus") != "corpus":
        start = _source(options["prompts"]) if options.get("prompts") else "the domain's rows"
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
                _interval(of["compliance"], of.get("compliance_low"), of.get("compliance_high")),
                *((of.get("rollouts") or 0) - missing, missing),
                *(no_fit or _number(of.get("r_ece")), no_fit or _number(of.get("r_brier"))),
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
    return chosen and {key: value if key == "best_step" else _number(value) for key, value in chosen.items()}


def _figures(results: Mapping[str, Any]) -> Iterator[Figure]:
    for prompts, found in results.get("generation", {}).items():
        for constraint, figures in found.items():
            words = f"violation rate under {_line(constraint)}"
            yield Figure(words, "violation_rate", _set_name(prompts), figures["violation_rate"])
    for held_out, figures in results.get("perplexity", {}).items():
        yield Figure("perplexity per token", "perplexity", _set_name(held_out), figures["per_token"])
        yield Figure("bits per byte", "bits_per_byte", _set_name(held_out), figures["bits_per_byte"])
    for task, figures in results.get("tasks", {}).items():
        yield Figure("accuracy", "accuracy", _line(task), figures["accuracy"])
    for metric, figure in results.get("classification", {}).items():
        if isinstance(figure, Mapping) and {"value", "low", "high"} <= figure.keys():
            yield Figure(metric.replace("_", " "), metric, "classification", figure)


def _figure_row(figure: Figure) -> tuple:
    value, low, high = (figure.estimate.get(key) for key in ("value", "low", "high"))
    n, missing = (figure.estimate.get(key, MISSING) for key in ("n", "missing"))
    return figure.words, figure.on, _interval(value, low, high), n, missing


def _prompt_set(name: str, how: Mapping[str, Any]) -> tuple:
    """How the prompts of a set were made and completed."""
    decoding = Decoding(**{field.name: how[field.name] for field in fields(Decoding) if field.name in how})
    counts = (how.get(key, MISSING) for key in ("samples", "max_new_tokens"))
    return _set_name(name), how.get("prompt_tokens") or "all", *counts, str(decoding)


# ---------------------------------------------------------------------- values as text


def _source(source: Any) -> str:
    return ", ".join(path if _hub_dataset(path) else public_name(path) for path in _paths(source))


def _paths(source: Any) -> list[str]:
    """The path, or paths, of a domain of the corpus or of prompts."""
    paths = source["path"] if isinstance(source, Mapping) else source
    return [str(path) for path in paths] if isinstance(paths, list) else [str(paths)]


def _set_name(name: str) -> str:
    """The name of a prompt set or a held-out file, which may be "FILE,rows=90%:" from a command line."""
    path, comma, options = name.partition(",")
    return _line(public_name(path) + comma + options)


def _is_retention(options: Mapping[str, Any]) -> bool:
    return options.get("constraint") == RETENTION


def _interval(value: Any, low: Any, high: Any) -> str:
    bounds = f" [{_number(low)}, {_number(high)}]" if all(map(_is_number, (value, low, high))) else ""
    return _number(value) + bounds


def _number(value: Any) -> str:
    if not _is_number(value):
        return MISSING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _hub_name(name: Any) -> str | None:
    """The name, if it can only be one on the hub."""
    repository, _ = hub_file(str(name))
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return None if Path(repository).suffix.lower() in FILE_SUFFIXES or Path(name).exists() else str(name)


def _base_model(recipe: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The base model's repository, if it is on the hub, and the file's name, if it is a GGUF one."""
    name = str(recipe["model"])
    repository, file = hub_file(name)
    if file is None and is_gguf(name):
        file = public_name(name)
    return repository if _hub_name(name) else None, file


def _hub_dataset(path: str) -> str | None:
    """The repository of a hub data set, "name" or "name:config"; None for a local one."""
    return _hub_name(path.partition(":")[0]) if re.fullmatch(r"[\w./-]+(:[\w.-]+)?", path) else None


def _slug(text: Any) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", _line(text).lower()).strip("-.")


def _line(value: Any) -> str:
    """One line of printable text."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


# ---------------------------------------------------------------------- Markdown


def _template(name: str) -> Any:
    environment = Environment(
        loader=FunctionLoader(lambda part: files("bridle.models").joinpath(f"{part}.md.jinja").read_text("utf-8")),
        autoescape=True,  # so that `Markup` marks what is escaped already
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _escaped(value: Any) -> Markup:
    """A value as plain text in Markdown: it can open no markup, no HTML and no further cell of a table."""
    return value if isinstance(value, Markup) else Markup(re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", _line(value)))
