"""The two roles of the parallel schedule, each played by several processes on a Ray cluster."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bridle.errors import RunStopped, UserError
from bridle.recipes.recipe import load_recipe
from bridle.recipes.run import build_trainer
from bridle.training.config import ParallelOptions, Regulariser
from bridle.training.state import trainable_weights
from trainers import NO_E, LocalWorker, processes, ray_with, trainer_of

PARALLEL = {"schedule": "parallel", "rounds": 3, "max_steps": 6, "optim": "sgd", "learning_rate": 0.5}
SHARED_OUT = {"parallel.policy_workers": 2, "parallel.regulariser_workers": 2, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def ray():
    """Ray with four CPUs, for all tests of this file."""
    yield from ray_with(4)


def test_two_workers_for_each_role_do_what_one_process_does(ray, recipe, tmp_path):
    from bridle.recipes.ray_launcher import train_in_roles

    path = recipe(**PARALLEL)
    one = load_recipe(path)
    trainer = build_trainer(one, tmp_path / "one", one.read_corpus())
    trainer.schedule.worker = LocalWorker(trainer.regularisers)
    trainer.train()

    train_in_roles(load_recipe(path, SHARED_OUT), tmp_path / "two")
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in trainer.state.log_history if "ce" in record]
    assert len(records) == 9
    for expected, found in zip(records, (record for record in two if "ce" in record), strict=True):
        for key in {"loss", "ce", "kl/rude", "rude/compliance", "rude/r_bce", "rude/tokens_sampled"} & expected.keys():
            assert found[key] == pytest.approx(expected[key], abs=1e-5), key
    assert max(record.get("kl/rude", 0) for record in two) > 1e-4
    weights = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for name, weight in trainable_weights(trainer.model).items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0)


def test_processes_that_were_started_already_are_refused(recipe, tmp_path, monkeypatch):
    from bridle.recipes.ray_launcher import train_in_roles

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"starts its processes itself.*parallel\.policy_workers"):
        train_in_roles(load_recipe(recipe(**PARALLEL)), tmp_path)


def test_a_role_without_workers():
    with pytest.raises(UserError, match="regulariser_workers: input should be greater than 0, not 0"):
        ParallelOptions(regulariser_workers=0)


def test_one_of_two_workers_is_killed(ray, tiny_folder, tmp_path):
    options = {"schedule": "parallel", "rounds": 4, "max_steps": 8, "parallel": ParallelOptions(regulariser_workers=2)}
    trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, **options)
    refresh = trainer.schedule._refresh

    def kill_in_round_two(index, log):
        refresh(index, log)
        if index == 2:
            workers = processes("RegulariserActor")
            assert len(workers) == 2
            max(workers, key=lambda worker: worker.pid).kill()

    trainer.schedule._refresh = kill_in_round_two
    with pytest.raises(RunStopped, match=r"the process of the regulariser, in round 2, died .*--resume"):
        trainer.train()
    assert trainer.state.global_step <= 4, "no later than the end of the round"
