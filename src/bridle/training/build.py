"""Building a recipe's trainer, with everything the recipe names loaded."""

from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from transformers import set_seed

from bridle.models.hub import check_strategy
from bridle.models.loading import load_model, load_tokenizer
from bridle.training.recipe import Recipe
from bridle.training.trainer import ConstrainedTrainer


def build_trainer(recipe: Recipe, output_dir: Path, corpus: Mapping[str, Dataset]) -> ConstrainedTrainer:
    """The trainer of a recipe.

    Args:
        recipe: what to do.
        output_dir: where the trainer writes.
        corpus: rows by domain.

    Raises:
        UserError: something the recipe names cannot be used.
    """
    config = recipe.config(output_dir)
    check_strategy(config)
    used = [regulariser.constraint for regulariser in recipe.regularisers.values()]
    for constraint in used + (recipe.eval.constraints if recipe.eval else []):
        if constraint is not None:
            constraint.load()  # a mistake shows now and not after an hour
    set_seed(config.seed)  # adapters are drawn at random
    return ConstrainedTrainer(
        model=load_model(recipe.model, dtype=recipe.dtype, lora=recipe.lora),
        args=config,
        corpus=corpus,
        regularisers=list(recipe.regularisers.values()),
        weights={name: domain.weight for name, domain in recipe.corpus.items()},
        processing_class=load_tokenizer(recipe.model),
        eval_options=recipe.eval,
    )
