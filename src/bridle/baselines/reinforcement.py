"""Reinforcement learning: maximises E[C] − β·KL(p_θ ‖ p_0) on sampled completions, with TRL's trainers.

The optimum is p_0·exp(C/β), normalised. RLOO (Ahmadian et al., ACL 2024, arXiv 2402.14740) treats a completion as one
action, as the constraint scores it, and its baseline, the mean reward of the prompt's other completions, leaves the
policy gradient unbiased. GRPO (Shao et al., 2024, arXiv 2402.03300) divides each group's rewards by their standard
deviation, which amplifies rare outcomes of a boolean reward.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME  # the last file of a checkpoint
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from bridle.baselines.stopping import StepsProgress, Stopping, mean_of, update_records
from bridle.constraints import Constraint
from bridle.constraints.reading import Messages
from bridle.data import decode_parts
from bridle.data.corpus import passes
from bridle.data.prompts import check_room
from bridle.errors import UserError
from bridle.models.hidden import causal_lm, contiguous_states
from bridle.models.loading import end_token_ids, prompt_room
from bridle.utils.checkpoints import EndsWhereItEnded, last_whole
from bridle.utils.interruption import deferring
from bridle.utils.quiet import only_errors

VERBOSE = (RLOOTrainer.__module__, GRPOTrainer.__module__)  # they print a prompt for each batch with a missing score
HISTORY = ("step", "seconds", "reward", "kl", "entropy", "missing")  # of an update, in the report; entropy in nats


@dataclass
class ReinforcementOptions:
    """Options of reinforcement learning.

    Attributes:
        algorithm: "rloo" or "grpo".
        learning_rate: of AdamW; constant, so that a run can be extended. The default suits a model of some million
            parameters; TRL's own, for large ones, is 1e-6.
        beta: β, the weight of the KL to the starting model in nats: of a whole completion in RLOO, of a token in GRPO.
        num_generations: completions of one prompt, which form each other's baseline; at least 2.
        batch_size: completions per update, a multiple of `num_generations`.
        micro_batch_size: completions in one forward and backward pass; the whole batch by default.
        soft_reward: use the constraint's value as the reward instead of its verdict (1 or 0).
        window: updates in each of the two windows whose mean rewards are compared.
        tolerance: a run has converged when the mean reward of a window exceeds that of the previous one by no more.
        max_steps: maximal number of updates.
        save_every: updates between two checkpoints, of which the last is kept.

    Raises:
        UserError: an unknown algorithm, or batches that do not divide evenly; the message starts with the field.
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
        """Number of prompts per update."""
        return self.batch_size // self.num_generations

    def config(
        self, output_dir: Path, seed: int, max_new_tokens: int, use_cpu: bool = False
    ) -> RLOOConfig | GRPOConfig:
        """The same options for TRL."""
        gpu = torch.cuda.is_available() and not use_cpu
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
            disable_dropout=True,  # policy and reference differ in their weights only
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
    use_cpu: bool = False,
    messages: Sequence[Messages | None] | None = None,
    resume: bool = False,
    resume_from: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains a model in place until the time is up or, without a time limit, until the reward has converged.

    Completions are sampled from the full distribution at temperature 1. Those without a score have no effect.

    Args:
        model: the starting model, also when a run resumes; it is the reference of the KL penalty too.
        tokenizer: with a pad token.
        prompts: token ids, with the beginning-of-text token where the model expects one.
        constraint: computes the reward from the text of completion and prompt.
        use_cpu: leaves a GPU alone.
        seconds: time limit, which includes the time before a resume; the current update is finished.
        messages: the turns of prompts that are chats, by prompt; the constraint reads them instead of the text.
        resume: resume from the last checkpoint in `output_dir`, if there is one.
        resume_from: a checkpoint of another run with the same options.

    Returns:
        `steps`, `seconds`, `tokens` (prompts and completions), `stopped_because` ("time", "converged" or "steps"),
        `missing` (completions without a score), `checkpoint` (name of its folder), `reward` and `kl` (nats per
        completion token) over the last window, and `history`: the `HISTORY` of each update. A mean of nothing is None.

    Raises:
        UserError: there are no prompts, or one leaves no room in the model's context for the completion.
        Interrupted: a signal arrived; a checkpoint of the last update is in `output_dir`.
    """
    _check_prompts(prompts, prompt_room(model, max_new_tokens))
    checkpoint = (last_whole(output_dir, TRAINER_STATE_NAME) if resume else None) or resume_from
    stopping = Stopping(seconds, options.window, options.tolerance)
    with restored(model, tokenizer), contiguous_states(model), only_errors(*VERBOSE):
        trainer = _trainer(
            model,
            options,
            output_dir,
            reward_funcs=constraint_reward(constraint, options.soft_reward, tokenizer),
            args=options.config(output_dir, seed, max_new_tokens, use_cpu),
            train_dataset=_in_passes(prompts, messages, options.max_steps * options.prompts_per_step, seed),
            processing_class=tokenizer,
            callbacks=[stopping, StepsProgress(options.max_steps if seconds is None else None), *callbacks],
        )
        with deferring():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return _report(trainer.state, stopping, output_dir)


# ------------------------------------------------------------------ the reward


def constraint_reward(
    constraint: Constraint, soft: bool, tokenizer: PreTrainedTokenizerBase
) -> Callable[..., list[float | None]]:
    """The constraint as a reward function of TRL: 1 complies, 0 violates (or its value, if `soft`), None missing.

    `tokenizer` decodes the token ids of prompts and completions; for a chat the constraint gets the turns.
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


