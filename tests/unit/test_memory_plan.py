"""`bridle plan`: its arithmetic against the measured peaks of small models, and what follows from it."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, PrinterCallback, TrainerCallback

from bridle.models.loading import LoraOptions, load_model
from bridle.recipes.memory_plan import GIB, memory_plan
from bridle.recipes.recipe import load_recipe
from bridle.recipes.run import build_trainer
from bridle.training.config import Regulariser
from bridle.training.engine import SamplerOptions
from conftest import ROOT


@pytest.fixture
def recipe_of(monkeypatch, tmp_path):
    """A factory of recipes over a random Llama."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from subjects import llama, random_recipe

    def make(hidden=128, layers=4, vocabulary=512, length=64, **options):
        path = random_recipe(
            tmp_path, llama(hidden, layers, vocabulary), rows=40, length=length, domains=1, constraints=1
        )
        small = {"rounds": 1, "rollouts_per_round": 16, "max_new_tokens": 8, "max_steps": 3, "save_strategy": "no",
                 "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 8, "max_length": length,
                 "gradient_accumulation_steps": 1, "gradient_checkpointing": False}  # fmt: skip
        return load_recipe(path, small | options)

    return make


class Peak(TrainerCallback):
    """Measures the last update."""

    def __init__(self):
        self.memory = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        from common import peak_memory

        if state.global_step == state.max_steps - 1:
            self.peak = self.memory.enter_context(peak_memory("cpu"))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.memory.close()


def measured(recipe, folder):
    """The peak of an update, in bytes, without what other tests left in memory."""
    from common import peak_memory

    with peak_memory("cpu") as before:
        pass
    clock = Peak()
    trainer = build_trainer(recipe, folder, recipe.read_corpus(), [clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.peak[0] - before[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": {"r": 8}},
        {"gradient_checkpointing": True},
        {"hidden": 256, "layers": 2, "vocabulary": 2048, "length": 32},
        {"length": 256, "per_device_train_batch_size": 4},
    ],
    ids=["full", "lora", "checkpointing", "wide", "long"],
)
def test_it_is_what_is_measured(recipe_of, tmp_path, options):
    recipe = recipe_of(**options)
    found = measured(recipe, tmp_path / "run")
    planned = memory_plan(recipe, device="cpu")
    assert sum(planned.held.values()) + planned.phases["it updates"] == pytest.approx(found, rel=0.15)


def test_what_shards_and_what_does_not(recipe_of):
    recipe = recipe_of()
    whole, sharded = memory_plan(recipe, gpus=4), memory_plan(recipe, gpus=4, shard=True)
    assert sharded.held["weights of the policy, sharded"] == whole.held["weights of the policy"] / 4
    assert sharded.held["gradients"] == whole.held["gradients"] / 4
    assert sharded.held["R"] == whole.held["R"]
    assert sharded.peak < whole.peak


def test_a_frozen_anchor_is_a_copy_of_what_is_trained(recipe_of):
    live, frozen = (
        memory_plan(recipe_of(**{"regularisers.domain-0.anchor": anchor})) for anchor in ("live", "previous")
    )
    assert "anchors" not in live.held
    assert frozen.held["anchors"] == frozen.held["gradients"]
    recipe = recipe_of(**{"regularisers.domain-0.anchor": "previous"})
    recipe.regularisers.update(kept=Regulariser(), again=Regulariser())  # which share the initial one
    assert memory_plan(recipe).held["anchors"] == 2 * frozen.held["anchors"]


@pytest.mark.parametrize("sleep", [True, False])
def test_a_colocated_vllm_takes_its_share(recipe_of, sleep):
    recipe = recipe_of()
    sampler = SamplerOptions(engine="vllm", gpu_memory=0.4, sleep=sleep)
    planned = memory_plan(replace(recipe, training=recipe.training | {"sampler": sampler}), memory=10)
    assert planned.phases["it samples"] == (4 * GIB if sleep else 0)
    assert planned.reserved == (0 if sleep else 4 * GIB)
    assert any("vLLM" in line for line in planned.lines(1, 10)) != sleep


def test_rollouts_that_retention_looks_at_count(recipe_of):
    """They ride in the update, and are drawn."""
    keys = {"regularisers.domain-0.constraint": "retention"}
    corpus, rollouts = (
        memory_plan(recipe_of(**keys, **{"regularisers.domain-0.kl_on": where})) for where in ("corpus", "rollouts")
    )
    assert rollouts.phases["it updates"] > 1.7 * corpus.phases["it updates"]
    assert rollouts.phases.keys() - corpus.phases.keys() == {"it samples"}


def test_a_plan_for_gpus_needs_none(recipe_of):
    """A recipe for GPUs may ask for half precision, which a machine without one refuses to train in."""
    plain, half = (memory_plan(recipe_of(**options)) for options in ({}, {"bf16": False}))
    assert memory_plan(replace(recipe_of(), training=recipe_of().training | {"bf16": True})) == plain
    assert half.phases["it updates"] > plain.phases["it updates"]


def test_a_model_of_seven_billion_takes_no_memory_here(bridle, recipe_of, tmp_path):
    """Its configuration alone is there. Full fine-tuning takes 16 bytes a parameter, adapters hardly 2."""
    folder = tmp_path / "seven"
    LlamaConfig(num_hidden_layers=32, vocab_size=32_000).save_pretrained(folder)
    recipe = recipe_of()
    before = torch.get_default_dtype()
    full, adapters = (
        memory_plan(replace(recipe, model=str(folder), lora=lora, dtype=dtype))
        for lora, dtype in ((None, "float32"), (LoraOptions(), "bfloat16"))
    )
    assert sum(full.held.values()) - full.held["R"] == pytest.approx(16 * 6.738e9, rel=1e-3)
    assert adapters.held["weights of the policy"] == pytest.approx(2 * 6.738e9, rel=0.02)
    assert adapters.needed < 24 < 100 < full.needed
    assert torch.get_default_dtype() == before
    torch.testing.assert_close(torch.ones(2).sum(), torch.tensor(2.0))  # tensors are real again


def test_an_adapter_as_model_is_what_is_trained(recipe_of, tmp_path):
    recipe = recipe_of()
    load_model(recipe.model, lora=LoraOptions(r=8)).save_pretrained(tmp_path / "adapter")
    planned = memory_plan(replace(recipe, model=str(tmp_path / "adapter")))
    assert planned == memory_plan(replace(recipe, lora=LoraOptions(r=8)))


def test_the_command(bridle, recipe_of, tmp_path):
    recipe_of()
    (path,) = tmp_path.glob("*.yaml")
    code, out, err = bridle("plan", path, "--gpus", 2, "--memory", 8)
    assert code == 0, err
    assert out.startswith("each of 2 GPUs\n")
    assert "fits in 8 GiB" in out
    code, out, _ = bridle("plan", path, "--memory", 0.5)
    assert (code, "does not fit in 0.5 GiB" in out) == (1, True)
    code, _, err = bridle("plan", path, "--model", tmp_path / "nowhere")
    assert (code, "cannot load the configuration" in err) == (2, True)
