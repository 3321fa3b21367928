"""What a demo shows: the variants of a model, of a run or of a comparison, and what judges them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridle.certification.certificate import Certificate
from bridle.comparison.cell import Candidate, CellFiles
from bridle.comparison.methods import description
from bridle.constraints import Constraint
from bridle.errors import UserError
from bridle.recipes.recipe import Recipe, load_recipe
from bridle.recipes.run import RECIPE_FILE
from bridle.report.reading import results_of
from bridle.utils.files import read_json

MOST = 4  # variants side by side
FIRST = (
    ("base",),
    ("sft",),
    ("tuned", "constrained-adaptive", "constrained"),
    ("guided", "nado-decoding", "nado-decoding-sft"),
)
"""Of each group, the first variant that there is is shown at first."""


@dataclass(frozen=True)
class Variant:
    """A model as the demo shows it.

    Attributes:
        model: folder, GGUF file or hub name.
        auxiliary: folder of the R that reads its texts; None if there is none.
        is_guided: whether R guides its decoding too.
        guidance_scale: η at which a comparison has measured it; None where that is the recipe's.
        description: what it is, in a sentence.
    """

    name: str
    model: str
    auxiliary: str | None = None
    is_guided: bool = False
    description: str = ""
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Subject:
    """What a demo shows.

    Attributes:
        title: its name on the page.
        variants: by name, at least one.
        shown: names of those shown at first, at most `MOST`.
        constraints: that judge its texts, by name.
        dtype: of the weights.
        guidance_scale: η at first, of the first guided variant that is shown.
        max_new_tokens: the length of a text at first.
        certificate: what was shown of a violation rate.
    """

    title: str
    variants: dict[str, Variant]
    shown: list[str]
    constraints: Mapping[str, Constraint] = field(default_factory=dict)
    dtype: str = "float32"
    guidance_scale: float = 1.0
    max_new_tokens: int = 48
    certificate: Certificate | None = None


def subject_of(
    name: str,
    guide: str | None = None,
    constraints: Mapping[str, Constraint] | None = None,
    certificate: Path | None = None,
    dtype: str | None = None,
) -> Subject:
    """The subject of a run's folder, a comparison's folder, or a model's folder, GGUF file or hub name.

    Args:
        name: what to show.
        guide: folder of an R. It guides the model before tuning as the variant "guided", and reads the texts of all
            variants that have no R of their own.
        constraints: that judge besides those of the recipe.
        certificate: its file; by default `certificate.json` in the folder, if there is one.
        dtype: of the weights; the recipe's, or else float32, if not given.

    Raises:
        UserError: a file of the folder cannot be used, or the comparison has no method to show.
    """
    folder, judges = Path(name), dict(constraints or {})
    file = certificate or folder / "certificate.json"
    shown = Certificate.load(file) if certificate or os.path.isfile(file) else None  # `os` tolerates a long name
    if not os.path.isfile(folder / RECIPE_FILE):
        variants = [Variant("model", name, guide)] + ([Variant("guided", name, guide, True)] if guide else [])
        by_name = {variant.name: variant for variant in variants}
        return Subject(name, by_name, list(by_name), judges, dtype or "float32", certificate=shown)
    recipe = load_recipe(folder / RECIPE_FILE)
    by_name = _of_run(recipe, folder) if os.path.isfile(folder / "metrics.jsonl") else _of_comparison(recipe, folder)
    if guide is not None:
        guided = Variant("guided", recipe.model, guide, True, "The model before tuning, guided by the given R.")
        by_name = {key: _read_by(guide, variant) for key, variant in by_name.items()} | {"guided": guided}
    names = _first(by_name)
    scales = [by_name[name].guidance_scale for name in names]
    return Subject(
        folder.resolve().name,
        by_name,
        names,
        dict(recipe.constraints) | judges,
        dtype or recipe.dtype,
        next((scale for scale in scales if scale is not None), recipe.guidance_scale),
        recipe.training.get("max_new_tokens", Subject.max_new_tokens),
        shown,
    )


def _of_run(recipe: Recipe, folder: Path) -> dict[str, Variant]:
    """The model before tuning, the tuned one, and the former guided."""
    if not (folder / "model").is_dir():
        raise UserError(f"{folder}: holds no model yet; wait for the end of the run, or resume it")
    before, after = _auxiliary(folder, "round-1"), _auxiliary(folder)
    found = [
        Variant("base", recipe.model, before, False, "The model before tuning."),
        Variant("tuned", str(folder / "model"), after, False, "The model that the run made."),
    ]
    if before is not None:
        found.append(Variant("guided", recipe.model, before, True, "The model before tuning, guided by R."))
    return {variant.name: variant for variant in found}


def _of_comparison(recipe: Recipe, folder: Path) -> dict[str, Variant]:
    """Every method that is complete, with its first seed."""
    path = results_of(folder)
    results = {} if path is None else read_json(path, dict[str, Any])
    cells: dict[str, tuple[CellFiles, Candidate]] = {}
    for name in results.get("methods", {}):
        for seed in results.get("seeds", []):
            cell = CellFiles(folder, name, seed, recipe.variables)
            if name not in cells and (candidate := cell.candidate()) is not None:
                cells[name] = cell, candidate
    if not cells:
        raise UserError(f"{folder}: no method of this comparison is complete; add --resume to `bridle compare`")
    before = (_auxiliary(cell.folder, "round-1") for cell, one in cells.values() if one.guide is None)
    reads = {recipe.model: next(filter(None, before), None)}
    reads |= {one.model: one.guide for _, one in cells.values() if one.guide is not None}
    return {
        name: Variant(
            name,
            candidate.model,
            candidate.guide or reads.get(candidate.model) or _auxiliary(cell.folder),
            candidate.guide is not None,
            description(name),
            None if candidate.guide is None else candidate.guidance_scale,
        )
        for name, (cell, candidate) in cells.items()
    }


def _auxiliary(folder: Path, of: str = "") -> str | None:
    """The first R of a run, by the name of its regulariser: the last that was fitted, or that `of` a round."""
    found = sorted(path.parent for path in (folder / "auxiliary").glob("**/config.json"))
    kept = [path for path in found if (path.name == of if of else not path.name.startswith("round-"))]
    return str(kept[0]) if kept else None


def _read_by(guide: str, variant: Variant) -> Variant:
    return replace(variant, auxiliary=variant.auxiliary or guide)


def _first(variants: Mapping[str, Variant]) -> list[str]:
    """The variants shown at first: one of each group, or else the first two."""
    found = [name for group in FIRST for name in [one for one in group if one in variants][:1]]
    return found if len(found) > 1 else list(variants)[:2]
