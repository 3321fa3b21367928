"""Every option of TRL and `transformers` is obeyed, as a test shows, or refused in one line."""

import json
import logging
import math
import re
from dataclasses import fields
from itertools import chain
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import SchedulerType, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

from bridle.errors import UserError
from bridle.recipes.recipe import build_recipe
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig, Regulariser
from bridle.training.options import EVALUATION, METRICS, NEEDED, REFUSED
from bridle.training.trainer import ConstrainedTrainer
from malformed import RECIPE
from tiny_tokenizers import SENTENCES, tiny_tokenizer
from trainers import NO_E, corpus, logged, trainer_of

TESTS = Path(__file__).parents[1]

OBEYED = {
    "test_rows_are_what_trl_prepares": (
        *("chat_template_path", "eos_token", "max_length", "truncation_mode", "shuffle_dataset", "packing"),
        *("packing_strategy", "completion_only_loss", "assistant_only_loss"),
    ),
    "test_batches_are_padded": ("pad_token", "pad_to_multiple_of"),
    "test_the_loss_is_trls": ("loss_type", "activation_checkpointing", "activation_checkpointing_kwargs"),
    "test_the_loss_of_a_mixture_of_experts": ("router_aux_loss_coef",),
    "test_activations_go_to_the_cpu": ("activation_offloading",),
    "test_the_optimiser": (
        *("learning_rate", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
        *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    ),
    "test_optimisers_that_are_refused": ("optim_target_modules",),
    "test_the_loop": (
        *("output_dir", "per_device_train_batch_size", "max_steps", "logging_strategy", "logging_steps"),
        *("logging_first_step", "log_level", "log_level_replica", "include_num_input_tokens_seen"),
        *("save_strategy", "save_steps", "skip_memory_metrics", "torch_empty_cache_steps", "debug", "use_cpu"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    ),
    "test_the_loader": (
        *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        "accelerator_config",
    ),
    "test_the_order_of_rows": ("train_sampling_strategy", "data_seed"),
    "test_epochs": ("num_train_epochs",),
    "test_several_processes": (
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_timeout", "ddp_backend", "log_on_each_node"),
    ),
    "test_precision": ("bf16", "fp16", "tf32"),
    "test_determinism": ("full_determinism",),
    "test_compilation": ("torch_compile_backend", "torch_compile_mode"),
    "test_liger": ("use_liger_kernel", "liger_kernel_config"),
    "test_evaluation": (
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_packing", "do_eval"),
        *("per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
        *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    ),
    "test_state_of_callbacks": ("restore_callback_states_from_checkpoint",),
    "test_sharding_needs_several_processes": ("fsdp", "fsdp_config", "deepspeed"),
    "unit/test_recipes_metrics.py::test_progress_is_shown_unless_it_is_disabled": ("disable_tqdm",),
    "integration/test_trackers.py::test_trackers": ("report_to", "run_name", "project"),
    "integration/test_trackers.py::test_spaces_of_trackio": (
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ),
    "integration/test_guards.py::test_a_loss_that_is_not_finite_is_missing": ("logging_nan_inf_filter",),
    "integration/test_training.py::test_one_batch_of_eight_is_four_of_two": ("gradient_accumulation_steps",),
    "integration/test_training.py::test_one_seed_gives_one_result": ("seed",),
    "integration/test_training.py::test_compiled_or_not_it_is_the_same_training": ("torch_compile",),
    "integration/test_python_api.py::test_names_and_functions_in_their_places": ("model_init_kwargs",),
    "integration/test_hub.py::test_the_model_its_card_and_its_auxiliary_arrive_and_nothing_else": (
        *("push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "hub_revision", "hub_always_push"),
    ),
    "integration/test_hub.py::test_strategies_that_push_optimiser_states_are_refused": ("hub_strategy",),
}
"""The fields that each test shows to be obeyed."""


def test_every_field_is_obeyed_or_refused():
    obeyed = [name for names in OBEYED.values() for name in names]
    assert len(obeyed) == len(set(obeyed))
    assert {f.name for f in fields(SFTConfig)} == {*obeyed, *REFUSED}
    assert not {*obeyed} & {*REFUSED}
    assert {*NEEDED, *NEEDED.values(), *EVALUATION, *METRICS} <= {*obeyed}
    for test in OBEYED:
        file, _, name = test.rpartition("::")
        path = TESTS / file if file else Path(__file__)
        assert re.search(rf"^\s*def {name}\b", path.read_text(encoding="utf-8"), re.MULTILINE), test


def config(**options):
    return ConstrainedConfig("unused", **{"use_cpu": True, "bf16": False, **options})


OTHER = {
    "label_names": ["targets"],
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "dataset_num_proc": 2,
    "length_column_name": "size",
    "dataset_text_field": "body",
    "save_total_limit": 1,
    "resume_from_checkpoint": "checkpoint-1",
    "local_rank": 0,
    "remove_unused_columns": False,
    "average_tokens_across_devices": False,
    "parallelism_config": {},
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
}
"""Values of refused fields; true where there is none."""


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(UserError, match=rf"^{name}: .+;|^{name}: .+--resume"):
        config(**{name: OTHER.get(name, True)})


WITHOUT = {
    "eval_steps": 2,
    "eval_delay": 1,
    "metric_for_best_model": "ce",
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "dataloader_multiprocessing_context": "fork",
    "dataloader_in_order": False,
    "packing_strategy": "wrapped",
    "fsdp_config": {"version": 2},
    "liger_kernel_config": {"rope": True},
    "run_name": "a",
    "project": "a",
    "trackio_space_id": "a/b",
    "trackio_bucket_id": "a/b",
    "trackio_static_space_id": "a/b",
}


@pytest.mark.parametrize("name", NEEDED)
def test_has_no_effect_without_another(name):
    with pytest.raises(UserError, match=f"{name.split('_')[-1]}: has no effect without {NEEDED[name]}; "):
        config(**{"save_strategy": "no", "gradient_checkpointing": False, name: WITHOUT.get(name, True)})


@pytest.mark.parametrize("name", sorted(EVALUATION))
def test_a_recipe_has_no_rows_to_evaluate_on(name):
    with pytest.raises(UserError, match=f"^{name}: there are no rows to evaluate on"):
        build_recipe({**RECIPE, name: True})
    value = "steps" if name == "eval_strategy" else 1
    assert name in build_recipe({**RECIPE, name: value, "eval": {"share": 0.1}}).training


@pytest.mark.parametrize("name", sorted(METRICS))
def test_nothing_reads_options_of_metrics_where_there_are_none(name, folder, tmp_path):
    with pytest.raises(UserError, match=f"^{name}: is read by compute_metrics, which a recipe cannot name"):
        build_recipe({**RECIPE, name: ["loss"], "eval": {"share": 0.1}})
    with pytest.raises(UserError, match=f"^{name}: is read by compute_metrics; give the trainer that"):
        trainer_of(folder, tmp_path, {}, **{name: ["loss"]})


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A model's `from_pretrained` folder."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=len(tiny_tokenizer), initializer_range=0.1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------- rows

CHAT = [
    {"role": "user", "content": "Is it a hat?"},
    {"role": "assistant", "content": SENTENCES[2]},
]
TEXTS = [{"text": text} for text in (*SENTENCES, "short", " ".join(SENTENCES))]
COMPLETIONS = [{"prompt": "The old kettle", "completion": " sings."}, {"prompt": "A hat", "completion": " is warm."}]
CHATS = [{"messages": CHAT}, {"messages": CHAT * 2}]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Another chat template, in a file."""
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text("{% for message in messages %}<{{ message['content'] }}>{% endfor %}", encoding="utf-8")
    return str(path)


PREPARED = {
    "chat_template_path": (CHATS, {"chat_template_path": "TEMPLATE"}),
    "eos_token": (TEXTS, {"eos_token": "<pad>"}),
    "max_length": (TEXTS, {"max_length": 9}),
    "truncation_mode": (TEXTS, {"max_length": 9, "truncation_mode": "keep_end"}),
    "packing": (TEXTS, {"max_length": 9, "packing": True, "packing_strategy": "wrapped"}),
    "shuffle_dataset": (
        TEXTS,
        {"max_length": 9, "packing": True, "packing_strategy": "wrapped", "shuffle_dataset": True},
    ),
    "completion_only_loss": (COMPLETIONS, {"completion_only_loss": False}),
    "assistant_only_loss": (CHATS, {"assistant_only_loss": True}),
    "formatting_func": (TEXTS, {"formatting_func": lambda row: row["text"].upper()}),
}


@pytest.mark.parametrize("option", PREPARED)
def test_rows_are_what_trl_prepares(option, template, tiny_model, tmp_path):
    rows, options = PREPARED[option]
    options = {name: template if value == "TEMPLATE" else value for name, value in options.items()}
    formatting = {name: options.pop(name) for name in ("formatting_func",) if name in options}
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "max_length": 60}

    def in_order(dataset):
        found = dataset.select_columns(["input_ids", "labels"]).to_list()
        return sorted(found, key=str) if "shuffle_dataset" in options else found

    def prepared(options, **kwargs):
        tokenizer = tiny_tokenizer()
        trainer = ConstrainedTrainer(
            tiny_model("llama", vocab_size=len(tokenizer)),
            ConstrainedConfig(**common | options),
            {"other": Dataset.from_list(TEXTS), "rows": Dataset.from_list(rows)},
            {},
            processing_class=tokenizer,
            **kwargs,
        )
        return in_order(trainer.tokenised["rows"])

    tokenizer = tiny_tokenizer()
    theirs = SFTTrainer(
        tiny_model("llama", vocab_size=len(tokenizer)),
        SFTConfig(**common | options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **formatting,
    )
    assert prepared(options, **formatting) == in_order(theirs.train_dataset) != prepared({})


def test_rows_without_a_completion(folder, tmp_path):
    with pytest.raises(UserError, match="completion_only_loss: the rows of plain have no completion"):
        trainer_of(folder, tmp_path, {}, completion_only_loss=True)
    with pytest.raises(UserError, match=r"assistant_only_loss.*not conversational"):
        trainer_of(folder, tmp_path, {}, assistant_only_loss=True)
    for name in ("train_dataset", "data_collator", "compute_loss_func", "quantization_config"):
        with pytest.raises(UserError, match=f"^{name}: "):
            ConstrainedTrainer(tiny(folder), config(), corpus(), {}, **{name: len})


def tiny(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_batches_are_padded(folder, tmp_path):
    trainer = trainer_of(
        folder, tmp_path, {"rude": Regulariser(NO_E, kl_on="both")}, pad_token="<eos>", pad_to_multiple_of=7
    )
    shapes = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape) if trainer.model.training else None,
        with_kwargs=True,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 7 == 0
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 2).all()
    trainer.train()
    assert any(rows > 8 for rows, _ in shapes)  # with rollouts
    assert all(time % 7 == 0 for rows, time in shapes if rows >= 8)


# ---------------------------------------------------------------------- the update


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dft"},
        {"loss_type": "chunked_nll"},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_the_loss_is_trls(options, folder, tmp_path):
    ours = trainer_of(folder, tmp_path / "a", {}, max_steps=2, **options)
    theirs = SFTTrainer(
        tiny(folder),
        SFTConfig(
            str(tmp_path / "b"),
            use_cpu=True,
            bf16=False,
            max_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            **options,
        ),
        train_dataset=ours.train_dataset.remove_columns("domain"),
        processing_class=ours.processing_class,
    )
    for trainer in (ours, theirs):
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == options.get("activation_checkpointing", False) or (
            trainer is theirs  # whose default it is
        )
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-5)


def test_the_loss_of_a_mixture_of_experts(tiny_model, tiny_tokenizer, tmp_path, folder):
    found = []
    for coefficient in (0.0, 0.5):
        model = tiny_model("mixtral", vocab_size=len(tiny_tokenizer), num_local_experts=2, num_key_value_heads=1)
        arguments = config(max_steps=1, router_aux_loss_coef=coefficient, logging_steps=1, save_strategy="no")
        arguments.output_dir = str(tmp_path)
        trainer = ConstrainedTrainer(model, arguments, corpus(), {}, processing_class=tiny_tokenizer)
        trainer.train()
        found.append(logged(trainer, "loss")[0])
    assert found[1] > found[0] + 0.1
    with pytest.raises(UserError, match="router_aux_loss_coef"):
        trainer_of(folder, tmp_path, {}, router_aux_loss_coef=0.5)


def test_activations_go_to_the_cpu(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "trl.trainer.sft_trainer.get_act_offloading_ctx_manager",
        lambda model: asked.append(model) or torch.autograd.graph.save_on_cpu(),
    )
    trainer = trainer_of(folder, tmp_path, {}, activation_offloading=True, max_steps=1)
    trainer.train()
    assert asked == [trainer.model]


def test_the_optimiser(folder, tmp_path):
    trainer = trainer_of(
        folder,
        tmp_path,
        {},
        max_steps=4,
        learning_rate=3e-3,
        optim="adamw_torch",
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-6,
        weight_decay=0.3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.5},
        warmup_steps=2,
        max_grad_norm=1e-3,
    )
    clipped, clip = [], trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda parameters, norm: clipped.append(norm) or clip(parameters, norm)
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([0, 1.5e-3, 3e-3, 2.25e-3])
    assert clipped == [1e-3] * 4
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.3)
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([1.5e-3] * 2)  # half of it, and not 0
    trainer = trainer_of(folder, tmp_path, {}, optim="sgd", optim_args="momentum=0.5", max_steps=1)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim": "adamw_bnb_8bit"}, "optim: adamw_bnb_8bit: You need to install `bitsandbytes`"),
        ({"optim": "galore_adamw", "optim_target_modules": ["mlp"]}, "optim: galore_adamw: "),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["mlp"]}, "optim: galore_adamw_layerwise steps"),
        ({"optim_target_modules": ["mlp"]}, "optim_target_modules: adamw_torch_fused does not read it"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1: sgd does not read it"),
        ({"optim": "lomo"}, "optim: lomo steps within the backward pass"),
        ({"optim": "adalomo"}, "optim: adalomo steps within the backward pass"),
        ({"optim_args": "momentum=0.5"}, "optim_args: adamw_torch_fused does not read momentum=0.5"),
        ({"optim": "sgd", "optim_args": "momentum=0.5,speed=2"}, "optim_args: sgd does not read speed=2"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim: sgd: "),
    ],
)
def test_optimisers_that_are_refused(options, said, folder, tmp_path):
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        trainer_of(folder, tmp_path, {}, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr_scheduler_kwargs": {"speed": 1}}, "lr_scheduler_kwargs: .*unexpected keyword argument 'speed'"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "few"}}, "lr_scheduler_kwargs: "),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs: a constant"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 2}, "warmup_steps: a constant schedule has none"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 2, "eval_strategy": "epoch"},
            "warmup_steps: a reduce_lr_on_plateau schedule has none",
        ),
        (
            {"lr_scheduler_type": "greedy", "warmup_steps": 2, "eval_strategy": "epoch"},
            "warmup_steps: a greedy schedule has none",
        ),
        ({"save_strategy": "best"}, "save_strategy: best may leave a stopped run no checkpoint"),
        ({"loss_type": "nlll"}, "loss_type: there is no value 'nlll'; did you mean nll?"),
        ({"truncation_mode": "end"}, "truncation_mode: there is no value 'end'; there are: keep_end, keep_start"),
        ({"debug": "tpu_metrics_debug"}, "debug: tpu_metrics_debug"),
        ({"report_to": "tensorbord"}, "report_to: there is no tracker 'tensorbord'; did you mean tensorboard?"),
        ({"report_to": ["flyte"]}, "report_to: flyte: FlyteCallback requires flytekit to be installed"),
        ({"report_to": "mlflow", "project": "a"}, "project: is read by trackio alone"),
    ],
)
def test_values_that_are_refused(options, said):
    if options.get("report_to") == "mlflow":
        pytest.importorskip("mlflow", reason="MLflow is not installed")
    with pytest.raises(UserError, match=f"^{said}".replace("?", r"\?")):
        config(**options)


def test_every_schedule_of_the_learning_rate_passes_the_check():
    needs = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "warmup_stable_decay": {"num_decay_steps": 1}}
    needs["cosine_warmup_with_min_lr"] = needs["cosine_with_min_lr"]
    for kind in SchedulerType:
        if kind not in ("reduce_lr_on_plateau", "greedy"):  # which follow an evaluation
            config(lr_scheduler_type=kind, lr_scheduler_kwargs=needs.get(kind.value))


# ---------------------------------------------------------------------- the loop of transformers


def test_the_loop(folder, tmp_path, monkeypatch):
    emptied, before = [], transformers.logging.get_verbosity()
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda *_, **__: emptied.append(True), raising=False)
    trainer = trainer_of(
        folder,
        tmp_path / "out",
        {},
        use_cpu=True,
        bf16=False,
        max_steps=5,
        per_device_train_batch_size=3,
        logging_strategy="steps",
        logging_steps=3,
        logging_first_step=True,
        log_level="error",
        log_level_replica="critical",
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=2,
        rounds=1,
        skip_memory_metrics=False,
        torch_empty_cache_steps=2,
        debug="underflow_overflow",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    try:
        assert transformers.logging.get_verbosity() == logging.ERROR
    finally:
        transformers.logging.set_verbosity(before)
    assert trainer.args.get_process_log_level() == logging.ERROR
    kinds = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert "PrinterCallback" in kinds
    assert "ProgressCallback" not in kinds
    rows = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["attention_mask"]), with_kwargs=True
    )
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    assert trainer.args.device.type == "cpu"
    assert [len(mask) for mask in rows] == [3] * 5
    assert [record["step"] for record in trainer.state.log_history if "loss" in record] == [1, 3]
    assert trainer.state.num_input_tokens_seen == sum(int(mask.sum()) for mask in rows)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {
        *("checkpoint-2", "checkpoint-4", "checkpoint-5")
    }
    assert "train_mem_cpu_alloc_delta" in trainer.state.log_history[-1]
    assert len(emptied) == 3
    assert any(module._forward_hooks for module in trainer.model.modules())  # those of debug


def test_the_loader(folder, tmp_path):
    rows = corpus()["plain"].map(lambda row: {"input_ids": [5, 6], "labels": [5, 6]}).select(range(7))
    trainer = trainer_of(
        folder,
        tmp_path,
        {},
        rows={"plain": rows},
        dataloader_drop_last=True,
        dataloader_num_workers=2,
        dataloader_pin_memory=False,
        dataloader_persistent_workers=True,
        dataloader_prefetch_factor=3,
        dataloader_multiprocessing_context="fork",
        dataloader_in_order=False,
        accelerator_config={"even_batches": False, "non_blocking": True},
        per_device_train_batch_size=2,
    )
    loader = trainer.get_train_dataloader()
    assert len(loader) == 3
    assert (loader.num_workers, loader.pin_memory, loader.persistent_workers) == (2, False, True)
    assert (loader.prefetch_factor, loader.in_order) == (3, False)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    assert not trainer.accelerator.even_batches
    assert trainer.accelerator.non_blocking


def test_the_order_of_rows(folder, tmp_path):
    def order(**options):
        trainer = trainer_of(folder, tmp_path, {}, max_length=60, **options)
        batches = [batch["attention_mask"].sum(1).tolist() for batch in trainer.get_train_dataloader()]
        return [len(ids) for ids in trainer.train_dataset["input_ids"]], batches

    rows, shuffled = order(data_seed=1)
    assert order(data_seed=1)[1] == shuffled != order(data_seed=2)[1]
    lengths, batches = order(train_sampling_strategy="sequential")
    tokenizer, texts = transformers.AutoTokenizer.from_pretrained(folder), corpus()
    in_turn = [text for pair in zip(texts["plain"]["text"], texts["rude"]["text"], strict=True) for text in pair]
    assert [*chain(*batches)] == lengths == [len(tokenizer(text)["input_ids"]) + 1 for text in in_turn]
    assert sorted(lengths) == sorted(rows)
    for strategy in ("group_by_length", "batch_rebalance"):
        _, batches = order(train_sampling_strategy=strategy)
        assert sorted([*chain(*batches)]) == sorted(rows)
        assert batches != shuffled
    grouped = order(train_sampling_strategy="group_by_length")[1]
    spread = [sum(max(batch) - min(batch) for batch in batches) for batches in (grouped, shuffled)]
    assert spread[0] < spread[1]


def test_epochs(folder, tmp_path):
    trainer = trainer_of(folder, tmp_path, {}, max_steps=-1, num_train_epochs=0.5)
    trainer.train()
    assert trainer.state.max_steps == math.ceil(len(trainer.train_dataset) / 8 / 2)


def test_several_processes(folder, tmp_path):
    trainer = trainer_of(
        folder,
        tmp_path,
        {},
        ddp_find_unused_parameters=True,
        ddp_bucket_cap_mb=7,
        ddp_broadcast_buffers=False,
        ddp_static_graph=True,
        ddp_timeout=99,
        log_on_each_node=False,
    )
    handler = trainer.accelerator.ddp_handler
    assert (handler.find_unused_parameters, handler.bucket_cap_mb) == (True, 7)
    assert (handler.broadcast_buffers, handler.static_graph) == (False, True)
    assert trainer.args.ddp_timeout_delta.total_seconds() == 99
    assert trainer.args.should_log
    with pytest.raises(UserError, match="ddp_backend: is for several processes"):
        config(ddp_backend="gloo")


def test_precision(folder, tmp_path):
    on_gpu = torch.cuda.is_available()
    for dtype in ("bf16", "fp16") if on_gpu else ("bf16",):
        options = {"use_cpu": not on_gpu, "bf16": False, "max_steps": 2} | {dtype: True}
        trainer = trainer_of(folder, tmp_path / dtype, {"rude": Regulariser(NO_E)}, **options)
        types = []
        trainer.model.model.layers[0].mlp.register_forward_hook(lambda *args, seen=types: seen.append(args[2].dtype))
        trainer.train()
        assert {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype] in types
    with pytest.raises(UserError, match="fp16: needs a GPU"):
        config(fp16=True)
    if not on_gpu:
        with pytest.raises(UserError, match="tf32"):
            config(tf32=True)


def test_precision_that_accelerate_was_launched_with(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = config(bf16=None)
    assert (launched.bf16, launched.mixed_precision, launched.autocast_dtype) == (True, "bf16", torch.bfloat16)
    with pytest.raises(UserError, match=r"^bf16: is false, but accelerate was launched with mixed precision bf16"):
        config(bf16=False)


def test_determinism(folder, tmp_path, monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "ASCEND_LAUNCH_BLOCKING"):
        monkeypatch.setenv(name, "")
    for name in ("HCCL_DETERMINISTIC", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
    try:
        trainer_of(folder, tmp_path, {"rude": Regulariser(NO_E)}, full_determinism=True, max_steps=2).train()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, False


def test_compilation(folder, tmp_path, monkeypatch):
    for name in ("BACKEND", "USE_REGIONAL_COMPILATION", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "default")
    trainer = trainer_of(folder, tmp_path, {}, torch_compile_backend="eager", torch_compile_mode="reduce-overhead")
    plugin = trainer.accelerator.state.dynamo_plugin
    assert (plugin.backend.value.lower(), plugin.mode) == ("eager", "reduce-overhead")


def test_liger(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="use_liger_kernel: is not installed"):
        config(use_liger_kernel=True)
    monkeypatch.setattr("bridle.training.options.is_liger_kernel_available", lambda: True)
    applied = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *args: applied.append(args))
    trainer = trainer_of(folder, tmp_path, {}, use_liger_kernel=True, liger_kernel_config={"rope": False}, max_steps=1)
    trainer.train()
    assert applied == [(trainer.model, {"rope": False, "fused_linear_cross_entropy": False})]


# ---------------------------------------------------------------------- evaluation, resuming, sharding


def test_evaluation(folder, tmp_path):
    options = {"eval_strategy": "steps", "eval_on_start": True}
    for name in options:
        with pytest.raises(UserError, match="eval_strategy: there are no rows to evaluate on"):
            trainer_of(folder, tmp_path, {}, **{name: options[name]})
    seen = []

    def metrics(prediction, compute_result=True):
        assert prediction.losses is not None
        seen.append(len(prediction.label_ids))
        return {"rows": len(seen)} if compute_result else {}

    rows = Dataset.from_list(TEXTS)
    common = {"output_dir": str(tmp_path / "a"), "use_cpu": True, "bf16": False, "max_steps": 3, "rounds": 1}
    common |= {"learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 4}
    trainer = ConstrainedTrainer(
        tiny(folder),
        ConstrainedConfig(
            **common,
            **options,
            do_eval=True,
            eval_steps=1,
            eval_delay=2,
            save_steps=1,
            per_device_eval_batch_size=2,
            include_for_metrics=["loss"],
            batch_eval_metrics=True,
            eval_use_gather_object=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
        ),
        corpus(),
        {},
        eval_dataset=rows,
        compute_metrics=metrics,
    )
    trainer.train()
    assert [r["step"] for r in trainer.state.log_history if "eval_loss" in r] == [0, 2, 3]
    assert seen == [2, 2, 2] * 3
    assert trainer.state.best_metric == max(logged(trainer, "eval_loss")[1:])
    best = transformers.AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(best.lm_head.weight, trainer.model.lm_head.weight)

    trainer = ConstrainedTrainer(
        tiny(folder),
        ConstrainedConfig(
            **common,
            max_length=9,
            packing=True,
            packing_strategy="wrapped",
            eval_packing=False,
            prediction_loss_only=True,
            eval_accumulation_steps=1,
            eval_do_concat_batches=False,
            bf16_full_eval=True,
        ),
        corpus(),
        {},
        eval_dataset=rows,
        compute_metrics=lambda _: pytest.fail("only the loss is asked for"),
    )
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "evaluation")
    assert output.num_samples == len(TEXTS)
    assert trainer.model.dtype == torch.bfloat16
    trainer.args.prediction_loss_only, trainer.compute_metrics = False, None
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "evaluation", prediction_loss_only=False)
    assert isinstance(output.predictions, list)
    assert not config(fp16_full_eval=True).bf16_full_eval


class Counter(TrainerCallback, ExportableState):
    def __init__(self, count=0):
        self.count = count

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"count": self.count}, "attributes": {}}


@pytest.mark.parametrize("restored", [False, True])
def test_state_of_callbacks(restored, folder, tmp_path):
    def trainer(steps):
        options = {"save_strategy": "steps", "save_steps": 2, "rounds": 1, "max_steps": steps}
        return ConstrainedTrainer(
            tiny(folder),
            ConstrainedConfig(
                str(tmp_path), use_cpu=True, bf16=False, restore_callback_states_from_checkpoint=restored, **options
            ),
            corpus(),
            {},
            callbacks=[Counter()],
        )

    trainer(2).train()
    second = trainer(3)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    counter = next(one for one in second.callback_handler.callbacks if isinstance(one, Counter))
    assert counter.count == (3 if restored else 1)


def test_sharding_needs_several_processes(folder, tmp_path):
    for options in ({"fsdp": "full_shard"}, {"fsdp": True, "fsdp_config": {"version": 2}}):
        with pytest.raises(UserError, match="fsdp"):
            trainer_of(folder, tmp_path, {}, use_cpu=True, **options)
    with pytest.raises(UserError, match="deepspeed"):
        config(deepspeed={"zero_optimization": {"stage": 2}})


def test_to_dict_is_flat_and_json():
    found = json.loads(config(auxiliary=AuxiliaryOptions(depth=3), eos_token="<eos>").to_json_string())
    assert found["auxiliary.depth"] == 3
    assert found["parallel.policy_workers"] == 1
    assert found["eos_token"] == "<eos>"
    assert found["hub_token"] == "<HUB_TOKEN>"
    assert not any(isinstance(value, dict) and name in ("auxiliary", "parallel") for name, value in found.items())


@pytest.mark.parametrize(
    ("launched", "advice"), [(None, "leave bf16 out"), ("bf16", "launch with --mixed_precision no")]
)
def test_bf16_without_a_gpu_says_who_set_it(monkeypatch, launched, advice):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr("bridle.training.options.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(UserError, match=f"^bf16: there is no GPU that has it; set use_cpu: true too, or {advice}$"):
        ConstrainedConfig("unused", bf16=None if launched else True)
