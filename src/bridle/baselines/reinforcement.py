"""Reinforcement learning: maximise E[C] − β·KL(p_θ ‖ p_0) on sampled completions, with TRL's own trainers.

The optimum is p_0·exp(C/β), normalised. RLOO (Ahmadian et al., ACL 2024, arXiv 2402.14740) takes a whole
completion for one action, as the constraint scores it, and its baseline, the mean reward of the prompt's other
completions, leaves the policy gradient unbiased. GRPO (Shao et al., 2024, arXiv 2402.03300) divides each group's
rewards by their spread, which blows up rare outcomes of a boolean reward; it is there for those who prefer it.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME  # the file that it writes last
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from bridle.constraints import Constraint
from bridle.data import decode_parts
from bridle.data.rows import Messages
from bridle.errors import UserError
from bridle.models.hidden import causal_lm
from bridle.models.loading import context_length, end_token_ids
from bridle.utils.checkpoints import last_whole
from bridle.utils.progress import Progress

HISTORY = ("step", "seconds", "reward", "kl", "entropy", "missing")  # what the report keeps of a step's record


@dataclass
class ReinforcementOptions:
    """How to reinforce.

    Attributes:
        algorithm: "rloo" or "grpo".
        learning_rate: of AdamW; constant, so that a run can be taken further. The default suits a model of some
            million parameters; TRL's own, for large ones, is 1e-6.
        beta: β, the reward that a nat of KL to the starting model costs: of a whole completion in RLOO, of a token
            in GRPO.
        num_generations: completions of one prompt, which are each other's baseline; at least 2.
        batch_size: completions an update, a multiple of `num_generations`.
        micro_batch_size: completions in one forward and backward pass; all of the batch where not given.
        soft_reward: reward the constraint's value instead of its verdict (1 or 0).
        window: updates in each of the two windows whose rewards are compared.
        tolerance: a run has converged when the mean reward of a window exceeds that of the window before
            by no more than this.
        max_steps: updates at which a run ends in any case.
        save_every: updates between two checkpoints, of which the last is kept.

    Raises:
        UserError: an unknown algorithm, or batches that do not divide evenly; the message begins with the field.
    """

    algorithm: Literal["rloo", "grpo"] = "rloo"
    learning_rate: PositiveFloat = 3e-4
    beta: NonNegativeFloat = 0.1
    num_generations: PositiveInt = 4
    batch_size: PositiveInt = 64
    micro_batch_size: PositiveInt | None = None
    soft_reward: bool = False
    window: PositiveInt = 25
    tolerance: float = 0.01
    max_steps: PositiveInt = 500
    save_every: PositiveInt = 100

    def __post_init__(self) -> None:
        if self.algorithm not in TRAINERS:
            raise UserError(f"algorithm: {self.algorithm!r} is unknown; use {' or '.join(TRAINERS)}")
        if self.num_generations < 2 or self.batch_size % self.num_generations:
            raise UserError(
                f"num_generations: {self.num_generations} must be at least 2 and divide batch_size={self.batch_size}"
            )
        if self.batch_size % self._micro_batch:
            raise UserError(f"micro_batch_size: {self.micro_batch_size} must divide batch_size={self.batch_size}")

    @property
    def _micro_batch(self) -> int:
        return self.micro_batch_size or self.batch_size

    @property
    def prompts_per_step(self) -> int:
        """How many prompts an update takes."""
        return self.batch_size // self.num_generations

    def config(self, output_dir: Path, seed: int, max_new_tokens: int) -> RLOOConfig | GRPOConfig:
        """The same options for TRL."""
        gpu = torch.cuda.is_available()
        return TRAINERS[self.algorithm].config(
            output_dir=str(output_dir),
            seed=seed,
            learning_rate=self.learning_rate,
            lr_scheduler_type="constant",
            beta=self.beta,
            num_generations=self.num_generations,
            per_device_train_batch_size=self._micro_batch,
            gradient_accumulation_steps=self.batch_size // self._micro_batch,
            max_completion_length=max_new_tokens,
            max_steps=self.max_steps,
            shuffle_dataset=False,  # `_in_passes` does
            disable_dropout=True,  # policy and reference must differ in their weights alone
            gradient_checkpointing=gpu,
            bf16=gpu and torch.cuda.is_bf16_supported(),
            use_cpu=not gpu,
            logging_steps=1,
            save_steps=self.save_every,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        )


def reinforce(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    constraint: Constraint,
    options: ReinforcementOptions,
    *,
    output_dir: Path,
    seed: int,
    max_new_tokens: int,
    seconds: float | None,
    messages: Sequence[Messages | None] | None = None,
    resume: bool = False,
    resume_from: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Tunes a model in place until the time is up or, where there is no limit, until the reward has converged.

    Completions are drawn from the model's full distribution at temperature 1. A completion without a score
    is left out of its group's baseline and moves nothing. Nothing here reads the corpus.

    Args:
        model: the starting model, also for a run that goes on; it is the reference of the KL penalty as well.
            Where it is full, not an adapter, its weights are put down in `output_dir` for a moment.
        tokenizer: with a pad token.
        prompts: token ids, with the beginning-of-text token where the model expects one.
        constraint: gives the reward, from the text of completion and prompt.
        options: how to reinforce.
        output_dir: for the checkpoints.
        seed: draws prompts and completions.
        max_new_tokens: a completion that has not ended by then is cut.
        messages: of prompts that are chats, the turns, by prompt; the constraint reads them instead of the text.
        seconds: of training, those before a resumption included; the update under way is finished.
        resume: go on from the last checkpoint in `output_dir`, if there is one.
        resume_from: a checkpoint of another run with the same options to begin with.
        callbacks: of the trainer, beside those that end and show the run.

    Returns:
        `steps`, `seconds`, `tokens` (prompts and completions trained on), `stopped_because` ("time",
        "converged" or "steps"), `missing` (completions without a score), `checkpoint` (its folder's name in
        `output_dir`), `reward` and `kl` (nats a completion token) over the last window, and `history`: for
        each update its `step`, `seconds`, `reward`, `kl`, `entropy` (nats) and `missing`. A mean of nothing
        is None.

    Raises:
        UserError: there are no prompts, or one leaves no room in the model's context for the completion.
    """
    _check_lengths(prompts, max_new_tokens, context_length(model))
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = (last_whole(output_dir, TRAINER_STATE_NAME) if resume else None) or resume_from
    rules: list[StoppingRule] = [TimeBudget(seconds)]
    if seconds is None:
        rules.append(Convergence(options.window, options.tolerance))
    progress = StepsProgress(total=options.max_steps if seconds is None else None)
    with _lent(model, tokenizer), _hushed():
        with _reference(model, output_dir) if options.beta else nullcontext():
            trainer = TRAINERS[options.algorithm](
                model=model,
                reward_funcs=constraint_reward(constraint, options.soft_reward, tokenizer),
                args=options.config(output_dir, seed, max_new_tokens),
                train_dataset=_in_passes(prompts, messages, options.max_steps * options.prompts_per_step, seed),
                processing_class=tokenizer,
                callbacks=[*rules, progress, *callbacks],
            )
        for printer in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printer)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return _report(trainer.state, rules, options.window, output_dir)


