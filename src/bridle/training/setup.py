"""Checks and preparations of a `ConstrainedTrainer` before it trains."""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from types import MethodType
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from bridle.constraints import Constraint
from bridle.errors import UserError
from bridle.models.forward import disable_dropout
from bridle.models.hidden import causal_lm, check_output_adapter, check_projection
from bridle.models.loading import check_model, context_length, load_model, load_tokenizer
from bridle.training.config import ConstrainedConfig, Regulariser
from bridle.training.dual_ascent import TargetOptions
from bridle.training.guards import warn
from bridle.training.options import METRICS, is_set
from bridle.training.regulariser import DomainRegulariser
from bridle.training.retention import Retention
from bridle.utils.safe_loading import ON_THE_HUB, is_path

NOT_TAKEN = {
    "train_dataset": "the rows are those of corpus; give them there",
    "data_collator": "the trainer's own keeps each row's domain; leave it out",
    "compute_loss_func": "the loss is that of the method; leave it out",
    "quantization_config": "is for loading; give the model's name, and set it in args.model_init_kwargs",
}
"""Arguments of `SFTTrainer` that `ConstrainedTrainer` has no use for, and what to do instead."""

MOST_ROLLOUTS = 10**9

IN_CACHE = {PeftType.PREFIX_TUNING, PeftType.CARTRIDGE}
"""Adapters whose virtual tokens are in the cache, and not before the row."""


def judges(regularisers: Iterable[DomainRegulariser], held_out: Iterable[str]) -> tuple[list[str], list[Constraint]]:
    """The held-out domains that have a regulariser with a constraint, and these constraints."""
    judging = [regulariser for regulariser in regularisers if not regulariser.options.is_retention]
    constraints = {regulariser.constraint.name: regulariser.constraint for regulariser in judging}
    judged = [name for name in held_out if any(name in regulariser.corpus for regulariser in judging)]
    return judged, list(constraints.values())


def regularisers(
    by_name: Mapping[str, Regulariser],
    starts: Mapping[str, Dataset],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ConstrainedConfig,
) -> list[DomainRegulariser]:
    """The regularisers of a run, in order. Those with the initial anchor share one snapshot.

    Args:
        by_name: their options.
        starts: rows by domain, from `given.starts`.
        model, tokenizer: the policy's.
        config: the run's.
    """
    made: list[DomainRegulariser] = []
    for index, (name, options) in enumerate(by_name.items()):
        corpus = {domain: starts[domain] for domain in options.domains(starts)}
        kind = Retention if options.is_retention else DomainRegulariser
        made.append(kind(index, name, options, model, tokenizer, corpus, config))
        if options.anchor == "initial":
            made[-1].anchor = next(one.anchor for one in made if one.options.anchor == "initial")
    return made


# ---------------------------------------------------------------------- the model


def loaded(model: PreTrainedModel | str, config: ConstrainedConfig) -> PreTrainedModel:
    """The policy, loaded if it is given by name.

    Raises:
        UserError: it is loaded already, and `model_init_kwargs` would have no effect, or names an option as it was;
            or there is no such chat template.
    """
    options, template = config.model_init_kwargs or {}, config.chat_template_path
    if template is not None and is_path(template) and not os.path.exists(template):
        raise UserError(f"chat_template_path: {template}: no such file or folder")
    if not isinstance(model, str):
        if options:
            raise UserError(
                "model_init_kwargs: the model is loaded already; give the trainer its name, or leave them out"
            )
        return model
    if "torch_dtype" in options:
        raise UserError("model_init_kwargs: torch_dtype is called dtype now; set dtype")
    return load_model(model, **options)


