"""A run that is killed, wherever it was, goes on to the same weights, bit for bit."""

import multiprocessing
import random
import signal
import time

import killed
import pytest
import torch
from safetensors.torch import load_file

PLACES = {
    "before anything is written": ("bridle.training.run:build_trainer", 1),
    "sampling": ("bridle.training.regulariser:sample", 2),
    "scoring": ("bridle.training.regulariser:DomainRegulariser._score", 1),
    "fitting R": ("bridle.training.regulariser:fit_auxiliary", 2),
    "a step of the policy": ("bridle.training.regulariser:DomainRegulariser.target", 6),
    "writing what was sampled": ("bridle.training.sequential:write_rollouts", 2),
    "before a checkpoint": ("transformers:Trainer._save_checkpoint", 2),
    "within a checkpoint": ("bridle.training.state:RegulariserState.save", 2),
    "before a checkpoint is called whole": ("bridle.training.sequential:sync_files", 1),
    "writing the model": ("bridle.training.run:with_names", 1),
}


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have everything imported, and are single-threaded when they begin."""
    context = multiprocessing.get_context("forkserver")
    # Not "killed": before Python 3.13 the server looks for modules where Python does, and silently finds no others.
    context.set_forkserver_preload(["bridle.training.run"])
    return context


@pytest.fixture
def path(recipe):
    regulariser = {"constraint": "no e", "weight": 4.0, "anchor": "previous", "on": "both"}
    saving = {"save_strategy": "steps", "save_steps": 3}
    return str(recipe(max_steps=8, regularisers={"rude": regulariser}, **saving))


@pytest.fixture
def whole(processes, path, tmp_path):
    """The weights of a run that was left alone, and how many seconds it took."""
    began = time.monotonic()
    finish(processes, path, tmp_path / "whole")
    return weights(tmp_path / "whole"), time.monotonic() - began


def finish(processes, path, folder):
    process = processes.Process(target=killed.run, args=(path, str(folder)))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def weights(folder):
    files = ("model", "auxiliary")
    return {(file, k): v for file in files for k, v in load_file(folder / file / "model.safetensors").items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


@pytest.mark.timeout(900)
def test_killed_in_every_phase(processes, path, whole, tmp_path):
    for name, (where, call) in PLACES.items():
        folder = tmp_path / name
        process = processes.Process(target=killed.run_until, args=(path, str(folder), where, call))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, name
        finish(processes, path, folder)
        assert_same(weights(folder), whole[0])
        steps = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        assert len(steps) == len(set(steps)) == 8, name


@pytest.mark.timeout(900)  # a minute where nothing else runs
def test_killed_at_thirty_random_moments(processes, path, whole, tmp_path):
    expected, seconds = whole
    moments, kills, runs = random.Random(0), 0, 0
    while kills < 30:
        folder = tmp_path / str(runs)
        while not (folder / "auxiliary" / "round-2" / "config.json").exists() and kills < 30:
            process = processes.Process(target=killed.run, args=(path, str(folder)))
            process.start()
            process.join(moments.uniform(0.1, 1.0) * seconds)
            kills += process.exitcode is None
            process.kill()
            process.join()
        finish(processes, path, folder)
        assert_same(weights(folder), expected)
        runs += 1