# ------------------------------------------------------------------ the reward


def constraint_reward(
    constraint: Constraint, soft: bool, tokenizer: PreTrainedTokenizerBase
) -> Callable[..., list[float | None]]:
    """The constraint as TRL calls a reward: 1 complies, 0 violates (or its value, if `soft`), None missing.

    Prompts and completions are token ids, which `tokenizer` decodes together; of a chat the constraint gets the turns.
    """

    def compliance(
        prompts: list[list[int]],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None],
        turns: list[str],
        **_: Any,
    ) -> list[float | None]:
        texts = [decode_parts(*both, tokenizer) for both in zip(prompts, completion_ids, strict=True)]
        given = [json.loads(of_chat) or text for of_chat, (text, _) in zip(turns, texts, strict=True)]
        scores = constraint.score(given, [completion for _, completion in texts])
        log_metric("missing", float(sum(score.is_missing for score in scores)))
        return [score.value if soft or score.complies is None else float(score.complies) for score in scores]

    return compliance


# ------------------------------------------------------------------ when to stop


class StoppingRule(TrainerCallback):
    """Ends a run, with a checkpoint, at the first update after which its condition is met."""

    reason: str
    met = False

    def is_met(self, state: TrainerState) -> bool:
        """Whether the run should end, by the records of its updates."""
        raise NotImplementedError

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in (logs or {}) and self.is_met(state):
            self.met = control.should_training_stop = control.should_save = True