def follow_compilation(model: PreTrainedModel | PeftModel) -> None:
    """Lets a forward without TRL's fused head run the compiled blocks.

    Compilation makes a second model of the same weights. TRL's forward would call that of the first.

    Raises:
        UserError: the model is spread over devices by hooks in its forward, which this would leave out.
    """
    lm = causal_lm(model)
    if hasattr(lm, "_hf_hook"):
        raise UserError("torch_compile: a model with a device_map is not compiled; leave one of the two out")
    fused = lm.forward.__func__

    @wraps(type(lm).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if fused_lm_head:
            return fused(self, *args, fused_lm_head=True, **inputs)
        return type(self).forward(self, *args, **inputs)

    lm.forward = MethodType(forward, lm)


def tokenizer_of(
    processing_class: PreTrainedTokenizerBase | None, model: PreTrainedModel | str, config: ConstrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer that is given, or the model's, loaded with the model's hub options, except `subfolder`.

    Raises:
        UserError: the processing class is not a tokenizer.
    """
    if processing_class is None:
        options = config.model_init_kwargs or {}
        name = model if isinstance(model, str) else model.config._name_or_path
        where = {key: options[key] for key in (ON_THE_HUB - {"subfolder"}) & options.keys()}
        return load_tokenizer(name, **where)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        kind = type(processing_class).__name__
        raise UserError(f"processing_class: must be a tokenizer, not a {kind}; give the tokenizer of a processor")
    return processing_class


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


def disable_policy_dropout(model: PreTrainedModel, regularisers: Iterable[Regulariser]) -> None:
    """Turns dropout off if a regulariser acts, so that the trained policy is the sampled one.

    Raises:
        UserError: an adapter's dropout is on.
    """
    if not any(one.weight > 0 for one in regularisers):
        return
    for adapter in _adapters(model):
        for name, value in vars(adapter).items():
            if name.endswith("dropout") and value:
                key = "lora.dropout" if name == "lora_dropout" else f"peft_config.{name}"
                raise UserError(f"{key}: a regulariser needs dropout off, as in TRL's RLOO and GRPO; set it to 0")
    disable_dropout(model)


def check_adapters(model: PreTrainedModel) -> None:
    """Refuses adapters that put tokens of their own before each row: other states would be those of its tokens.

    Raises:
        UserError: naming the adapter's kind and what to use instead.
    """
    for adapter in _adapters(model):
        if adapter.is_prompt_learning and adapter.peft_type not in IN_CACHE:
            raise UserError(
                f"peft_config: {type(adapter).__name__} puts virtual tokens before each row, where the KL would look "
                "in place of the row's own; use PrefixTuningConfig, which puts them into the cache, or LoRA"
            )


def _adapters(model: PreTrainedModel) -> list[PeftConfig]:
    return [*model.peft_config.values()] if isinstance(model, PeftModel) else []


# ---------------------------------------------------------------------- options that conflict


def check_options(
    config: ConstrainedConfig, regularisers: Mapping[str, Regulariser], arguments: Mapping[str, Any]
) -> None:
    """Refuses arguments that have no effect, and regularisers that the configuration rules out.

    Raises:
        UserError: naming the argument or key.
    """
    if not isinstance(config, ConstrainedConfig):
        kind = type(config).__name__
        raise UserError(f"args: must be a ConstrainedConfig, not a {kind}; it takes the same options and Bridle's own")
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
        _check_rollouts(name, options.target, config)
    if config.target_cache is not None and not any(one.keeps_targets for one in regularisers.values()):
        raise UserError(
            "target_cache: keeps the targets of retention with kl_on: corpus; there is none, so leave it out"
        )
    _warn_of_fits(config, regularisers)
    _warn_of_no_roles(config)
    _warn_of_packed_rows(config, regularisers)
    for name in arguments.keys() & NOT_TAKEN:
        raise UserError(f"{name}: {NOT_TAKEN[name]}")
    _check_evaluation(config, arguments)


def _check_evaluation(config: ConstrainedConfig, arguments: Mapping[str, Any]) -> None:
    """Refuses an evaluation without rows, and options that nothing reads."""
    rows = arguments.get("eval_dataset")
    if rows is None and (config.eval_strategy != "no" or config.eval_on_start):
        raise UserError("eval_strategy: there are no rows to evaluate on; give the trainer an eval_dataset")
    for name in METRICS if arguments.get("compute_metrics") is None else ():
        if is_set(config, name):
            raise UserError(f"{name}: is read by compute_metrics; give the trainer that, or leave {name} out")


def _warn_of_fits(config: ConstrainedConfig, regularisers: Mapping[str, Regulariser]) -> None:
    """Warns of options that act in R's fits, or from the second one on, where there is none."""
    anchors = [one.anchor for one in regularisers.values() if not one.is_retention]
    for name in ("corpus_outputs", "replay", "seek") if regularisers and not anchors else ():
        if getattr(config.auxiliary, name):
            warn(f"auxiliary.{name}: has no effect, since retention has no R; leave it out")
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


def _check_rollouts(name: str, target: TargetOptions | None, config: ConstrainedConfig) -> None:
    """Refuses a target that a round's number of rollouts cannot show if none violates; warns if λ could not fall."""
    if target is None or target.base is not None:  # the base's rate is not known yet
        return
    limit, seek, count = target.limit(None), config.auxiliary.seek, config.rollouts_per_round

    def least(holds: Callable[[int], bool]) -> int:
        return bisect_left(range(MOST_ROLLOUTS), True, lo=1, key=holds)

    def can_fall(count: int) -> bool:
        return target.can_fall(limit, count - int(seek * count), count)

    if target.confidence and target.bound(0, count) > limit:
        needed = least(lambda count: target.bound(0, count) <= limit)
        raise UserError(
            f"rollouts_per_round: {count} cannot show regularisers.{name}.target, at most {limit:.3g} with "
            f"{100 * target.confidence:g}% confidence; set at least {needed}, better four times as many"
        )
    if not can_fall(count):
        sought = f", of which {int(seek * count)} seek violations," if seek else ""
        warn(
            f"rollouts_per_round: {count}{sought} are too few for regularisers.{name}.target, at most {limit:.3g}: λ "
            f"can rise, but not fall; set at least {least(can_fall)}"
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
