"""The tour: the paper's rows on the embedded world, or on a corpus and a constraint of one's own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bridle.comparison.compare import Comparison
from bridle.constraints import build_constraint
from bridle.data import DataSource
from bridle.errors import UserError
from bridle.quickstart.build import HERE, Scale, prepare
from bridle.recipes.recipe import Recipe, build_recipe
from bridle.report.data import read_report
from bridle.report.html import write_report
from bridle.report.terminal import tables
from bridle.utils.settings import read_yaml, set_dotted
from bridle.utils.variables import filled

METHODS = ("base", "sft", "filtration", "rl", "nado-decoding", "constrained", "constrained-adaptive")
"""The rows of the paper's table."""

FOR_PRETRAINED = {"learning_rate": 2e-5, "methods.rl.learning_rate": 1e-6}
"""What a model from a hub needs otherwise than one of a million parameters."""

OWN = "own"


def tour_recipe(
    corpus: str | None = None,
    constraint: str | None = None,
    model: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    scale: Scale | None = None,
) -> Recipe:
    """The quickstart's recipe, with what is the user's in the place of what is embedded.

    Args:
        corpus: rows, as `DataSource.parse` takes them, in the forum's place: their last tenth is held out.
        constraint: in the oracle's and the truth's place, as `build_constraint` takes it.
        model: folder or hub name in the place of the embedded model.
        overrides: by dotted key; they come last.
        scale: of the embedded world.

    Raises:
        UserError: a corpus without a constraint; what cannot be read; a key that does not exist.
    """
    if corpus and not constraint:
        raise UserError("--corpus: needs --constraint, which says what a text must not be, e.g. words:insults.txt")
    mapping = filled(read_yaml(HERE / "recipe.yaml"), {"WORLD": str(prepare(scale))})
    if constraint:
        name = build_constraint(constraint).name
        mapping["constraints"] = {name: constraint}
        mapping["regularisers"]["forum"]["constraint"] = name
    if corpus:
        _take_in(DataSource.parse(corpus), mapping)
    changes = ({"model": model} | FOR_PRETRAINED if model else {}) | dict(overrides or {})
    for key, value in changes.items():
        set_dotted(mapping, key, value)
    return build_recipe(mapping)


def take_tour(recipe: Recipe, folder: Path, show: Callable[[str], None], progress: Callable[[str], None]) -> None:
    """Makes and measures every method, or what an earlier tour left to do, and shows what came of it.

    Args:
        recipe: as `tour_recipe` gives it.
        folder: where everything goes.
        show: is given the tables and the ways to go on.
        progress: is told what is being done, a line at a time.

    Raises:
        RunStopped: a method failed; everything is shown before.
    """
    comparison = Comparison(recipe, folder, names=METHODS, title="quickstart", resume=True, show=progress)
    comparison.run()
    show(tables(read_report(folder)))
    show(f"The report: {write_report(folder).resolve()}")
    show(next_steps(recipe, folder))
    comparison.check_complete()


def next_steps(recipe: Recipe, folder: Path) -> str:
    """Three commands that lead on from a tour."""
    tuned = folder / "constrained-adaptive" / f"seed-{recipe.training.get('seed', 0)}" / "model"
    (domain, regulariser), *_ = recipe.regularisers.items()
    return "\n".join(
        (
            "Next:",
            f"  bridle generate {tuned} --prompt 'Market board, heated. magpie writes:' --samples 5",
            f"  bridle compare {folder / 'recipe.yaml'} --methods base,sft,constrained-adaptive"
            f" --regularisers.{domain}.weight {regulariser.weight * 3:g}",
            "  bridle quickstart --corpus MY.jsonl --constraint words:MY-WORDS.txt",
        )
    )


def _take_in(source: DataSource, mapping: dict[str, Any]) -> None:
    """Puts a corpus of the user's in the forum's place."""
    columns = source.read().column_names
    rows = {key: value for key, value in vars(source).items() if value is not None} | {"shuffle": 0}
    training, held_out = rows | {"rows": "0:90%"}, rows | {"rows": "90%:"}
    evaluation = mapping["evaluation"]
    mapping["corpus"] = {OWN: training} | {"encyclopaedia": mapping["corpus"]["encyclopaedia"]}
    mapping["regularisers"] = {OWN: mapping["regularisers"]["forum"]}
    evaluation["prompts"] = {OWN: held_out if "prompt" in columns else held_out | {"prompt_tokens": 8}}
    others = {name: evaluation["perplexity"][name] for name in ("encyclopaedia", "scenes")}
    evaluation["perplexity"] = ({OWN: held_out} if "text" in columns else {}) | others
    del evaluation["classification"]
