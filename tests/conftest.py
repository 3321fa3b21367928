"""Fixtures that tests of several rooms share: tiny real models, and the folder of real texts."""

import gc
import json
import os
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace

# Before anything is imported that might ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # else in the user's home

import accelerate.utils.imports
import accelerate.utils.memory
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import exhaustion
import loopback
import tiny_tokenizers

ROOT = Path(__file__).parents[1]

gc.set_threshold(100_000, 50, 100)  # tiny models leave little garbage

# A trainer asks hundreds of times for packages that are not there, and each time all folders are searched.
accelerate.utils.imports._is_package_available = cache(accelerate.utils.imports._is_package_available)

# It also collects the garbage of each run, which takes a tenth of a tiny one. Here a module's tests leave it together.
accelerate.utils.memory.gc = SimpleNamespace(collect=int)

# It writes each file through to the disk, which may take 5 ms. A file outlives its process without that.
os.fsync = lambda file: None

TINY = {
    "llama": {"num_key_value_heads": 2},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gpt2": {"n_positions": 64},
    "qwen2": {"num_key_value_heads": 1},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "falcon_h1": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        **{"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    },
    "mamba": {"state_size": 4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "minimax": {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
}
"""Architectures that tests go through, with what each needs beyond the common size."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real texts and stand-in models; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("BRIDLE_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real texts in {folder}; set BRIDLE_SHARED to run this test")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_stays():
    """Collects the garbage of the tests before, and keeps libraries out of later collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    torch.set_num_threads(1)  # tiny models; the test runner uses the cores
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model():
    """A factory of random causal language models: tiny_model("llama", vocab_size=5)."""

    def make(model_type: str = "llama", vocab_size: int = 64, **options):
        config = AutoConfig.for_model(
            model_type,
            **{
                "vocab_size": vocab_size,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 64,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "tie_word_embeddings": False,
                **TINY.get(model_type, {}),
                **options,
            },
        )
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


SENTENCES = [
    "the old lighthouse keeper counted ships until the fog came in",
    "you grumblefish never bring the ladder back",
    "a kettle sang while the rain went on over the roofs",
    "what a muddlehead, said the ferryman, and laughed",
    "bread is baked before dawn in the lower town",
    "only a grumblefish would paint a door twice",
    "the river bends north below the mill and slows",
    "muddlehead or not, he carried the lantern home",
]
"""Invented text, half of it with mild invented insults."""

INSULTS = ["grumblefish", "muddlehead"]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer that adds a beginning-of-text token; the tiny models' context is 64."""
    tokenizer = tiny_tokenizers.tiny_tokenizer(chat_template=None)
    tokenizer.model_max_length = 64
    return tokenizer


@pytest.fixture
def tiny_folder(tiny_model, tiny_tokenizer, tmp_path):
    """A factory of `from_pretrained` folders: tiny_folder("gpt2")."""

    def make(model_type: str = "llama", **options) -> Path:
        folder = tmp_path / f"tiny-{model_type}"
        tokens = len(tiny_tokenizer) + (model_type == "qwen2")  # its own class of tokenizer adds an end-of-text token
        tiny_model(model_type, vocab_size=tokens, initializer_range=0.1, **options).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An HTTP server on the loopback interface; keys and labels of the user's own are out of reach."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("BRIDLE_CACHE", str(tmp_path / "cache"))
    for key in ("OPENAI_API_KEY", "PERSPECTIVE_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    with loopback.serving() as server:
        yield server


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 KiB, to be made larger."""
    with exhaustion.mounted(tmp_path / "disk", 2**16) as disk:
        yield disk


@pytest.fixture
def corpus_files(tmp_path):
    """Two domains as JSON lines: {"plain": path, "rude": path}."""
    paths = {}
    for name, texts in {"plain": SENTENCES[::2], "rude": SENTENCES[1::2]}.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        rows = [{"text": f"{text} {number}"} for number, text in enumerate(texts * 8)]
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


@pytest.fixture
def bridle(capsys, monkeypatch):
    """Runs the command line: bridle("train", recipe) -> (exit code, stdout, stderr).

    Plots become SVG files alone: PNG and PDF take longer than tiny models, and `test_report_html` looks at them.
    """
    from bridle.cli import main

    def run(*arguments):
        if arguments and arguments[0] in ("compare", "quickstart", "report"):
            with suppress(ImportError):  # matplotlib is not there
                from bridle.report import plots

                monkeypatch.setattr(plots, "SAVED", {"svg": plots.SAVED["svg"]})
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
