"""Fixtures that tests of several rooms share: tiny real models, and the folder of real texts."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Before anything is imported that might ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).parents[1]

TINY = {
    "llama": {"num_key_value_heads": 2},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "gpt2": {"n_positions": 64},
    "qwen2": {"num_key_value_heads": 1},
}
"""Architectures that tests go through, with what each needs beyond the common size."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real texts and stand-in models; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("BRIDLE_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real texts in {folder}; set BRIDLE_SHARED to run this test")
    return folder


@pytest.fixture(autouse=True)
def _two_threads_and_one_seed():
    torch.set_num_threads(2)
    torch.manual_seed(0)


@pytest.fixture
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
