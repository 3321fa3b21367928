"""Checks and preparations of a `ConstrainedTrainer` before it trains."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from math import ceil, log
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.data_utils import is_conversational

from bridle.constraints import Constraint
from bridle.data import tokenize_domain
from bridle.data.corpus import tokenize_prompts
from bridle.data.rows import holds_chats, holds_prompts
from bridle.errors import UserError
from bridle.models.forward import disable_dropout
from bridle.models.hidden import check_output_adapter, check_projection
from bridle.models.loading import check_model, context_length, load_model
from bridle.training.config import ConstrainedConfig, Regulariser
from bridle.training.dual_ascent import TargetOptions
from bridle.training.guards import warn
from bridle.training.regulariser import DomainRegulariser
from bridle.utils.settings import check_file_name

NOT_TAKEN = {
    "data_collator": "the trainer's own keeps each row's domain",
    "compute_loss_func": "the loss is that of the method",
    "quantization_config": "the model is loaded already",
}
"""Arguments of `SFTTrainer` that `ConstrainedTrainer` has no use for."""


# ---------------------------------------------------------------------- the corpus


def by_domain(corpus: Mapping[str, Dataset] | Dataset) -> dict[str, Dataset]:
    """Rows by domain; a single data set is the domain "corpus".

    Raises:
        UserError: a name cannot name files, or rows are streamed or not a data set.
    """
    domains = dict(corpus) if isinstance(corpus, Mapping) else {"corpus": corpus}
    for name, rows in domains.items():
        check_file_name(name, f"corpus.{name}")
        if isinstance(rows, IterableDataset):
            raise UserError(
                f"corpus.{name}: is streamed, and a mixture needs the number of rows; take some of them: "
                "Dataset.from_list(list(rows.take(10_000)))"
            )
        if not isinstance(rows, Dataset):
            raise UserError(f"corpus.{name}: must be a Dataset of the library `datasets`, not a {type(rows).__name__}")
    return domains


def example_of(corpus: Mapping[str, Dataset], config: ConstrainedConfig) -> Dataset:
    """The domain whose first row shows TRL the corpus's format: a chat, if training is on the assistant only."""
    whole = [rows for rows in corpus.values() if not holds_prompts(rows.column_names)] or [*corpus.values()]
    chats = [rows for rows in whole if is_conversational(rows[0])] if config.assistant_only_loss else []
    return (chats or whole)[0]


def tokenised(
    name: str,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: ConstrainedConfig,
    formatting_func: Callable[[dict[str, Any]], str] | None,
    packing: bool,
) -> Dataset:
    """Rows of one domain as `input_ids` and `labels`, packed separately so that no row belongs to two domains."""
    if "input_ids" in rows.column_names:
        return rows
    if holds_prompts(rows.column_names):
        return tokenize_prompts(rows, tokenizer, name)
    if formatting_func is not None:
        rows = rows.map(lambda row: {"text": formatting_func(row)}, remove_columns=rows.column_names)
    return tokenize_domain(
        rows,
        tokenizer,
        max_length=config.max_length,
        name=name,
        assistant_only=config.assistant_only_loss,
        completion_only=config.completion_only_loss,
        keep_end=config.truncation_mode == "keep_end",
        packing=packing,
        shuffle=config.seed if config.shuffle_dataset else None,
    )


def starts(corpus: Mapping[str, Dataset], tokenised: Mapping[str, Dataset], formatted: bool) -> dict[str, Dataset]:
    """The rows that rollouts start from, by domain: chats as they were read, unless `formatted`; others tokenised."""
    return {name: rows if holds_chats(rows) and not formatted else tokenised[name] for name, rows in corpus.items()}


def judges(regularisers: Iterable[DomainRegulariser], held_out: Iterable[str]) -> tuple[list[str], list[Constraint]]:
    """The held-out domains that have a regulariser with a constraint, and these constraints."""
    judging = [regulariser for regulariser in regularisers if not regulariser.options.is_retention]
    constraints = {regulariser.constraint.name: regulariser.constraint for regulariser in judging}
    judged = [name for name in held_out if any(name in regulariser.corpus for regulariser in judging)]
    return judged, list(constraints.values())


# ---------------------------------------------------------------------- the model


def loaded(model: PreTrainedModel | str, config: ConstrainedConfig) -> PreTrainedModel:
    """The policy, loaded if it is given by name.

    Raises:
        UserError: it is loaded already, and `model_init_kwargs` would have no effect.
    """
    if isinstance(model, str):
        return load_model(model, **(config.model_init_kwargs or {}))
    if config.model_init_kwargs:
        raise UserError("model_init_kwargs: the model is loaded already; give the trainer its name, or leave them out")
    return model


