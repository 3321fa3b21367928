"""Runs of tiny models that a test starts in one process and, as a script, in several.

accelerate launch --multi_gpu --num_processes 2 runs.py MODEL FOLDER NAME...
"""

import json
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from bridle.errors import UserError
from bridle.models.loading import LoraOptions
from bridle.models.sharding import is_sharded
from bridle.recipes.recipe import build_recipe
from bridle.recipes.run import train
from bridle.training import batches
from bridle.training.config import Regulariser
from bridle.training.state import trainable_weights
from bridle.training.trainer import ConstrainedTrainer
from bridle.utils.distributed import is_main, world_size
from trainers import NO_E, LocalWorker, corpus, spoil_loss, trainer_of

GLOBAL_BATCH = 8  # rows in a forward of all processes together
SAVING = {"save_strategy": "steps", "save_steps": 3}
RUNS = {
    "live, resumed": {"anchor": "live", "kl_on": "both", "lost": 2, **SAVING},
    "previous, LoRA, shipped": {"anchor": "previous", "lora": LoraOptions(r=2), "targets": "precomputed"},
    "rollouts apart": {"anchor": "previous", "kl_on": "both", "least": -(10**9)},
    "parallel": {"anchor": "previous", "kl_on": "rollouts", "schedule": "parallel", "rounds": 3, "max_steps": 6},
    "sharded, live": {"anchor": "live", "kl_on": "rollouts"},
    "sharded, previous": {"anchor": "previous", "kl_on": "both", "lost": 2},
    "sharded, initial, LoRA, resumed": {"anchor": "initial", "lora": LoraOptions(r=2), **SAVING},
}
"""What several processes do as one does. Those called resumed are stopped after their third step and go on from it.

`least` is the padding that rollouts in a forward of their own must spare. In the update that is lost the main process's
loss is infinite, and only its own.
"""


class Stop(Exception):  # noqa: N818
    """Ends a run in the middle, as if the machine had."""


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets."""


@contextmanager
def sharding():
    """Has `accelerate` shard, which on CPUs it leaves out without a word; it takes them for GPUs here."""
    create = ConstrainedTrainer.create_accelerator_and_postprocess

    def create_sharding(trainer):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(trainer)

    ConstrainedTrainer.create_accelerator_and_postprocess = create_sharding
    os.environ |= FSDP2
    try:
        yield
    finally:
        ConstrainedTrainer.create_accelerator_and_postprocess = create
        for key in FSDP2:
            del os.environ[key]


def make(name, model, folder):
    options = dict(RUNS[name])
    lost = options.pop("lost", None)
    least = options.pop("least", 10**9)
    batches.worth_a_forward = lambda device: least
    torch.manual_seed(0)  # adapters are drawn at random
    regulariser = Regulariser(NO_E, weight=4.0, anchor=options.pop("anchor"), kl_on=options.pop("kl_on", "corpus"))
    trainer = trainer_of(
        model,
        folder,
        {"rude": regulariser},
        **{
            "per_device_train_batch_size": GLOBAL_BATCH // world_size(),
            "gradient_accumulation_steps": 2,
            "optim": "sgd",  # AdamW makes whole steps out of gradients that are only rounding
            "learning_rate": 0.5,
            "rollout_batch_size": 8,
            "use_cpu": True,
            **options,
        },
    )
    if is_main():
        spoil_loss(trainer, {lost})
    if options.get("schedule") == "parallel":
        trainer.schedule.worker = LocalWorker(trainer.regularisers)
    return trainer


def carry_out_recipe(model, folder):
    """A recipe's run, sharded where there are several processes."""
    recipe = build_recipe(
        {
            "model": str(model),
            "corpus": {name: {"path": "not read"} for name in corpus()},
            "constraints": {"no e": {"type": "regex", "pattern": "e"}},
            "regularisers": {"rude": {"constraint": "no e"}},
            "rounds": 2,
            "rollouts_per_round": 32,
            "max_new_tokens": 8,
            "prompt_tokens": [1, 3],
            "auxiliary": {"epochs": 2, "batch_size": 8},
            "per_device_train_batch_size": GLOBAL_BATCH // world_size(),
            "max_length": 24,
            "max_steps": 4,
            "learning_rate": 0.5,
            "optim": "sgd",
            "logging_steps": 1,
            "gradient_checkpointing": True,
            "use_cpu": True,
        }
    )
    with sharding() if world_size() > 1 else nullcontext():
        train(recipe, Path(folder) / "recipe", corpus=corpus())
        if world_size() > 1:
            with pytest.raises(UserError, match="parallel needs the whole model in each process"):
                train(replace(recipe, training=recipe.training | {"schedule": "parallel"}), folder, corpus=corpus())
        with pytest.raises(UserError, match="holds a run already"):
            train(recipe, Path(folder) / "recipe", corpus=corpus())


def carry_out(name, model, folder):
    """Trains, and writes what was logged and the weights it ended with."""
    with sharding() if "sharded" in name and world_size() > 1 else nullcontext():
        _carry_out(name, model, Path(folder) / name)


def _carry_out(name, model, folder):
    trainer = make(name, model, folder)
    if "resumed" in name and world_size() > 1:
        trainer.add_callback(StopAfter(step=3))
        try:
            trainer.train()
        except Stop:
            trainer = make(name, model, folder)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    else:
        trainer.train()
    assert is_sharded(trainer.model) == ("sharded" in folder.name and world_size() == 2)
    if is_sharded(trainer.model) and (anchor := trainer.regularisers[0].anchor):
        assert all(isinstance(weight, DTensor) for weight in anchor.weights.values())
    weights = trainable_weights(trainer.model)
    if is_main():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
        save_file(weights, folder / "weights.safetensors")


if __name__ == "__main__":
    assert PartialState(cpu=True).num_processes == 2
    for run in sys.argv[3:]:
        carry_out(run, *sys.argv[1:3])
    carry_out_recipe(*sys.argv[1:3])
