"""Several processes do what one does: the same losses, rollouts, rounds and weights from the same global batch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
import yaml
from safetensors.torch import load_file

TOLERANCE = 1e-5
EXACT = {"step", "round", "rude/rollouts", "rude/tokens_sampled", "rude/compliance", "tokens_trained"}
APART = ("seconds", "per_second", "runtime", "num_tokens", "train_loss")
"""Times; and what the trainer counts anew when a run is resumed."""


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=len(tiny_tokenizer), initializer_range=0.1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_two(model, tmp_path_factory):
    """The folder of all runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch(runs.__file__, model, folder, *runs.RUNS)
    return folder


def launch(*command, how=("--multi_gpu",)):
    """`accelerate launch` with two processes on a free port; with `--cpu` it would start one, whatever it is asked."""
    here = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", "2"]
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
            elif isinstance(value, float) and not any(part in key for part in APART):
                relative = TOLERANCE if key == "grad_norm" else 0
                assert found[key] == pytest.approx(value, abs=TOLERANCE, rel=relative, nan_ok=True), (key, expected)
    assert max(filter(math.isfinite, (record.get("kl/rude", 0) for record in one))) > 1e-4
    lost = runs.RUNS[name].get("lost")
    assert [record["step"] for record in two if "skipped_in_a_row" in record] == ([lost] if lost else [])
    weights = [load_file(folder / name / "weights.safetensors") for folder in (tmp_path, of_two)]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight, atol=TOLERANCE, rtol=0)
    for file in sorted((tmp_path / name / "rollouts").iterdir()):
        assert _sampled(file) == _sampled(of_two / name / "rollouts" / file.name)


def test_a_recipe_leaves_the_same_files(model, of_two, tmp_path):
    runs.carry_out_recipe(model, tmp_path)
    one, two = (folder / "recipe" for folder in (tmp_path, of_two))
    kinds = ("*.safetensors", "*.jsonl", "*.json", "*.yaml", "*.md")
    assert _files(one, kinds) == _files(two, kinds)
    # AdamW, which fits R, makes whole steps out of gradients that are only rounding.
    for name, tolerance in {"model": TOLERANCE, "auxiliary": 1e-3, "auxiliary/round-1": 1e-3}.items():
        weights = [load_file(folder / name / "model.safetensors") for folder in (one, two)]
        assert weights[0].keys() == weights[1].keys()
        for key, weight in weights[0].items():
            torch.testing.assert_close(weights[1][key], weight, atol=tolerance, rtol=0)
    steps = [[json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] for folder in (one, two)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_does_what_one_process_does(bridle, recipe, tmp_path, stage):
    """ZeRO-1 and ZeRO-2, on CPUs with gloo."""
    pytest.importorskip("deepspeed", reason="the package deepspeed is not installed")
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "use_cpu": True}
    config["deepspeed_config"] = {"zero_stage": stage, "gradient_accumulation_steps": 1, "zero3_init_flag": False}
    (tmp_path / "deepspeed.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    path = recipe(use_cpu=True, per_device_train_batch_size=2, save_strategy="no", report_to="none")
    how = ("--config_file", str(tmp_path / "deepspeed.yaml"))
    launch("-m", "bridle", "train", path, "--output_dir", tmp_path / "two", how=how)
    code, _, err = bridle("train", path, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps", 2)
    assert code == 0, err
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, atol=TOLERANCE, rtol=0)


def _sampled(file: Path):
    return [(row["prompt_ids"], row["completion_ids"], row["complies"]) for row in map(json.loads, file.open())]


def _files(folder: Path, kinds):
    found = {str(path.relative_to(folder)) for kind in kinds for path in folder.rglob(kind)}
    return {file for file in found if not file.startswith("checkpoint-")}  # `accelerate` saves shards in its own way
