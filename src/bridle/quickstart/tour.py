"""The tour: the methods of the paper's table on the embedded world, or on the user's corpus and constraint."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bridle.comparison.compare import Comparison
from bridle.constraints import build_constraint
from bridle.data import DataSource
from bridle.errors import UserError
from bridle.quickstart.build import HERE, Scale, prepare
from bridle.quickstart.smollm2 import smollm2
from bridle.recipes.dry_run import unsaved
from bridle.recipes.recipe import Recipe, build_recipe
from bridle.recipes.run import RECIPE_FILE, build_trainer
from bridle.report.html import write_report
from bridle.report.reading import read_report
from bridle.report.terminal import tables
from bridle.utils.settings import read_yaml, set_dotted
from bridle.utils.variables import filled

METHODS = ("base", "sft", "filtration", "rl", "nado-decoding", "constrained", "constrained-adaptive")
"""The rows of the paper's table."""

REAL_METHODS = ("base", "sft", "filtration", "nado-decoding-sft", "rl", "constrained-adaptive")
"""Those that fit into 40 minutes of one core."""

LEFT_OUT = "Left out: constrained, for time; nado-decoding, since the base model writes nothing hostile."
LEFT_OUT_OF_OWN = "Left out, for time: constrained and nado-decoding."  # nothing is known of the user's corpus

TUNED = ("constrained-adaptive", "constrained", "rl", "filtration", "sft")
"""Whose model the next steps try: the first that there is."""

UPDATES_WORTH = 1200
"""The time of the tour with a real model, in plain updates; see docs/log.md."""
TIMED = 3  # updates, for the estimate

REAL_SCALE = Scale(base=None, held_out=150)

FOR_PRETRAINED = {"learning_rate": 2e-5, "methods.rl.learning_rate": 1e-6}
"""Settings for a pretrained model in place of the embedded one."""

OWN = "own"