class TimeBudget(StoppingRule):
    """Ends a run when its time is up.

    It writes the seconds used into each record; a checkpoint keeps the records, so a resumed run counts on.

    Args:
        seconds: the budget; None for no limit.
    """

    reason = "time"

    def __init__(self, seconds: float | None):
        self.seconds = math.inf if seconds is None else seconds
        self._began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        used = [record["seconds"] for record in update_records(state)]
        self._began = time.monotonic() - (used[-1] if used else 0.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in (logs or {}):
            state.log_history[-1]["seconds"] = time.monotonic() - self._began
        super().on_log(args, state, control, logs, **kwargs)

    def is_met(self, state):
        return state.log_history[-1]["seconds"] >= self.seconds


class Convergence(StoppingRule):
    """Ends a run whose reward has stopped rising.

    Args:
        window: updates; the last so many are compared with as many before them, once a window.
        tolerance: a rise of the mean reward by no more than this is none.
    """

    reason = "converged"

    def __init__(self, window: int, tolerance: float):
        self.window, self.tolerance = window, tolerance

    def is_met(self, state):
        records, window = update_records(state), self.window
        if len(records) % window or len(records) < 2 * window:
            return False
        before = mean_of("reward", records[-2 * window : -window])
        last = mean_of("reward", records[-window:])
        return before is not None and last is not None and last - before <= self.tolerance


class StepsProgress(TrainerCallback):
    """Shows the updates done; `total` is None where time decides."""

    def __init__(self, total: int | None):
        self.total = total

    def on_train_begin(self, args, state, control, **kwargs):
        self._progress = Progress("reinforcing the policy", self.total, "steps")
        self._progress.update(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self._progress.update(1)

    def on_train_end(self, args, state, control, **kwargs):
        self._progress.close()


# ------------------------------------------------------------------ what a run tells


def update_records(state: TrainerState) -> list[dict[str, Any]]:
    """The records of the updates, one each; TRL's last record, on the whole run, is none of them."""
    return [record for record in state.log_history if "reward" in record]


def mean_of(key: str, records: Sequence[dict[str, Any]]) -> float | None:
    """The mean of what the records hold under `key`; None where none holds a number."""
    values = [record[key] for record in records if record.get(key) is not None]
    return sum(values) / len(values) if values else None


def _report(state: TrainerState, rules: list[StoppingRule], window: int, output_dir: Path) -> dict[str, Any]:
    records = update_records(state)
    checkpoint = last_whole(output_dir, TRAINER_STATE_NAME)
    return {
        "steps": state.global_step,
        "seconds": records[-1]["seconds"] if records else 0.0,
        "tokens": int(state.num_input_tokens_seen),
        "stopped_because": next((rule.reason for rule in rules if rule.met), "steps"),
        "missing": int(sum(record["missing"] for record in records)),
        "checkpoint": checkpoint and checkpoint.name,
        "reward": mean_of("reward", records[-window:]),
        "kl": mean_of("kl", records[-window:]),
        "history": [{key: record.get(key) for key in HISTORY} for record in records],
    }


# ------------------------------------------------------------------ TRL, with the least between


class _BridleTrainer:
    """What TRL's trainers do otherwise here."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}  # token ids already: by way of text they might become others

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: a checkpoint is no model to publish."""


class _RLOO(_BridleTrainer, RLOOTrainer):
    config = RLOOConfig


class _GRPO(_BridleTrainer, GRPOTrainer):
    config = GRPOConfig


TRAINERS: dict[str, Any] = {"rloo": _RLOO, "grpo": _GRPO}


def _in_passes(
    prompts: Sequence[Sequence[int]], messages: Sequence[Messages | None] | None, count: int, seed: int
) -> Dataset:
    """`count` prompts for one epoch: pass after pass over all of them, each in its own order.

    TRL shuffles each epoch with a generator that no checkpoint keeps, so a resumed run would begin it anew.
    """
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(-(-count // len(prompts)))])
    turns = [json.dumps(of_chat) for of_chat in messages or [None] * len(prompts)]
    drawn = order[:count]
    return Dataset.from_dict({"prompt": [list(prompts[n]) for n in drawn], "turns": [turns[n] for n in drawn]})


@contextmanager
def _lent(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Undoes what TRL does to a model besides training it, and hides the model's own generation settings.

    Those would fill in what TRL leaves open, and completions must come from the full distribution.
    """
    lm, training = causal_lm(model), model.training
    forward, settings = vars(lm).get("forward"), lm.generation_config
    lm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_token_ids(lm, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    if isinstance(model, PeftModel):
        model.set_adapter(model.active_adapter)  # an adapter that was loaded comes frozen
    try:
        yield
    finally:
        lm.generation_config = settings
        vars(lm).pop("forward", None)  # TRL's is bound to this model, and so would be a deep copy's
        if forward is not None:
            lm.forward = forward
        if isinstance(model, PeftModel) and "ref" in model.peft_config:
            model.delete_adapter("ref")
        model.train(training)


@contextmanager
def _reference(model: PreTrainedModel | PeftModel, folder: Path) -> Iterator[None]:
    """Makes TRL's reference the model as it is now, and not what was once loaded under the model's name.

    An adapter TRL copies by itself.
    """
    if isinstance(model, PeftModel):
        yield
        return
    name = model.config._name_or_path
    with TemporaryDirectory(prefix=".start-", dir=folder) as start:
        model.save_pretrained(start)
        model.config._name_or_path = start
        try:
            yield
        finally:
            model.config._name_or_path = name


@contextmanager
def _hushed() -> Iterator[None]:
    """Silences TRL's warning that prints a prompt and a completion for each batch with a missing score."""
    loggers = [logging.getLogger(trainer.__module__) for trainer in (RLOOTrainer, GRPOTrainer)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int | None) -> None:
    if not prompts:
        raise UserError("prompts: there are none; give at least one to sample from")
    longest = max(map(len, prompts))
    if context is not None and longest + max_new_tokens > context:
        raise UserError(
            f"prompts: the longest has {longest} tokens, which with max_new_tokens={max_new_tokens} is more than "
            f"the model's context of {context}; shorten one of them"
        )
