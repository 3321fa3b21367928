"""The options of TRL and `transformers` that a constrained run refuses, so that none is ignored."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.debug_utils import DebugOption
from transformers.integrations import is_deepspeed_available
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.utils import is_liger_kernel_available, is_torch_bf16_gpu_available, is_torch_xla_available
from trl import SFTConfig

from bridle.errors import UserError, first_line
from bridle.utils.settings import known_name

REFUSED = {
    # The model and its rows
    "trust_remote_code": "Bridle runs no code that comes with a model; leave the key out",
    "use_cache": "an update needs no cache, and sampling has its own; leave it out",
    "dataset_text_field": "each domain names its own column; set corpus.NAME.text, or rename the column to text",
    "dataset_kwargs": "rows with the column input_ids need none; leave it out",
    "dataset_num_proc": "rows are tokenised in one process; leave it out",
    "label_names": "labels are in the column labels; leave it out",
    "length_column_name": "lengths are those of the tokenised rows; leave it out",
    "remove_unused_columns": "rows become tokens, labels and a domain, and keep no other column; leave it out",
    # The loss
    "padding_free": "each row must stay within one domain, which λ_d needs; leave it out",
    "label_smoothing_factor": "the corpus's loss is nll or dft, without smoothing; leave it out",
    "neftune_noise_alpha": "the KL compares q with the model itself, not with noise in its embeddings; leave it out",
    # Checkpoints and resume
    "auto_find_batch_size": "a batch that does not fit into memory is cut into parts anyway; leave it out",
    "save_total_limit": "could remove the only checkpoint that is whole; set keep_last",
    "save_only_model": "such a checkpoint cannot be resumed; to save room set keep_last: 1",
    "save_on_each_node": "all nodes share the output folder, and the main process writes to it; leave it out",
    "ignore_data_skip": "a resumed run continues with the next rows; leave it out",
    "enable_jit_checkpoint": "a run that was stopped continues from its last checkpoint; set save_steps",
    "resume_from_checkpoint": "give it to train() of the trainer, or add --resume to the command",
    # Processes
    "average_tokens_across_devices": "an update is one batch of all processes, divided by its tokens; leave it out",
    "local_rank": "the launcher sets it; leave it out",
    "parallelism_config": "the model is split by FSDP2 alone; use a configuration of accelerate",
    # Read by scripts, not by trainers
    "do_train": "has no effect on a trainer; leave it out",
    "do_predict": "has no effect on a trainer; leave it out",
}
"""Fields that must keep their default, and what to do instead."""

NEEDED = {
    **dict.fromkeys(("do_eval", "eval_steps", "eval_delay", "load_best_model_at_end"), "eval_strategy"),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), "eval_strategy"),
    **dict.fromkeys(("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), "gradient_checkpointing"),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_multiprocessing_context"), "dataloader_num_workers"),
    "dataloader_in_order": "dataloader_num_workers",
    "fsdp_config": "fsdp",
    "liger_kernel_config": "use_liger_kernel",
    "packing_strategy": "packing",
    "run_name": "report_to",
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "report_to"),
}
"""Fields that have an effect only where another one is set, and that other one."""

EVALUATION = {
    *("eval_strategy", "eval_on_start", "eval_packing", "per_device_eval_batch_size", "eval_accumulation_steps"),
    *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "bf16_full_eval", "fp16_full_eval"),
}
"""Fields that have an effect only where the trainer is given rows to evaluate on."""

METRICS = {"include_for_metrics", "batch_eval_metrics"}
"""Fields that have an effect only where the trainer is given `compute_metrics`."""


@contextmanager
def in_one_line() -> Iterator[None]:
    """Converts errors of TRL and `transformers` to a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the system's, such as a full disk
        raise UserError(error) from error


def is_set(config: SFTConfig, name: str) -> bool:
    """Whether a field differs from its default."""
    return bool(getattr(config, name) != _default(config, name))