def tour_recipe(
    corpus: str | None = None,
    constraint: str | None = None,
    model: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    real: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Recipe:
    """Builds the quickstart's recipe.

    Args:
        corpus: replaces the forum, as `DataSource.parse` reads it; the last tenth is held out.
        constraint: replaces oracle and truth, as `build_constraint` reads it.
        model: replaces the embedded model; a folder, GGUF file or hub name.
        overrides: values by dotted key, applied last.
        real: takes SmolLM2 unless `model` is given, with the settings of `real.yaml`.
        progress: receives a line where something is fetched.

    Raises:
        UserError: a corpus without a constraint, an unreadable source, or an unknown key.
    """
    if corpus and not constraint:
        raise UserError("--corpus: needs --constraint, which says what a text must not be, e.g. words:insults.txt")
    changes: dict[str, Any] = {"model": model} if model else {}
    if real:
        changes |= read_yaml(HERE / "real.yaml")
    elif model:
        changes |= FOR_PRETRAINED
    _built("world", changes, corpus, constraint, overrides)  # refuses a wrong key before anything is fetched or made
    if real and not model:
        changes["model"] = smollm2(progress)
    world = str(prepare(REAL_SCALE if real else None))
    return _built(world, changes, corpus, constraint, overrides)


def _built(
    world: str,
    changes: Mapping[str, Any],
    corpus: str | None,
    constraint: str | None,
    overrides: Mapping[str, Any] | None,
) -> Recipe:
    """The recipe on the world's folder, which need not be there yet."""
    mapping = filled(read_yaml(HERE / "recipe.yaml"), {"WORLD": world})
    for key, value in changes.items():
        set_dotted(mapping, key, value)
    if constraint:
        name = build_constraint(constraint).name
        mapping["constraints"] = {name: constraint}
        mapping["regularisers"]["forum"]["constraint"] = name
    if corpus:
        _replace_forum(mapping, DataSource.parse(corpus))
    for key, value in (overrides or {}).items():
        set_dotted(mapping, key, value)
    return build_recipe(mapping)


def take_tour(
    recipe: Recipe,
    folder: Path,
    show: Callable[[str], None],
    progress: Callable[[str], None],
    real: bool = False,
    names: Sequence[str] = (),
) -> None:
    """Trains and evaluates every method, or resumes an earlier tour in the folder, and shows the results.

    Args:
        recipe: from `tour_recipe`.
        folder: output folder.
        show: receives the tables and the next steps.
        progress: receives one line per step.
        real: whether the recipe is for a real model; then it begins with an estimate of the time.
        names: methods; the paper's by default.

    Raises:
        RunStopped: a method failed; the results are shown first.
    """
    of_paper, title = (REAL_METHODS, "quickstart-real") if real else (METHODS, "quickstart")
    seeds = (recipe.training.get("seed", 0),)
    comparison = Comparison(recipe, folder, names or of_paper, seeds, title, resume=True, show=progress)
    if real and not names and not (folder / RECIPE_FILE).exists():
        progress(f"{estimate(recipe)} {LEFT_OUT_OF_OWN if OWN in recipe.corpus else LEFT_OUT}")
    comparison.run()
    show(tables(read_report(folder)))
    show(f"The report: {write_report(folder).resolve()}")
    show(next_steps(recipe, folder))
    comparison.check_complete()


def estimate(recipe: Recipe) -> str:
    """How long the tour with a real model takes on this machine, from the time of a few plain updates."""
    with TemporaryDirectory(prefix="bridle-quickstart-") as folder:
        plain = unsaved(recipe)
        plain = replace(plain, training=plain.training | {"max_steps": TIMED}, regularisers={})
        seconds = build_trainer(plain, Path(folder), recipe.read_corpus()).train().metrics["train_runtime"] / TIMED
    minutes = UPDATES_WORTH * seconds / 60
    return f"About {minutes:.0f} minutes on this machine: {', '.join(REAL_METHODS)}, with the settings as shipped."


def next_steps(recipe: Recipe, folder: Path) -> str:
    """Commands to try after the tour."""
    models = [folder / name / f"seed-{recipe.training.get('seed', 0)}" / "model" for name in TUNED]
    (domain, regulariser), *_ = recipe.regularisers.items()
    is_own = OWN in recipe.corpus
    prompt = "MY PROMPT" if is_own else "Market board. magpie writes, heated:"
    weight = (f"--regularisers.{domain}.weight", f"{regulariser.weight * 3:g}")
    made = [model for model in models if model.is_dir()][:1]
    commands = [
        *(["bridle", "generate", model, "--prompt", prompt, "--samples", 5] for model in made),
        ["bridle", "demo", folder],
        ["bridle", "compare", folder / RECIPE_FILE, "--methods", "base,sft,constrained-adaptive", *weight],
    ]
    if not is_own:
        commands.append(["bridle", "quickstart", "--corpus", "MY.jsonl", "--constraint", "words:MY-WORDS.txt"])
    return "\n".join(["Next:", *(f"  {shlex.join(map(str, command))}" for command in commands)])


def _replace_forum(mapping: dict[str, Any], source: DataSource) -> None:
    if source.rows is not None or source.shuffle is not None:
        raise UserError("--corpus: the tour shuffles and splits the rows itself; leave rows and shuffle out")
    columns = source.read().column_names
    rows = {key: value for key, value in vars(source).items() if value is not None} | {"shuffle": 0}
    training, held_out = rows | {"rows": "0:90%"}, rows | {"rows": "90%:"}
    evaluation = mapping["evaluation"]
    mapping["corpus"] = {OWN: training} | {"encyclopaedia": mapping["corpus"]["encyclopaedia"]}
    mapping["regularisers"] = {OWN: mapping["regularisers"]["forum"]}
    mapping["prompt_tokens"] = [0, None]  # rows may be of any length
    evaluation["prompts"] = {OWN: held_out if "prompt" in columns else held_out | {"prompt_tokens": 8}}
    others = {name: evaluation["perplexity"][name] for name in ("encyclopaedia", "scenes")}
    evaluation["perplexity"] = ({OWN: held_out} if "text" in columns else {}) | others
    del evaluation["classification"]
