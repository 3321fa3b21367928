"""What the README shows is what runs: its Python, its recipe, and its commands on the real stand-ins."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification

from bridle.training.recipe import build_recipe
from conftest import ROOT, SENTENCES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def tiny_classifier(tiny_tokenizer, tmp_path):
    """A folder with a random classifier whose labels are LABEL_0 and LABEL_1."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=2,
        initializer_range=1.0,
    )
    folder = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_the_python_example(tiny_folder, tiny_classifier, tmp_path, monkeypatch):
    (code,) = blocks("python")
    for name, stand_in in {
        "huggyllama/llama-7b": tiny_folder(),
        "tomh/toxigen_roberta": tiny_classifier,
        "max_steps=1000, rounds=4": "max_steps=2, rounds=1, rollouts_per_round=64, save_strategy='no'",
    }.items():
        assert name in code
        code = code.replace(name, str(stand_in))
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{text} {number}"} for number in range(8) for text in SENTENCES]
    (tmp_path / "forum.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {}
    exec(code, names)
    rounds = [record for record in names["trainer"].state.log_history if "round" in record]
    assert rounds[0]["forum/rollouts"] == 64


def test_the_recipe_example():
    (text,) = blocks("yaml")
    recipe = build_recipe(yaml.safe_load(text))
    assert recipe.regularisers["forum"].weight == 10
    assert recipe.regularisers["encyclopaedia"].is_retention


def test_the_commands_on_real_text(shared, tmp_path):
    """The first three commands of the README, with fewer steps and rows."""
    commands = next(block for block in blocks("bash") if "recipes/detox-mini.yaml" in block)
    commands = commands.replace("\\\n", " ").replace("runs/detox-mini", str(tmp_path / "run"))
    commands = commands.replace("../shared", str(shared)).replace("rows=90%:", "rows=99%:")
    short = " --max_steps 2 --rounds 1 --rollouts_per_round 64 --per_device_train_batch_size 4"
    lines = [line.strip() for line in commands.splitlines() if line.strip()]
    assert [line.split()[1] for line in lines] == ["train", "generate", "evaluate"]
    lines[0] += short
    main = f'{sys.executable} -c "from bridle.cli import main; main()"'
    for line in lines:
        done = subprocess.run(
            line.replace("bridle", main, 1), shell=True, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "violation rate" in done.stdout