def _report(state: TrainerState, stopping: Stopping, output_dir: Path) -> dict[str, Any]:
    records = update_records(state)
    last = records[-stopping.window :]
    checkpoint = last_whole(output_dir, TRAINER_STATE_NAME)
    return {
        "steps": state.global_step,
        "seconds": records[-1]["seconds"] if records else 0.0,
        "tokens": int(state.num_input_tokens_seen),
        "stopped_because": stopping.reason or "steps",
        "missing": int(sum(record["missing"] for record in records)),
        "checkpoint": checkpoint and checkpoint.name,
        "reward": mean_of("reward", last),
        "kl": mean_of("kl", last),
        "history": [{key: record.get(key) for key in HISTORY} for record in records],
    }


# ------------------------------------------------------------------ TRL's trainers


class _BridleTrainer(EndsWhereItEnded):
    """The methods of TRL's trainers that Bridle overrides."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}  # token ids already; decoding and encoding them could change them

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none, since a checkpoint is not a model to publish."""


class _RLOO(_BridleTrainer, RLOOTrainer):
    config = RLOOConfig


class _GRPO(_BridleTrainer, GRPOTrainer):
    config = GRPOConfig


TRAINERS: dict[str, Any] = {"rloo": _RLOO, "grpo": _GRPO}


def _in_passes(
    prompts: Sequence[Sequence[int]], messages: Sequence[Messages | None] | None, count: int, seed: int
) -> Dataset:
    """`count` prompts for one epoch: passes over all of them, each in a new order.

    TRL shuffles each epoch with a generator that is not in the checkpoints, so a resumed run would restart it.
    """
    drawn = passes(len(prompts), count, np.random.default_rng(seed))
    turns = [json.dumps(of_chat) for of_chat in messages or [None] * len(prompts)]
    return Dataset.from_dict({"prompt": [list(prompts[n]) for n in drawn], "turns": [turns[n] for n in drawn]})


@contextmanager
def restored(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Undoes TRL's changes of a model other than its weights, and hides the model's own generation settings.

    Those would be the defaults of options that TRL does not set, but completions come from the full distribution.
    """
    lm, training = causal_lm(model), model.training
    forward, settings = vars(lm).get("forward"), lm.generation_config
    lm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_token_ids(lm, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    if isinstance(model, PeftModel):
        model.set_adapter(model.active_adapter)  # a loaded adapter is frozen
    try:
        yield
    finally:
        lm.generation_config = settings
        vars(lm).pop("forward", None)  # TRL's is bound to this model, also in a deep copy
        if forward is not None:
            lm.forward = forward
        if isinstance(model, PeftModel) and "ref" in model.peft_config:
            model.delete_adapter("ref")
        model.train(training)


def _trainer(
    model: PreTrainedModel | PeftModel, options: ReinforcementOptions, folder: Path, **arguments: Any
) -> RLOOTrainer | GRPOTrainer:
    """TRL's trainer, with the current model as its reference, which TRL would otherwise load by the model's name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = model.config._name_or_path
    with TemporaryDirectory(prefix=".start-", dir=folder) as start:
        if options.beta and not isinstance(model, PeftModel):  # TRL copies an adapter by itself
            model.save_pretrained(start)
            model.config._name_or_path = start
        try:
            trainer = TRAINERS[options.algorithm](model=model, **arguments)
        finally:
            model.config._name_or_path = name
    trainer.remove_callback(PrinterCallback)  # it prints every record as a dictionary
    return trainer


def _check_prompts(prompts: Sequence[Sequence[int]], room: int | None) -> None:
    if not prompts:
        raise UserError("prompts: there are none; give at least one to sample from")
    for index, prompt in enumerate(prompts):
        check_room(prompt, room, f"prompts[{index}]")
