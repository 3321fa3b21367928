"""Runs of tiny models that a test carries out in one process and, as a script, in several.

accelerate launch --cpu --num_processes 2 runs.py MODEL FOLDER NAME...
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from bridle.models.loading import LoraOptions
from bridle.ranks import is_main, world
from bridle.training.config import Regulariser
from bridle.training.parallel import LocalWorker
from bridle.training.state import trainable_weights
from trainers import NO_E, trainer_of

GLOBAL_BATCH = 8  # rows in a forward of all processes together
RUNS = {
    "live": {"anchor": "live", "on": "both"},
    "previous": {"anchor": "previous", "lora": LoraOptions(r=2)},
    "parallel": {"anchor": "previous", "on": "rollouts", "schedule": "parallel", "rounds": 3, "max_steps": 6},
    "resumed": {"anchor": "live", "on": "both", "save_strategy": "steps", "save_steps": 3},
}


class Stop(Exception):  # noqa: N818
    """Ends a run in the middle, as if the machine had."""


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def make(name, model, folder):
    options = dict(RUNS[name])
    torch.manual_seed(0)  # adapters are drawn at random
    regulariser = Regulariser(NO_E, weight=4.0, anchor=options.pop("anchor"), on=options.pop("on", "corpus"))
    trainer = trainer_of(
        model,
        folder,
        {"rude": regulariser},
        **{
            "per_device_train_batch_size": GLOBAL_BATCH // world(),
            "gradient_accumulation_steps": 2,
            "optim": "sgd",  # AdamW makes whole steps out of gradients that are only rounding
            "learning_rate": 0.5,
            "rollout_batch_size": 8,
            "use_cpu": True,
            **options,
        },
    )
    if options.get("schedule") == "parallel":
        trainer.schedule.worker = LocalWorker(trainer.regularisers)
    return trainer


def carry_out(name, model, folder):
    """Trains, and writes what was logged and the weights it ended with."""
    folder = Path(folder) / name
    trainer = make(name, model, folder)
    if name == "resumed" and world() > 1:
        trainer.add_callback(StopAfter(step=3))
        try:
            trainer.train()
        except Stop:
            trainer = make(name, model, folder)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    else:
        trainer.train()
    weights = trainable_weights(trainer.model)
    if is_main():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
        save_file(weights, folder / "weights.safetensors")


if __name__ == "__main__":
    for run in sys.argv[3:]:
        carry_out(run, *sys.argv[1:3])