def check_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ConstrainedConfig,
    regularisers: Iterable[Regulariser],
) -> None:
    """Refuses a model that cannot be trained with these regularisers, and makes a loaded adapter trainable.

    Raises:
        UserError: its architecture, an adapter of its output layer, or its context does not fit.
    """
    if isinstance(model, PeftModel) and not any(parameter.requires_grad for parameter in model.parameters()):
        model.set_adapter(model.active_adapter)  # an adapter that is loaded is frozen
    check_model(model, tokenizer, model.config._name_or_path)
    check_projection(model)
    check_output_adapter(model)
    check_rollout_length(model, config, regularisers)


def check_rollout_length(
    model: PreTrainedModel, config: ConstrainedConfig, regularisers: Iterable[Regulariser]
) -> None:
    """Refuses rollouts that leave no room for a prompt.

    Raises:
        UserError: the model's context is too short.
    """
    context = context_length(model)
    if context and config.max_new_tokens >= context and any(one.samples for one in regularisers):
        raise UserError(
            f"max_new_tokens: {config.max_new_tokens} leave no room for a prompt in the model's context of {context}"
        )


def disable_policy_dropout(model: PreTrainedModel) -> None:
    """Turns dropout off, so that the trained policy is the sampled one.

    Raises:
        UserError: an adapter's dropout is on.
    """
    configs = model.peft_config.values() if isinstance(model, PeftModel) else []
    if any(getattr(config, "lora_dropout", 0) > 0 for config in configs):
        raise UserError("lora.dropout: a regulariser needs dropout off, as in TRL's RLOO and GRPO; set it to 0")
    disable_dropout(model)


# ---------------------------------------------------------------------- options that conflict


def check_options(
    config: ConstrainedConfig, regularisers: Mapping[str, Regulariser], arguments: Mapping[str, Any]
) -> None:
    """Refuses arguments that have no effect, and regularisers that the configuration rules out.

    Raises:
        UserError: naming the argument or key.
    """
    if config.sampler.engine != "transformers":
        _check_sampler(config)
    all_live = all(options.anchor == "live" for options in regularisers.values())
    for name, options in regularisers.items():
        if config.targets == "precomputed" and all_live:
            raise UserError(
                f"regularisers.{name}.anchor: targets are precomputed, and `live` moves with every update; "
                "set anchor: previous or initial, or targets: computed"
            )
        if options.target is not None and config.rounds < (needed := rounds_needed(config)):
            raise UserError(
                f"rounds: {config.rounds} leave λ of regularisers.{name}.target as it begins; set at least {needed}"
            )
        _check_confidence(name, options.target, config)
    if config.target_cache is not None and not any(one.keeps_targets for one in regularisers.values()):
        raise UserError(
            "target_cache: keeps the targets of retention with kl_on: corpus; there is none, so leave it out"
        )
    _warn_of_second_fits(config, regularisers)
    _warn_of_no_roles(config)
    _warn_of_packed_rows(config, regularisers)
    for name in arguments.keys() & NOT_TAKEN:
        raise UserError(f"{name}: {NOT_TAKEN[name]}; leave it out")
    if arguments.get("eval_dataset") is None and (config.eval_strategy != "no" or config.eval_on_start):
        raise UserError("eval_strategy: there are no rows to evaluate on; give the trainer an eval_dataset")


def _warn_of_second_fits(config: ConstrainedConfig, regularisers: Mapping[str, Regulariser]) -> None:
    """Warns of options that act from R's second fit on, where there is none."""
    anchors = [one.anchor for one in regularisers.values() if not one.is_retention]
    once = config.rounds - (config.schedule == "parallel") < 2  # whose last round fits none
    for name, idle in (("replay", once), ("seek", once or all(anchor == "initial" for anchor in anchors))):
        if anchors and idle and getattr(config.auxiliary, name):
            what = "an initial anchor" if not once else f"a {config.schedule} run of rounds: {config.rounds}"
            warn(f"auxiliary.{name}: has no effect, since it acts from R's second fit on, and {what} has one fit")


def _warn_of_no_roles(config: ConstrainedConfig) -> None:
    """Warns of options of the parallel schedule's roles in a run without roles."""
    read = {"largest_message"} if config.targets == "precomputed" else set()  # which says where targets are kept
    for role in fields(config.parallel) if config.schedule == "sequential" else ():
        if role.name not in read and getattr(config.parallel, role.name) != role.default:
            warn(f"parallel.{role.name}: has no effect, since schedule is sequential; set parallel, or leave it out")


