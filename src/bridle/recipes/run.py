"""Running a recipe: from a YAML file to a folder with the model, its auxiliary and their description."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from bridle.errors import RunStopped, UserError
from bridle.models.card import write_card
from bridle.models.card_text import with_names
from bridle.models.hub import check_strategy, without_token
from bridle.models.loading import load_model, load_tokenizer, warn_if_emulated
from bridle.recipes.inputs import check_inputs, write_inputs
from bridle.recipes.metrics import MetricsFile, TrainingProgress
from bridle.recipes.recipe import Recipe
from bridle.training.checkpointing import last_checkpoint
from bridle.training.config import ConstrainedConfig
from bridle.training.trainer import ConstrainedTrainer
from bridle.utils.distributed import barrier, is_main
from bridle.utils.files import only_writer, read_json, read_rows, write_json, write_text
from bridle.utils.interruption import Interrupted
from bridle.utils.oom import stopping_when_exhausted
from bridle.utils.provenance import environment
from bridle.utils.settings import different_keys, read_yaml, reordered

RECIPE_FILE = "recipe.yaml"
SHAPES_NOTHING = ("push_to_hub", "hub_", "evaluation", "methods", "keep_last", "env")
"""Prefixes of the recipe's keys that may change before a run is resumed."""
ORDERED = ("corpus", "regularisers")
"""Sections whose order gives each part its random numbers, and says which regulariser is the first."""


