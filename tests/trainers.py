"""Trainers of tiny models on the invented corpus, for tests of the update and its schedules."""

import math
import os
import sys
from copy import deepcopy

import psutil
import pytest
from datasets import Dataset

from bridle.constraints import WordList
from bridle.models.loading import load_model, load_tokenizer
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig
from bridle.training.trainer import ConstrainedTrainer
from bridle.training.worker import Done, RegulariserRole
from conftest import SENTENCES


class Letters(WordList):
    """Complies where the text has no letter e: about half of what a tiny random model says."""

    def _score(self, texts):
        return [float("e" not in text) for text in texts]


class Labels(WordList):
    """Labels that differ in some rounds, and all comply in the others.

    Args:
        rounds: which ones, counted from 1 by calls.
    """

    def __init__(self, *rounds):
        super().__init__(["unused"], name="labels")
        self.rounds, self.calls = rounds, 0

    def _score(self, texts):
        self.calls += 1
        return [float(self.calls not in self.rounds or number % 2) for number in range(len(texts))]


NO_E = Letters(["unused"], name="no e")


class ShareOfLetters(WordList):
    """A degree: the share of the text's letters that are not e, which nearly always complies."""

    def _score(self, texts):
        return [1 - text.count("e") / max(1, len(text)) for text in texts]


SHARE_OF_E = ShareOfLetters(["unused"], name="few e")


def corpus(tokens=("plain", "rude")):
    return {
        name: Dataset.from_dict({"text": [f"{text} {i}" for i in range(8) for text in SENTENCES[k::2]]})
        for k, name in enumerate(tokens)
    }


SFT_OPTIONS = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "max_length": 24,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}


def config(folder, **options):
    own = {
        "rounds": 2,
        "rollouts_per_round": 32,
        "max_new_tokens": 8,
        "prompt_tokens": (0, None),  # from any depth, so that the KL leaves no prefix out
        "clipped_bound": 1.0,  # a random model ends hardly any text
        "auxiliary": AuxiliaryOptions(epochs=2, batch_size=8),
    }
    return ConstrainedConfig(output_dir=str(folder), **{**SFT_OPTIONS, **own, **options})


def trainer_of(folder, output, regularisers, rows=None, lora=None, eval_options=None, learn=None, **options):
    return ConstrainedTrainer(
        model=load_model(str(folder), lora=lora),
        args=config(output, **options),
        corpus=rows or corpus(),
        regularisers=regularisers,
        processing_class=load_tokenizer(str(folder)),
        eval_options=eval_options,
        learn=learn,
    )


class LocalWorker:
    """Fits R in this process while the policy waits, with the results of other processes."""

    def __init__(self, regularisers):
        self.role = RegulariserRole(deepcopy(list(regularisers)))

    def submit(self, round_index, weights):
        return Done(self.role.update(round_index, weights))

    def restore(self, states):
        self.role.restore(states)

    def close(self):
        pass


def spoil_loss(trainer, updates):
    """Makes q NaN in the last micro-batch of these updates, counted from 1, and with it the KL and all gradients."""
    regulariser = trainer.regularisers[0]
    target = regulariser.target

    def spoilt(*batch):
        q = target(*batch)
        due = trainer.state.global_step + 1 in updates and trainer.accelerator.sync_gradients
        return (lambda which, logits: q(which, logits) * math.nan) if due else q

    regulariser.target = spoilt


def logged(trainer, key):
    return [record[key] for record in trainer.state.log_history if key in record]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def ray_with(num_cpus):
    """Ray with so many CPUs, for a fixture."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    # The tests' own constraints are found there; more threads would be more than there are CPUs.
    here = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": here},
        _system_config={"worker_niceness": 0},  # else 15: on a busy machine they get next to no time
    )
    yield ray
    ray.shutdown()


def processes(role):
    """This test run's processes that play a role; Ray puts it into their titles."""
    mine = psutil.Process().children(recursive=True)
    return [found for found in mine if found.is_running() and f"ray::{role}" in title(found)]


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""
