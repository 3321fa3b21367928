"""What a run says on a terminal: its rounds, and nothing that a user can do nothing about."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from warm import Warm

ROOM = {"COLUMNS": "100", "NO_COLOR": "1", "FORCE_COLOR": "1", "TRANSFORMERS_VERBOSITY": "warning"}


@pytest.fixture
def warm():
    warm = Warm({**os.environ, **ROOM})
    yield warm
    warm.close()


def test_a_run_says_its_rounds_and_nothing_else(warm, recipe, tiny_folder, tmp_path):
    """On a model with everything that libraries warn of and that is as it should be."""
    path = recipe(model_type="llama")
    mapping = yaml.safe_load(path.read_text())
    model = tiny_folder("llama", tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors")
    assert "lm_head.weight" not in weights, "it is tied to the embeddings"
    weights["vision.weight"] = weights["model.norm.weight"].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    settings = {"temperature": 0.6, "top_p": 0.9, "bos_token_id": 1, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(settings))
    path.write_text(yaml.safe_dump({**mapping, "model": str(model)}))

    assert rounds(warm, path, tmp_path / "run") == [1, 2]
    assert json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())["temperature"] == 0.6
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert rounds(warm, path, tmp_path / "run", "--resume") == [2]


def rounds(warm: Warm, path: Path, folder: Path, *options: str) -> list[int]:
    """The rounds of a run; every line of stderr must be one, a warning in one, or the progress of a slow machine."""
    done = warm.run("-m", "bridle", "train", path, "--output_dir", folder, *options, folder=path.parent)
    assert done.returncode == 0, done.stderr
    lines = [
        line for line in done.stderr.splitlines() if not line.startswith(("WARNING: round ", "training the policy: "))
    ]
    assert all(line.startswith("round ") and len(line) <= 100 and "\x1b" not in line for line in lines), done.stderr
    assert done.stdout.startswith("The model is in")
    return [int(line.split()[1].partition("/")[0]) for line in lines]
