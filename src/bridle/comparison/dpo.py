"""DPO from the plainly tuned model, on pairs of its own completions that the constraint tells apart."""

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments
from trl import DPOConfig

from bridle.baselines.preference import Pair, prefer, preference_pairs
from bridle.comparison.cell import OF_EVALUATION, Candidate, Cell, refuse_shares, used_constraints
from bridle.comparison.knobs import DPOOptions, options_of
from bridle.constraints import AsyncScoring
from bridle.data import Rollout, read_rollouts, write_rollouts
from bridle.errors import UserError
from bridle.models.loading import load_model, load_tokenizer
from bridle.recipes.metrics import MetricsFile, TrainingProgress
from bridle.recipes.recipe import Recipe
from bridle.recipes.run import build_trainer
from bridle.training.config import ConstrainedConfig
from bridle.training.guards import InterruptionGuard, warn
from bridle.training.measures import check_scored
from bridle.training.rollouts import score_rollouts
from bridle.training.trainer import ConstrainedTrainer
from bridle.utils.files import read_json, read_rows, write_json
from bridle.utils.timing import timed

ROLLOUTS, REPORT, METRICS = "rollouts.jsonl", "pairs.json", "metrics.jsonl"

MOST_PASSES = 10  # over the pairs; more are reported


def dpo(cell: Cell) -> Candidate:
    """Direct preference optimisation of the plainly tuned model on its own completions (Rafailov et al., 2023).

    The prompts are those of the regulariser's rollouts; there are fewer, so that the completions are as many. Of each
    prompt, the best completion that complies is preferred to the worst that violates, by the constraint's score. A
    prompt without both makes no pair.

    There are as many updates as `sft` made, with its batch, in pairs: twice as many sequences, which the reference,
    the plainly tuned model, reads too. The cost is that of sampling, scoring and the updates; as with `rl`, that of
    `sft` is not part of it.

    Raises:
        UserError: there are fewer pairs than an update takes, or a regulariser asks for a share.
        RunStopped: more than `max_missing` of the completions got no score.
    """
    refuse_shares(cell.recipe, "pairs would make all outputs comply")
    tuned, options = cell.candidate("sft"), options_of(cell.method, cell.recipe)
    recipe = cell.sampling_from(tuned.model)
    settings = recipe.config(cell.folder)
    config = _dpo_config(recipe, settings, options, int(tuned.cost["updates"]))
    pairs, measured = _pairs(cell, recipe, options.num_generations)
    _check_enough(measured, config)
    model, tokenizer = load_model(tuned.model, dtype=recipe.dtype), load_tokenizer(tuned.model)
    metrics = cell.folder / METRICS
    callbacks = [MetricsFile(metrics), TrainingProgress("learning preferences"), InterruptionGuard()]
    updates = prefer(model, tokenizer, pairs, config, callbacks, cell.resume)
    folder = cell.save(model, tokenizer)
    *_, (_, last) = read_rows(metrics)
    about = {
        **cell.origin,
        **{key: getattr(config, key) for key in ("beta", "learning_rate", "max_steps", "seed")},
        "num_generations": options.num_generations,
        "max_completion_length": settings.max_new_tokens,
        "constraints": used_constraints(recipe),
    }
    seconds = measured["seconds_sampling"] + measured["seconds_scoring"] + last["seconds"]
    cost = {"seconds": seconds, "updates": updates, "tokens_sampled": measured["tokens_sampled"]}
    return Candidate(folder, cost=cost, about=about)


def _pairs(cell: Cell, recipe: Recipe, num_generations: int) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs, and what was drawn for them. A resumed cell draws nothing again."""
    kept, report = cell.folder / ROLLOUTS, cell.folder / REPORT
    if cell.resume and report.exists():  # which is written last
        return preference_pairs(read_rollouts(kept), num_generations), read_json(report, dict[str, Any])
    trainer = build_trainer(recipe, cell.folder, recipe.read_corpus())
    rollouts, seconds = _completions(trainer, num_generations)
    check_scored(rollouts, trainer.args.max_missing, "methods.dpo", "completions")
    pairs = preference_pairs(rollouts, num_generations)
    measured = {
        "prompts": len(rollouts) // num_generations,
        "completions": len(rollouts),
        "violating": sum(rollout.complies is False for rollout in rollouts),
        "missing": sum(rollout.complies is None for rollout in rollouts),
        "pairs": len(pairs),
        "tokens_sampled": sum(len(rollout.completion_ids) for rollout in rollouts),
        **seconds,
    }
    write_rollouts(kept, rollouts)
    write_json(report, measured)
    return pairs, measured


def _completions(trainer: ConstrainedTrainer, num_generations: int) -> tuple[list[Rollout], dict[str, float]]:
    """Scored completions of the first prompts of each round, each prompt's together; and the seconds it took."""
    (regulariser,), config = trainer.regularisers, trainer.args
    prompts_per_round = max(1, config.rollouts_per_round // num_generations)
    rollouts, seconds = list[Rollout](), dict[str, float]()
    with AsyncScoring(regulariser.constraint) as scoring:
        with timed(seconds, "seconds_sampling"):
            for index in range(1, config.rounds + 1):
                prompts = regulariser.prompts(index)[:prompts_per_round]
                repeated = [prompt for prompt in prompts for _ in range(num_generations)]
                drawn, _ = regulariser.draw(index, scoring, repeated)
                rollouts += drawn
        with timed(seconds, "seconds_scoring"):
            score_rollouts(rollouts, scoring)
    return rollouts, seconds


def _check_enough(measured: dict[str, Any], config: DPOConfig) -> None:
    """Refuses fewer pairs than an update takes, and warns of many passes over them."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    found = (
        "methods.dpo: {pairs} of {prompts} prompts make a pair ({violating} of {completions} completions violate, "
        "{missing} got no score)"
    ).format(**measured)
    advice = "raise rollouts_per_round or methods.dpo.num_generations, or take prompts that violate more"
    if measured["pairs"] < batch:
        raise UserError(f"{found}, and an update takes {batch}; {advice}")
    if (passes := config.max_steps * batch / measured["pairs"]) > MOST_PASSES:
        warn(f"{found}, so each is learnt {passes:.0f} times; {advice}")


def _dpo_config(recipe: Recipe, settings: ConstrainedConfig, options: DPOOptions, updates: int) -> DPOConfig:
    """The recipe's options of training, for TRL's trainer of preferences."""
    shared = {field.name for field in fields(TrainingArguments)} - OF_EVALUATION
    given = {key: value for key, value in recipe.training.items() if key in shared and "hub" not in key}
    own = {
        "output_dir": settings.output_dir,
        "beta": options.beta,
        "learning_rate": options.learning_rate or settings.learning_rate,
        "max_steps": updates,
        "max_length": None,  # prompts leave room for their completions
        "bf16": settings.bf16,
        "save_total_limit": settings.keep_last,
        "report_to": "none",
    }
    return DPOConfig(**given | own)