def train(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    corpus: Mapping[str, Dataset] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> ConstrainedTrainer:
    """Runs a recipe.

    Args:
        recipe: what to train.
        output_dir: receives `model/` (a `from_pretrained` folder or adapter), `auxiliary/` (the last R, and each
            round's in `round-N/`; a folder per regulariser if there are several), `rollouts/`, `metrics.jsonl`,
            `recipe.yaml`, `environment.json`, `inputs.json` and the checkpoints.
        resume: resume from the last checkpoint in `output_dir`.
        accept_changes: resume even if the recipe or one of its files has changed.
        corpus: rows by domain, in place of the recipe's own.
        callbacks: further ones of the trainer.

    Returns:
        The trainer, with the tuned model.

    Raises:
        UserError: something that the recipe names cannot be used; or `output_dir` holds a run and `resume` is off, or
            a run of another recipe, or another process is writing there.
        RunStopped: the run cannot usefully continue, or the disk or the memory is full; its work is in `output_dir`.
        Interrupted: a signal arrived; the message names the last checkpoint.
    """
    folder = Path(output_dir)
    recipe.config(folder)  # also joins the processes of the group
    if os.path.exists(folder / RECIPE_FILE):  # Path's own raises where a name is too long
        _check_recipe(recipe, folder, resume, accept_changes)
    barrier()  # or a process may mistake the main process's files for another run's
    with stopping_when_exhausted(folder), only_writer(folder) if is_main() else nullcontext():
        try:
            return _train(recipe, folder, corpus or recipe.read_corpus(), resume, callbacks)
        except Interrupted as interrupted:
            last = last_checkpoint(folder)
            interrupted.kept = f"{last} is kept" if last else f"{folder} holds no checkpoint yet"
            raise


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Writes `recipe.yaml` in a run's or a comparison's folder, without the hub's token."""
    write_text(folder / RECIPE_FILE, yaml.safe_dump(without_token(recipe.resolved), sort_keys=False))


def _check_recipe(recipe: Recipe, folder: Path, resume: bool, accept_changes: bool) -> None:
    """Refuses a folder that holds a run, unless it resumes the same run."""
    if not resume:
        raise UserError(f"{folder}: holds a run already; add --resume to resume it, or name another --output_dir")
    recipes = read_yaml(folder / RECIPE_FILE), without_token(recipe.resolved)
    found = different_keys(*recipes) + reordered(*recipes, ORDERED)
    changed = [key for key in found if not key.startswith(SHAPES_NOTHING)]
    if changed and not accept_changes:
        raise UserError(
            f"{folder / RECIPE_FILE}: holds another recipe: {', '.join(changed)} differ; add --accept_changes to "
            "resume with the new one, or name another --output_dir"
        )
    if not accept_changes:
        check_inputs(
            recipe, folder, "add --accept_changes to resume anyway, or name another --output_dir", SHAPES_NOTHING
        )


def _train(
    recipe: Recipe,
    folder: Path,
    rows: Mapping[str, Dataset],
    resume: bool,
    callbacks: Sequence[TrainerCallback],
) -> ConstrainedTrainer:
    own = [_Provenance(recipe, folder), MetricsFile(folder / "metrics.jsonl"), TrainingProgress()]
    trainer = build_trainer(recipe, folder, rows, [*own, *callbacks])
    checkpoint = last_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    _warn_of_unfitted(trainer)
    if trainer.is_fsdp_enabled:  # `from_pretrained` does not read a model in shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "model"), _internal_call=True)  # pushed below, with its card
    if is_main():
        describe_run(recipe, folder, rows={name: len(domain) for name, domain in rows.items()})
    if trainer.args.push_to_hub:
        trainer.push_saved_model()
    return trainer


def _warn_of_unfitted(trainer: ConstrainedTrainer) -> None:
    """Warns that there is no R, so that a constraint had no part in the model."""
    for regulariser in trainer.regularisers:
        fits = regulariser.options.weight > 0 and not regulariser.options.is_retention
        if fits and not (regulariser.is_fitted or regulariser.share_is_off):
            trainer.supervisor.warn(
                f"{regulariser.name}: the constraint had no part in this model: no round before it had labels of both "
                "kinds to fit R on, so there is no auxiliary; try more rollouts_per_round, or prompts that violate more"
            )


class _Provenance(TrainerCallback):
    """Writes what a run was made from. Until training begins nothing is written: a refused recipe leaves no run."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder

    def on_train_begin(self, args, state, control, **kwargs):
        if is_main():
            write_recipe(self.recipe, self.folder)
            write_json(self.folder / "environment.json", environment(args.seed))
            write_inputs(self.recipe, self.folder)


def build_trainer(
    recipe: Recipe, output_dir: Path, corpus: Mapping[str, Dataset], callbacks: Sequence[TrainerCallback] = ()
) -> ConstrainedTrainer:
    """The trainer of a recipe, which writes to `output_dir`.

    Args:
        corpus: rows by domain.
        callbacks: in place of those of `transformers` that print each record as a Python dictionary.

    Raises:
        UserError: something that the recipe names cannot be used.
    """
    config = recipe.config(output_dir)
    check_strategy(config)
    used = [regulariser.constraint for regulariser in recipe.regularisers.values()]
    for constraint in used + (recipe.eval.constraints if recipe.eval else []):
        if constraint is not None:
            constraint.load()  # mistakes show now, not after an hour
    set_seed(config.seed)  # adapters have random initial weights
    trainer = ConstrainedTrainer(
        model=load_model(recipe.model, dtype=recipe.dtype, lora=recipe.lora),
        args=config,
        corpus=corpus,
        regularisers=list(recipe.regularisers.values()),
        weights={name: domain.weight for name, domain in recipe.corpus.items()},
        learn={name: domain.learn for name, domain in recipe.corpus.items()},
        processing_class=load_tokenizer(recipe.model),
        eval_options=recipe.eval,
    )
    warn_if_emulated(trainer.model)
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def fit_guide(recipe: Recipe, output_dir: str | Path) -> dict[str, Any]:
    """Fits R for each regulariser of the recipe, whatever its weight, without training the model.

    It is what NADO decoding needs.

    Args:
        recipe: names the model and the constraints that label its samples.
        output_dir: receives `auxiliary/` and `rollouts/`.

    Returns:
        The round's metrics; see `docs/metrics.md`.

    Raises:
        UserError: as `train`.
        RunStopped: as `DomainRegulariser.update`, or all samples have the same label, from which R cannot learn.
    """
    fitted = {
        name: one if one.weight or one.is_retention else replace(one, weight=1.0)  # at 0 no R is fitted
        for name, one in recipe.regularisers.items()
    }
    trainer = build_trainer(replace(recipe, regularisers=fitted), Path(output_dir), recipe.read_corpus())
    measured = trainer.schedule.begin_round(1)
    if not any(regulariser.is_fitted for regulariser in trainer.regularisers):
        allowed = any(regulariser.share_is_off for regulariser in trainer.regularisers)
        reason = "the share of the samples is allowed" if allowed else "every sample got the same label"
        raise RunStopped(f"{output_dir}: {reason}, so there is nothing to guide by")
    return measured


def describe_run(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    rows: Mapping[str, int] | None = None,
    results: Mapping[str, Any] | None = None,
    method: str | None = None,
    description: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the card of the model that `train` wrote to `output_dir`, replacing an older one.

    Args:
        recipe: of the run.
        output_dir: the run's folder.
        rows: number of rows of each domain.
        results, method, description: as in `write_card`.
        about: further settings, by a recipe's keys.

    Returns:
        The path of the card.
    """
    folder = Path(output_dir)
    return write_card(
        folder / "model",
        recipe.variables.hidden({**_settings(recipe, recipe.config(folder)), **(about or {})}),
        metrics=[record for _, record in read_rows(folder / "metrics.jsonl")],
        results=results,
        method=method,
        description=description,
        rows=rows,
        environment=read_json(folder / "environment.json", dict[str, Any]),
    )


def _settings(recipe: Recipe, config: ConstrainedConfig) -> dict[str, Any]:
    """The recipe with its defaults, for the card."""
    constraints = [options.constraint for options in recipe.regularisers.values() if options.constraint is not None]
    return {
        **config.to_dict(),
        "auxiliary": asdict(config.auxiliary),
        "model": recipe.model,
        "dtype": recipe.dtype,
        "lora": recipe.lora and asdict(recipe.lora),
        "corpus": {name: vars(domain) for name, domain in recipe.corpus.items()},
        "constraints": {constraint.name: constraint.describe() for constraint in constraints},
        "regularisers": {name: with_names(options) for name, options in recipe.regularisers.items()},
    }