def _warn_of_packed_rows(config: ConstrainedConfig, regularisers: Mapping[str, Regulariser]) -> None:
    """Warns of a KL on packed rows, of whose texts rollouts begin in the first alone."""
    for name, options in regularisers.items():
        if config.packing and options.weight > 0 and not options.is_retention and options.kl_on != "rollouts":
            warn(
                f"packing: rollouts begin in the first text of a row, and the KL of {name} also looks at the others, "
                f"where R was not fitted; set regularisers.{name}.kl_on: rollouts, or packing: false"
            )


def _check_sampler(config: ConstrainedConfig) -> None:
    if config.auxiliary.seek:
        raise UserError("auxiliary.seek: R cannot guide vLLM; set 0, or sampler.engine: transformers")
    if config.schedule == "parallel":
        raise UserError("schedule: parallel does not sample by vLLM; set sequential, or sampler.engine: transformers")


def _check_confidence(name: str, target: TargetOptions | None, config: ConstrainedConfig) -> None:
    """Refuses a target that a round's plain rollouts cannot show even if nothing violates."""
    seek, count = config.auxiliary.seek, config.rollouts_per_round
    sought = int(seek * count)
    if target is not None and target.rate and target.confidence and target.bound(0, count - sought) > target.rate:
        needed = ceil(log(1 - target.confidence) / log(1 - target.rate) / (1 - seek))
        plain = f", of which {sought} seek violations," if sought else ""
        raise UserError(
            f"rollouts_per_round: {count}{plain} cannot show regularisers.{name}.target, at most {target.rate:.3g} "
            f"with {100 * target.confidence:g}% confidence; set at least {needed}, better four times as many"
        )


def rounds_needed(config: ConstrainedConfig) -> int:
    """The least number of rounds in which λ takes a step towards a target."""
    if config.schedule == "sequential":
        return 2
    return 3 if config.parallel.first_round == "wait" else 4


def add_held_out(held_out: Mapping[str, Dataset], arguments: dict[str, Any]) -> None:
    """Adds the held-out rows, if any, to the arguments of the trainer.

    Raises:
        UserError: they have rows to evaluate on already.
    """
    if held_out and arguments.get("eval_dataset") is not None:
        raise UserError("eval_dataset: eval_options hold out rows of the corpus already; give one or the other")
    if held_out:
        arguments["eval_dataset"] = held_out


def check_gpus(config: ConstrainedConfig, fsdp_version: int | None) -> None:
    """Refuses ways to use several GPUs that Bridle does not support.

    Args:
        config: the run's, after the trainer was made.
        fsdp_version: of the model's shards; None without FSDP.

    Raises:
        UserError: naming what to use instead.
    """
    if config.n_gpu > 1:  # `transformers` would wrap the model in DataParallel, whose threads share forward hooks
        raise UserError(
            f"{config.n_gpu} GPUs: one process trains on one; start one process each by accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if is_deepspeed_zero3_enabled():
        raise UserError("deepspeed: ZeRO-3 hides the weights that anchors are made of; use ZeRO-1, ZeRO-2 or FSDP2")
    if fsdp_version not in (None, 2):
        raise UserError("fsdp: only version 2 is supported; set fsdp_version: 2 in the configuration of accelerate")
    if fsdp_version is not None and config.schedule == "parallel":
        raise UserError("schedule: parallel needs the whole model in each process; use sequential with FSDP2")
    if fsdp_version is not None and config.targets == "precomputed":  # a process may lack what the others have kept
        raise UserError("targets: precomputed needs the whole model in each process; use computed with FSDP2")
    if config.device.type == "mps":
        raise UserError("Apple's GPUs have no float64, which sampling needs; set use_cpu: true")


def warn_of_user_turns(regularisers: Iterable[DomainRegulariser], config: ConstrainedConfig) -> None:
    """Warns if the KL covers prefixes within users' turns, on which R is not fitted."""
    for regulariser in regularisers:
        options = regulariser.options
        looks = options.weight > 0 and not options.is_retention and options.kl_on != "rollouts"
        chats = [name for name, rows in regulariser.corpus.items() if "messages" in rows.column_names]
        if looks and chats and not config.assistant_only_loss:
            warn(
                f"regularisers.{regulariser.name}: R is fitted on the assistant's turns of {', '.join(chats)}, and "
                "the KL looks at the users' turns too; set assistant_only_loss: true, or kl_on: rollouts"
            )
