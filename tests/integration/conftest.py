"""Fixtures of whole runs: the command line, and recipes over tiny models."""

import sys

import pytest
import yaml

from bridle.cli import main


@pytest.fixture
def bridle(capsys, monkeypatch):
    """Runs the command line: bridle("train", recipe) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bridle", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def recipe(tiny_folder, corpus_files, tmp_path):
    """A factory of recipe files over a tiny model: recipe("gpt2", key=value)."""

    def make(model_type="llama", **changes):
        mapping = {
            "model": str(tiny_folder(model_type)),
            "corpus": {name: {"path": str(path)} for name, path in corpus_files.items()},
            "constraints": {"no e": {"type": "regex", "pattern": "e"}},
            "regularisers": {"rude": {"constraint": "no e", "weight": 4.0}},
            "rounds": 2,
            "rollouts_per_round": 32,
            "max_new_tokens": 8,
            "prompt_tokens": [1, 3],
            "auxiliary": {"epochs": 2, "batch_size": 8},
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "max_length": 24,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(mapping), encoding="utf-8")
        return path

    return make
