"""A run that is killed, wherever it was, goes on to the same weights, bit for bit; a comparison to the same figures."""

import json
import multiprocessing
import random
import signal
import time

import killed
import pytest
import torch
from safetensors.torch import load_file

PLACES = {
    "before anything is written": ("bridle.recipes.run:build_trainer", 1),
    "sampling": ("bridle.training.engine:sample", 2),
    "scoring": ("bridle.training.regulariser:score_rollouts", 1),
    "fitting R": ("bridle.training.regulariser:fit_auxiliary", 2),
    "a step of the policy": ("bridle.training.regulariser:DomainRegulariser.target", 6),
    "writing what was sampled": ("bridle.training.state:write_rollouts", 2),
    "before a checkpoint": ("transformers:Trainer._save_checkpoint", 2),
    "within a checkpoint": ("bridle.training.state:RegulariserState.save", 2),
    "before a checkpoint is called whole": ("bridle.training.checkpointing:sync_files", 1),
    "writing the model": ("bridle.recipes.run:with_names", 1),
}

WITHIN_A_COMPARISON = {
    "before any results": ("bridle.comparison.compare:write_json", 1),
    "before anything is made": ("bridle.comparison.compare:Comparison._complete", 1),
    "measuring base": ("bridle.comparison.measure:Evaluator.generation", 1),
    "making sft, within a checkpoint": ("bridle.training.checkpointing:sync_files", 1),
    "before sft is called made": ("bridle.comparison.cell:write_json", 1),
    "measuring sft": ("bridle.comparison.measure:Evaluator.perplexity", 1),
    "before sft is called measured": ("bridle.comparison.cell:write_results", 1),
    "making constrained-adaptive, fitting R": ("bridle.training.regulariser:fit_auxiliary", 2),
    "measuring constrained-adaptive": ("bridle.comparison.measure:Evaluator.generation", 1),
    "before the results": ("bridle.comparison.compare:comparisons", 1),
    "after the results": ("bridle.comparison.compare:trace_guidance", 1),
}
"""By place the function that is killed as it is called, counted from where the place before it was resumed."""


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have everything imported, and are single-threaded when they begin."""
    context = multiprocessing.get_context("forkserver")
    # Not "killed": before Python 3.13 the server looks for modules where Python does, and silently finds no others.
    context.set_forkserver_preload(["bridle.comparison.compare"])
    return context


@pytest.fixture
def path(recipe):
    regulariser = {"constraint": "no e", "weight": 4.0, "anchor": "previous", "kl_on": "both"}
    saving = {"save_strategy": "steps", "save_steps": 3}
    return str(recipe(max_steps=8, regularisers={"rude": regulariser}, **saving))


@pytest.fixture
def whole(processes, path, tmp_path):
    """The weights of an uninterrupted run, and how many seconds it took."""
    began = time.monotonic()
    finish(processes, killed.run, path, tmp_path / "whole")
    return weights(tmp_path / "whole"), time.monotonic() - began


def finish(processes, what, path, folder):
    process = processes.Process(target=what, args=(path, str(folder)))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def kill(processes, place, what, path, folder):
    """Does it until a function is called for the given time."""
    process = processes.Process(target=killed.until, args=(*place, what, path, str(folder)))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, place


def kill_after(processes, seconds, what, path, folder):
    """Does it for some seconds; returns whether it was still at it."""
    process = processes.Process(target=what, args=(path, str(folder)))
    process.start()
    process.join(seconds)
    alive = process.exitcode is None
    process.kill()
    process.join()
    return alive


def weights(folder):
    files = ("model", "auxiliary")
    return {(file, k): v for file in files for k, v in load_file(folder / file / "model.safetensors").items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


@pytest.mark.timeout(900)
def test_killed_in_every_phase(processes, path, whole, tmp_path):
    for name, place in PLACES.items():
        folder = tmp_path / name
        kill(processes, place, killed.run, path, folder)
        finish(processes, killed.run, path, folder)
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
            kills += kill_after(processes, moments.uniform(0.1, 1.0) * seconds, killed.run, path, folder)
        finish(processes, killed.run, path, folder)
        assert_same(weights(folder), expected)
        runs += 1


@pytest.fixture
def comparison(recipe, corpus_files):
    held_out = {"plain": {"path": str(corpus_files["plain"]), "rows": "0:6"}}
    prompts = {"rude": {"path": str(corpus_files["rude"]), "rows": "0:6", "prompt_tokens": 2}}
    return str(recipe(max_steps=4, evaluation={"prompts": prompts, "perplexity": held_out, "samples": 2}))


@pytest.fixture
def whole_comparison(processes, comparison, tmp_path):
    """What an uninterrupted comparison found, and how many seconds it took."""
    began = time.monotonic()
    finish(processes, killed.compare, comparison, tmp_path / "whole")
    return found_by(tmp_path / "whole"), time.monotonic() - began


def found_by(folder):
    """All that a comparison found, the texts included, but how long it took and where it ran."""
    results = json.loads((folder / "results.json").read_text())
    for method in results["methods"].values():
        method["figures"].get("cost", {}).pop("seconds", None)  # the base's is none
    texts = {path.relative_to(folder): path.read_bytes() for path in folder.glob("*/seed-0/completions.jsonl")}
    assert len(texts) == 3
    return {**results, "environment": None}, texts


@pytest.mark.timeout(300)
def test_a_comparison_killed_at_every_place_finds_the_same(processes, comparison, whole_comparison, tmp_path):
    for place in WITHIN_A_COMPARISON.values():
        kill(processes, place, killed.compare, comparison, tmp_path / "killed")
    finish(processes, killed.compare, comparison, tmp_path / "killed")
    assert found_by(tmp_path / "killed") == whole_comparison[0]


@pytest.mark.timeout(300)
def test_a_comparison_killed_at_random_moments_finds_the_same(processes, comparison, whole_comparison, tmp_path):
    expected, seconds = whole_comparison
    moments = random.Random(1)
    lengths = [moments.uniform(0.1, 0.6) * seconds for _ in range(5)]
    kills = [kill_after(processes, length, killed.compare, comparison, tmp_path / "killed") for length in lengths]
    finish(processes, killed.compare, comparison, tmp_path / "killed")
    assert any(kills)
    assert found_by(tmp_path / "killed") == expected
