"""Several processes do what one does: the same losses, rollouts, rounds and weights from the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs

TOLERANCE = 1e-5
EXACT = {"step", "round", "rude/rollouts", "rude/tokens_sampled", "rude/compliance", "tokens_trained"}
TIMES = ("seconds", "per_second", "runtime")


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=len(tiny_tokenizer), initializer_range=0.1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_two(model, tmp_path_factory):
    """The folder of all runs, carried out by two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch(runs.__file__, model, folder, *runs.RUNS)
    return folder


def launch(*command):
    """`accelerate launch` with two processes on a free port; they end with the launcher."""
    here = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, *options, *map(str, command)], env=os.environ | here, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.parametrize("name", runs.RUNS)
def test_two_processes_do_what_one_does(model, of_two, tmp_path, name):
    runs.carry_out(name, model, tmp_path)
    one, two = (json.loads((folder / name / "log.json").read_text()) for folder in (tmp_path, of_two))
    assert len(one) == len(two)
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if key in EXACT:
                assert found[key] == value, key
            elif isinstance(value, float) and not any(time in key for time in TIMES):
                assert found[key] == pytest.approx(value, abs=TOLERANCE), (key, expected)
    assert max(record.get("kl/rude", 0) for record in one) > 1e-4
    weights = [load_file(folder / name / "weights.safetensors") for folder in (tmp_path, of_two)]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight, atol=TOLERANCE, rtol=0)
    for file in sorted((tmp_path / name / "rollouts").iterdir()):
        assert _sampled(file) == _sampled(of_two / name / "rollouts" / file.name)


def _sampled(file: Path):
    return [(row["prompt_ids"], row["completion_ids"], row["complies"]) for row in map(json.loads, file.open())]
