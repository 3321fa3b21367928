"""Files that would run code or write elsewhere do neither, and errors name a damaged checkpoint."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridle.constraints import Classifier
from bridle.errors import UserError
from bridle.models.auxiliary import AuxiliaryModel, load_auxiliary, new_auxiliary
from bridle.models.loading import LoraOptions, load_model, load_tokenizer
from bridle.training.trainer import ConstrainedTrainer
from trainers import config, corpus

NAMES = ["../../outside", "/tmp/outside-of-bridle", "..", "a/b", "a\\b", "nul\0", "x" * 300, "\ud800", "", "new\nline"]


class Making:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trace(tmp_path):
    """A folder that is there if any code has run."""
    yield tmp_path / "code has run"
    assert not (tmp_path / "code has run").exists()


def refused(act):
    with pytest.raises(UserError) as caught:
        act()
    return str(caught.value)


class TestCode:
    def foreign(self, folder, trace, **names):
        """Makes a model's folder one that brings code of its own."""
        (folder / "foreign.py").write_text(
            f"import os\nos.mkdir({str(trace)!r})\nclass Model: pass\nclass Config: pass\n"
        )
        path = folder / "config.json"
        code = {"AutoConfig": "foreign.Config", **dict.fromkeys(names, "foreign.Model")}
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "foreign", "auto_map": code}))
        return str(folder)

    def test_of_a_model(self, tiny_folder, trace):
        folder = self.foreign(tiny_folder(), trace, AutoModelForCausalLM=True)
        assert "needs code of its own, which Bridle does not run" in refused(lambda: load_model(folder))

    def test_of_a_tokenizer(self, tiny_folder, trace):
        folder = Path(self.foreign(tiny_folder(), trace))
        settings = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["foreign.Model", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        assert "cannot load the tokenizer" in refused(lambda: load_tokenizer(str(folder)))

    def test_of_a_classifier(self, tiny_folder, trace):
        folder = self.foreign(tiny_folder(), trace, AutoModelForSequenceClassification=True)
        assert "its network: it needs code of its own" in refused(Classifier(folder, "rude").load)

    def test_of_an_auxiliary(self, tiny_folder, trace, tmp_path):
        model = load_model(str(tiny_folder()))
        new_auxiliary(model, own_network=True).save_pretrained(tmp_path / "R")
        path = tmp_path / "R" / "config.json"
        found = json.loads(path.read_text())
        found["network"]["auto_map"] = {"AutoModel": f"{self.foreign(tiny_folder(), trace)}--foreign.Model"}
        path.write_text(json.dumps(found))
        assert isinstance(load_auxiliary(tmp_path / "R", model), AuxiliaryModel), "the network that transformers knows"

    def test_a_recipe_cannot_ask_for_it(self, bridle, recipe, tmp_path):
        code, _, err = bridle("train", recipe(trust_remote_code=True), "--output_dir", tmp_path / "run")
        assert code == 2
        assert "trust_remote_code: Bridle runs no code that comes with a model" in err
        assert not (tmp_path / "run").exists()


class TestPickles:
    def test_of_an_adapter(self, tiny_folder, trace, tmp_path):
        load_model(str(tiny_folder()), lora=LoraOptions(r=2)).save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
        torch.save(Making(trace), tmp_path / "adapter" / "adapter_model.bin")
        message = refused(lambda: load_model(str(tmp_path / "adapter")))
        assert "adapter: cannot load the adapter: its weights are pickled; convert them" in message

    def test_of_an_auxiliary(self, tiny_folder, trace, tmp_path):
        model = load_model(str(tiny_folder()))
        new_auxiliary(model).save_pretrained(tmp_path / "R")
        (tmp_path / "R" / "model.safetensors").unlink()
        torch.save(Making(trace), tmp_path / "R" / "pytorch_model.bin")
        message = refused(lambda: load_auxiliary(tmp_path / "R", model))
        assert "R: cannot load the auxiliary: its weights are pickled; convert them" in message

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_of_a_checkpoint(self, bridle, recipe, tmp_path, trace, name):
        path = cut_off(bridle, recipe, tmp_path / "run")
        torch.save(Making(trace), tmp_path / "run" / "checkpoint-2" / name)
        assert "checkpoint-2: cannot be read" in resumed(bridle, path, tmp_path / "run")


def cut_off(bridle, recipe, folder):
    """A run that died after its checkpoint of step 2; returns its recipe."""
    path = recipe()
    code, _, err = bridle("train", path, "--output_dir", folder)
    assert code == 0, err
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoint-4")
    return path


def resumed(bridle, path, folder):
    """The line that resuming a run ends in."""
    code, _, err = bridle("train", path, "--output_dir", folder, "--resume")
    (line,) = [line for line in err.splitlines() if line.startswith("bridle: ")]
    assert code == 2
    assert "Traceback" not in err
    assert not (folder / "model").exists()
    return line


DAMAGES = {
    "checkpoint-2/trainer_state.json": b'{"global_step": 2',
    "checkpoint-2/model.safetensors": b"\x10\0\0\0\0\0\0\0{",
    "checkpoint-2/optimizer.pt": b"PK\x03\x04",
    "checkpoint-2/scheduler.pt": b"",
    "checkpoint-2/rng_state.pth": b"\x80\x02",
    "checkpoint-2/schedule.json": b'{"round": "one"}',
    "checkpoint-2/regularisers/rude/state.json": b"[]",
    "checkpoint-2/regularisers/rude/rollouts.jsonl": b"{}\n",
    "checkpoint-2/regularisers/rude/auxiliary.safetensors": None,
    "metrics.jsonl": b'{"step": 1}\n{"step": "two"}\n',
    "recipe.yaml": b"model: [",
}
"""By file of a run what it is damaged to; None is no file."""


def test_a_damaged_run_is_told_by_its_file(bridle, recipe, tmp_path):
    path = cut_off(bridle, recipe, tmp_path / "run")
    for number, (name, content) in enumerate(DAMAGES.items()):
        folder = shutil.copytree(tmp_path / "run", tmp_path / f"damaged-{number}")
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        assert str(folder / name.split("/")[0]) in resumed(bridle, path, folder), name


@pytest.mark.parametrize("name", NAMES)
def test_a_domain_writes_nowhere_but_below_its_run(name, bridle, recipe, corpus_files, tmp_path, tiny_folder):
    domains = {name: {"path": str(corpus_files["rude"])}, "plain": {"path": str(corpus_files["plain"])}}
    regularisers = {domain: {"constraint": "no e"} for domain in domains}
    path = recipe(corpus=domains, regularisers=regularisers, rounds=1, max_steps=1)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = bridle("train", path, "--output_dir", tmp_path / "run" / "inner")
    assert code == 2
    assert "corpus" in err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="names files"):
        ConstrainedTrainer(load_model(str(tiny_folder())), config(tmp_path / "run"), {name: corpus()["rude"]}, {})


def test_half_a_model_is_none(tiny_folder):
    folder = tiny_folder()
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(lambda: load_model(str(folder)))
    assert "the model is incomplete: its weights lack 'model.layers.1.mlp.up_proj.weight'" in message


def test_half_an_adapter_is_none(tiny_folder, tmp_path):
    load_model(str(tiny_folder()), lora=LoraOptions(r=2)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if "layers.1." not in name}, file)
    with pytest.raises(UserError, match="cannot load the adapter: Found missing adapter keys"):
        load_model(str(tmp_path / "adapter"))


def test_half_an_auxiliary_is_none(tiny_folder, tmp_path):
    model = load_model(str(tiny_folder()))
    new_auxiliary(model).save_pretrained(tmp_path / "R")
    weights = load_file(tmp_path / "R" / "model.safetensors")
    del weights["head.weight"]
    save_file(weights, tmp_path / "R" / "model.safetensors", metadata={"format": "pt"})
    assert "the auxiliary is incomplete: its weights lack 'head.weight'" in refused(
        lambda: load_auxiliary(tmp_path / "R", model)
    )
