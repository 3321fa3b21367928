"""A dry run, `bridle check`: shows a recipe's rows, prompts, labels and updates before a long run."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby, islice
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from bridle.constraints.cache import remove_caches
from bridle.core.tokens import IGNORE
from bridle.data import DOMAIN
from bridle.data.rows import filled_rows, format_fields, holds_prompts, outputs_of
from bridle.errors import one_line
from bridle.recipes.recipe import Recipe
from bridle.recipes.run import build_trainer
from bridle.recipes.time_plan import in_schedule, phases_of
from bridle.training.setup import check_options
from bridle.training.trainer import ConstrainedTrainer

UPDATES, SAMPLES, PROMPTS = 3, 64, 5  # updates; rows and rollouts that are scored; prompts that are shown
LONGEST = 400  # characters of an example

OF_CHECKPOINTS_AND_TRACKERS = (
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("run_name", "project", "trackio_"),
)
"""Options, or what they begin with, that need checkpoints or a tracker."""

DRY: dict[str, Any] = {
    "max_steps": UPDATES,
    "rounds": 1,
    "schedule": "sequential",
    "parallel": {},
    "rollouts_per_round": SAMPLES,
    "push_to_hub": False,
}
"""Keys that a dry run overrides."""


def check(recipe: Recipe, show: Callable[[str], None]) -> None:
    """Runs one short round of a recipe in a temporary folder, and shows the results line by line.

    It neither reads nor writes a cache of labels.

    Raises:
        UserError: something that the recipe names cannot be used.
        RunStopped: too many rollouts got no score.
    """
    config = recipe.config("unused")
    for constraint in recipe.constraints.values():
        remove_caches(constraint)
    check_options(config, recipe.regularisers, {})
    untargeted = {name: replace(one, target=None) for name, one in recipe.regularisers.items()}
    rows = recipe.read_corpus()
    with TemporaryDirectory(prefix="bridle-check-") as folder:
        clock = _Clock()
        dry = unsaved(recipe)
        dry = replace(dry, training=dry.training | DRY, regularisers=untargeted)
        trainer = build_trainer(dry, Path(folder), rows, [clock])
        for line in chain(_corpus(trainer, rows), _prompts(trainer), _labels_of_rows(recipe, rows)):
            show(line)
        trainer.train()
        record = next(entry for entry in reversed(trainer.state.log_history) if "round" in entry)
        for line in chain(_labels_of_rollouts(trainer), _estimate(trainer, config, record, clock)):
            show(line)


def unsaved(recipe: Recipe) -> Recipe:
    """The recipe without checkpoints and trackers, and what depends on them."""
    kept = {key: value for key, value in recipe.training.items() if not key.startswith(OF_CHECKPOINTS_AND_TRACKERS)}
    return replace(recipe, training=kept | {"save_strategy": "no", "report_to": "none"})


# ---------------------------------------------------------------------- the corpus


def _corpus(trainer: ConstrainedTrainer, rows: Mapping[str, Dataset]) -> Iterator[str]:
    mixture = trainer.train_dataset
    domains = np.array(mixture[DOMAIN])
    for index, name in enumerate(trainer.domains):
        places = np.flatnonzero(domains == index)
        lengths = [len(ids) for ids in mixture.select(places)["input_ids"]]
        full = sum(length == trainer.args.max_length for length in lengths)
        yield (
            f"{name}: {len(rows[name])} rows; in an epoch {len(places)} of {len(mixture)}, with {sum(lengths)} tokens, "
            + (f"{full} of them as long as max_length allows" if full else "no row is cut at max_length")
        )
        text, tokens = _marked(mixture[int(places[0])], trainer.processing_class)
        if name in trainer.held:
            of_batch = trainer.get_train_dataloader().total_batch_size * trainer.args.gradient_accumulation_steps
            part = len(places) / len(mixture)
            yield f"  held and not learnt: {part:.0%} of the rows, {part * of_batch:.2g} of the {of_batch} of an update"
        if holds_prompts(rows[name].column_names):
            yield f"  a prompt: {text}"
            continue
        yield f"  ›what is {'held' if name in trainer.held else 'trained on'}‹ of a row: {text}"
        yield f"  its tokens: {tokens}"


def _marked(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A row as text and token by token, with marks around the trained part."""
    texts, tokens = [], []
    for trained, group in groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORE):
        ids = [token for token, _ in group]
        before, behind = "›‹" if trained else ("", "")
        texts.append(f"{before}{tokenizer.decode(ids)}{behind}")
        tokens.append(f"{before}{'|'.join(tokenizer.decode([token]) for token in ids)}{behind}")
    return _short("".join(texts)), _short("|".join(tokens))