def check_refused(config: SFTConfig) -> None:
    """Raises a UserError for the first refused field or value."""
    for name, instead in REFUSED.items():
        if is_set(config, name):
            raise UserError(f"{name}: {instead}")
    if config.save_strategy == "best":
        raise UserError("save_strategy: best may leave a stopped run no checkpoint to go on from; set steps or epoch")
    if config.deepspeed and not is_deepspeed_available():
        raise UserError("deepspeed: is not installed; run pip install deepspeed, or leave it out")
    if config.bf16 and not (config.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        instead = "launch with --mixed_precision no" if launched else "leave bf16 out"
        raise UserError(f"bf16: there is no GPU that has it; set use_cpu: true too, or {instead}")
    if config.ddp_backend is not None and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError("ddp_backend: is for several processes; start them with accelerate launch, or leave it out")
    for field in fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if choices and value != _default(config, field.name):
            known_name(value, choices, field.name, "value")


def check_needed(config: SFTConfig) -> None:
    """Raises a UserError for the first field that has no effect with the others."""
    for name, other in NEEDED.items():
        if is_set(config, name) and getattr(config, other) in (None, "no", False, 0, []):
            raise UserError(f"{name}: has no effect without {other}; set that too, or leave {name} out")
    if config.packing and config.packing_strategy != "wrapped":
        raise UserError("packing_strategy: only wrapped keeps each row within one domain, which λ_d needs; set wrapped")
    if DebugOption.TPU_METRICS_DEBUG in config.debug:
        raise UserError("debug: tpu_metrics_debug is for TPUs, on which Bridle does not run; leave it out")
    if config.accelerator_config.dispatch_batches:
        raise UserError("accelerator_config: dispatch_batches would lose each row's domain; leave it out")
    if config.fp16 and config.device.type == "cpu":
        raise UserError("fp16: needs a GPU; on a CPU set bf16, or leave it out")
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("use_liger_kernel: is not installed; run pip install liger-kernel, or leave it out")
    _check_trackers(config)
    _check_scheduler(config)


def _check_trackers(config: SFTConfig) -> None:
    trackers = config.report_to or []
    for name in trackers:
        known_name(name, INTEGRATION_TO_CALLBACK, "report_to", "tracker")
        if name not in get_available_reporting_integrations():
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except (ImportError, RuntimeError) as error:
                raise UserError(f"report_to: {name}: {first_line(error)}") from error
    for name in ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if is_set(config, name) and "trackio" not in trackers:
            raise UserError(f"{name}: is read by trackio alone; add it to report_to, or leave {name} out")


def _check_scheduler(config: SFTConfig) -> None:
    kind = config.lr_scheduler_type.value
    if kind.startswith("constant") and config.lr_scheduler_kwargs:
        raise UserError(f"lr_scheduler_kwargs: a {kind} schedule takes none; leave it out")
    if kind in ("constant", "reduce_lr_on_plateau", "greedy") and config.warmup_steps:
        raise UserError(
            f"warmup_steps: a {kind} schedule has none; leave it out, or set lr_scheduler_type: constant_with_warmup"
        )
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        get_scheduler(kind, torch.optim.SGD([parameter]), 0, 1, config.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_scheduler_kwargs: {first_line(error)}") from error


def check_optimiser(config: SFTConfig, model: torch.nn.Module) -> None:
    """Raises a UserError for an optimiser that cannot be built, or options that it does not read."""
    name = config.optim.value
    if "layerwise" in name or "lomo" in name:
        raise UserError(f"optim: {name} steps within the backward pass, where no update can be skipped; use another")
    if config.optim_target_modules is not None:
        if not name.startswith(("galore", "apollo")):
            raise UserError(f"optim_target_modules: {name} does not read it; leave it out")
        _optimiser(config, model)
        return
    kwargs = _optimiser(config, model)
    for field in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if is_set(config, field) and kwargs == _optimiser(config, model, **{field: _default(config, field)}):
            raise UserError(f"{field}: {name} does not read it; leave it out")
    parts = (config.optim_args or "").replace(" ", "").split(",") if config.optim_args else []
    for part in parts:
        others = ",".join(other for other in parts if other != part)
        if kwargs == _optimiser(config, model, optim_args=others):
            raise UserError(f"optim_args: {name} does not read {part}; leave it out")


def _optimiser(config: SFTConfig, model: torch.nn.Module, **changes: Any) -> dict[str, Any]:
    changed = copy(config)  # `replace` would repeat the checks of making one
    vars(changed).update(changes)
    try:
        kwargs: dict[str, Any]
        _, kwargs = Trainer.get_optimizer_cls_and_kwargs(changed, model)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"optim: {config.optim.value}: {first_line(error)}") from error
    return kwargs


def _default(config: SFTConfig, name: str) -> Any:
    field = config.__dataclass_fields__[name]
    return field.default if field.default_factory is MISSING else field.default_factory()
