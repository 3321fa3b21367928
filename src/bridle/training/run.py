"""Carrying out a recipe: from a YAML file to a folder with the model, its auxiliary, and how they came about."""

from pathlib import Path

import yaml
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from bridle.environment import environment, write_json
from bridle.errors import RunStopped, UserError
from bridle.models.loading import load_model, load_tokenizer
from bridle.training.recipe import Recipe
from bridle.training.reporting import EntropyGuard, MetricsFile, TrainingProgress
from bridle.training.trainer import ConstrainedTrainer

RECIPE_FILE = "recipe.yaml"


def train(recipe: Recipe, output_dir: str | Path, *, resume: bool = False) -> ConstrainedTrainer:
    """Carries out a recipe.

    Args:
        recipe: what to do.
        output_dir: afterwards holds `model/` (a `from_pretrained` folder or adapter), `auxiliary/` (the
            last R, and each round's in `round-N/`; a folder per regulariser where there are several),
            `rollouts/`, `metrics.jsonl`, `recipe.yaml`, `environment.json` and the checkpoints.
        resume: go on from the last checkpoint in `output_dir`.

    Returns:
        The trainer, with the tuned model.

    Raises:
        UserError: something the recipe names cannot be used, or `output_dir` holds a run and `resume` is off.
        RunStopped: the run cannot go on usefully; what it has done is in `output_dir`.
    """
    folder = Path(output_dir)
    if (folder / RECIPE_FILE).exists() and not resume:
        raise UserError(f"{folder}: holds a run already; add --resume to go on with it, or name another --output_dir")
    config = recipe.config(folder)
    for regulariser in recipe.regularisers.values():
        if regulariser.constraint is not None:
            regulariser.constraint.load()  # a mistake shows now and not after an hour
    rows = {name: domain.read() for name, domain in recipe.corpus.items()}
    set_seed(config.seed)  # adapters are drawn at random
    tokenizer = load_tokenizer(recipe.model)
    model = load_model(recipe.model, dtype=recipe.dtype, lora=recipe.lora)
    trainer = ConstrainedTrainer(
        model=model,
        args=config,
        corpus=rows,
        regularisers=recipe.regularisers,
        weights={name: domain.weight for name, domain in recipe.corpus.items()},
        processing_class=tokenizer,
    )
    guard = EntropyGuard(config.entropy_floor)
    _replace_callbacks(trainer, [MetricsFile(folder / "metrics.jsonl"), TrainingProgress(), guard])

    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe.resolved, sort_keys=False), encoding="utf-8")
    write_json(folder / "environment.json", environment(config.seed))
    checkpoint = get_last_checkpoint(str(folder)) if resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if guard.verdict:
        raise RunStopped(f"{folder}: {guard.verdict}; the last checkpoint is kept")
    trainer.save_model(str(folder / "model"))
    (folder / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
    return trainer


def _replace_callbacks(trainer: ConstrainedTrainer, callbacks: list) -> None:
    """Our displays in place of those of `transformers`, which print every record as a Python dictionary."""
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    for callback in callbacks:
        trainer.add_callback(callback)