def _prompts(trainer: ConstrainedTrainer) -> Iterator[str]:
    for regulariser in trainer.regularisers:
        if regulariser.options.samples:
            prompts = [trainer.processing_class.decode(prompt.ids) for prompt in regulariser.prompts(1)[:PROMPTS]]
            yield f"rollouts for {regulariser.name} start at: {' · '.join(map(_short, prompts))}"


def _short(text: str) -> str:
    return shorten(one_line(text), LONGEST, placeholder=" ...")


# ---------------------------------------------------------------------- labels


def _labels_of_rows(recipe: Recipe, rows: Mapping[str, Dataset]) -> Iterator[str]:
    """The labels of each constraint on rows spread over each domain."""
    rows = {domain: dataset for domain, dataset in rows.items() if not holds_prompts(dataset.column_names)}
    sampled = {domain: _some_rows(dataset, ceil(SAMPLES / len(rows)), domain) for domain, dataset in rows.items()}
    scored = list(chain.from_iterable(sampled.values()))
    for name, constraint in recipe.constraints.items():
        constraint.load()
        began = time.perf_counter()
        outputs = outputs_of(scored, with_prompts=constraint.reads != "completion")
        verdicts = iter([score.complies for score in constraint.score(*outputs)])
        rate = len(scored) / (time.perf_counter() - began)
        balance = [f"of {domain} {_balance(list(islice(verdicts, len(some))))}" for domain, some in sampled.items()]
        yield f"{name} on rows {', '.join(balance)}; {_rounded(rate):,} texts a second"


def _rounded(rate: float) -> int | float:
    """A number to two digits, whole from 10 on."""
    rounded = float(f"{rate:.2g}")
    return int(rounded) if rounded >= 10 else rounded


def _some_rows(dataset: Dataset, count: int, domain: str) -> list[dict[str, Any]]:
    some = dataset.select(np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int))
    return [values for _, values in filled_rows(some, format_fields(some.column_names, domain), domain)]


def _labels_of_rollouts(trainer: ConstrainedTrainer) -> Iterator[str]:
    for regulariser in trainer.regularisers:
        if regulariser.rollouts and not regulariser.options.is_retention:
            verdicts = [rollout.complies for rollout in regulariser.rollouts]
            warning = ": R cannot learn from labels that are all alike" if len({*verdicts} - {None}) < 2 else ""
            yield f"{regulariser.constraint.name} on rollouts for {regulariser.name}: {_balance(verdicts)}{warning}"


def _balance(verdicts: Sequence[bool | None]) -> str:
    missing = verdicts.count(None)
    return f"{verdicts.count(False)} of {len(verdicts)} violate" + (f" and {missing} have no score" if missing else "")


# ---------------------------------------------------------------------- time and memory


class _Clock(TrainerCallback):
    """Measures updates, without the regularisers' round before the first one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._began)


def _estimate(trainer: ConstrainedTrainer, config: Any, record: dict[str, Any], clock: _Clock) -> Iterator[str]:
    update = median(clock.seconds[1:])  # the first one allocates
    a_round = phases_of(record, config.rollouts_per_round / SAMPLES)
    yield from in_schedule(config, [a_round] * config.rounds, update, _updates(trainer, config)).lines()
    yield f"most memory so far: {_peak_memory() / 2**30:.2f} GiB"


def _updates(trainer: ConstrainedTrainer, config: Any) -> int:
    if config.max_steps > 0:
        return config.max_steps
    rows = trainer.get_train_dataloader().total_batch_size * config.gradient_accumulation_steps
    return ceil(config.num_train_epochs * ceil(len(trainer.train_dataset) / rows))


def _peak_memory() -> int:
    """Peak bytes on the GPU, or of this process without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
