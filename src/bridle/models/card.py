"""Model cards: the README.md of a trained model, with the metadata header that the hub reads.

A recipe is untrusted. The text escapes every value for Markdown, and the header is dumped as YAML. A card shows the
settings that `card_tables` names and nothing else, and of a local path only the last part.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bridle.models.card_tables import Figure, description_of, figures_of, is_retention, recorded, tables
from bridle.models.card_text import (
    base_model_of,
    escaped,
    hub_dataset,
    hub_name,
    is_number,
    one_line,
    paths_of,
    public_name,
    slug,
    template,
)
from bridle.utils.files import read_text, write_text

CARD_FILE = "README.md"
TRAINED_BY = "Trained with Bridle"
CERTIFICATE = "<!-- certificate -->", "<!-- end of the certificate -->"


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
    figures = [*figures_of(results or {})]
    base_model, gguf_file = base_model_of(recipe)
    header = _header(recipe, method, adapter, license, figures)
    body = template("card").render(
        title=_title(recipe, method),
        base=public_name(recipe["model"]),
        base_model=base_model,
        gguf_file=gguf_file,
        method=method,
        domains=", ".join(name for name, domain in recipe["corpus"].items() if domain.get("learn", True)),
        description=description or description_of(recipe),
        **tables(recipe, rows or {}, environment or {}, metrics, results or {}),
        adapter=adapter,
        guided=not all(map(is_retention, regularisers.values())),
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
    block = f"{begin}\n{template('certificate').render(content)}{end}\n\n"
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
    section = template("export").render(source=source, dtype=dtype, guidance_scale=guidance_scale)
    load = "## How to load it\n\n" + template("loading").render(adapter=False, base_model=None, gguf_file=None)
    text = _without_certificate(read_text(before)) if before.is_file() else ""  # it is of other weights
    if TRAINED_BY in text:
        card = ModelCard(text)
        header = ModelCardData(**card.data.to_dict())
        body = re.sub(
            "## How to load it\n.*?(?=## Citation)", lambda _: f"{load}\n", card.text.lstrip(), flags=re.DOTALL
        )
        body = body.replace("## Intended use", f"{section}## Intended use", 1)
    else:
        header = ModelCardData(base_model=hub_name(name), pipeline_tag="text-generation", tags=["bridle"])
        body = f"# {escaped(source)}, exported\n\n{section}{load}"
    header.library_name = "transformers"
    header.tags = [tag for tag in header.tags or () if tag != "lora"]
    if guidance_scale is not None:
        header.tags, header.eval_results = [*header.tags, "nado-decoding"], None
    path = Path(folder) / CARD_FILE
    write_text(path, f"---\n{header.to_yaml()}\n---\n\n{body}")
    return path


# ---------------------------------------------------------------------- the header


def _header(
    recipe: Mapping[str, Any], method: str, adapter: bool, license: str | None, figures: Sequence[Figure]
) -> ModelCardData:
    datasets = [hub_dataset(path) for domain in recorded(recipe).values() for path in paths_of(domain)]
    kinds = [method, *(recipe.get("constraints") or {}), *(["lora"] if adapter else [])]
    return ModelCardData(
        base_model=base_model_of(recipe)[0],
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["bridle", "controlled-generation", *filter(None, map(slug, kinds))],
        datasets=[*dict.fromkeys(filter(None, datasets))] or None,
        model_name=slug(_title(recipe, method)),
        eval_results=[_eval_result(figure) for figure in figures if is_number(figure.estimate.get("value"))] or None,
    )


def _eval_result(figure: Figure) -> EvalResult:
    estimate = figure.estimate
    return EvalResult(
        task_type="text-generation",
        dataset_type=slug(figure.on),
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
    return one_line(repository).rpartition("/")[2] if repository else f"{public_name(recipe['model'])}, {method}"
