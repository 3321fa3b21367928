"""Rollouts by vLLM: TRL's class, with its engine replaced by sampling of our own at slightly other probabilities."""

import inspect
from typing import ClassVar

import pytest
import torch
from trl.generation import vllm_generation

from bridle.errors import UserError
from bridle.models.loading import LoraOptions, load_model, load_tokenizer
from bridle.models.sampling import sample
from bridle.training import engine
from bridle.training.config import AuxiliaryOptions, Regulariser
from bridle.training.engine import SamplerOptions
from trainers import NO_E, logged, trainer_of

VLLM = SamplerOptions(engine="vllm", gpu_memory=0.25)
RUDE = {"rude": Regulariser(NO_E, kl_on="rollouts")}
REAL = vllm_generation.VLLMGeneration


class Engine(REAL):
    """TRL's own constructor, without vLLM."""

    made: ClassVar = []
    off = 0.0  # how much likelier the engine says that each of its tokens is, in nats

    def _init_vllm(self):
        self.synced, self.calls = [], []
        Engine.made.append(self)

    def sync_weights(self):
        self.synced.append({name: value.detach().clone() for name, value in self._iter_named_params()})

    def generate(self, prompts, images, num_generations, profiler=None):
        assert (images, num_generations, self.temperature, self.top_p, self.top_k) == (None, 1, 1.0, 1.0, 0)
        self.calls.append(prompts)
        traces, ends = {}, self.generation_kwargs["stop_token_ids"]
        how = {"max_new_tokens": self.max_completion_length, "pad_token_id": 0, "end_token_ids": ends}
        drawn = sample(self.model, prompts, seed=len(self.calls), traces=traces, **how)
        likely = [[[float(one) + self.off] for one in traces[row].log_probs] for row in range(len(drawn))]
        return prompts, drawn, likely, [[[token] for token in ids] for ids in drawn]


@pytest.fixture(autouse=True)
def engine_of_ours(monkeypatch):
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", Engine)
    monkeypatch.setattr(Engine, "made", [])
    engine._running.clear()
    yield
    engine._running.clear()


def test_the_fake_has_the_signature_of_the_real_one():
    assert inspect.signature(Engine.generate).parameters.keys() == inspect.signature(REAL.generate).parameters.keys()
    assert {"sync_weights", "generate", "_init_vllm"} <= vars(REAL).keys()


def test_a_round_samples_the_policy_as_it_is(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder(), tmp_path, RUDE, sampler=VLLM)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    (made,) = Engine.made  # one engine for all rounds
    assert (made.mode, made.gpu_memory_utilization, made.enable_sleep_mode) == ("colocate", 0.25, True)
    assert (made.max_completion_length, [len(prompts) for prompts in made.calls]) == (8, [32, 32])
    first, second = made.synced
    assert all(torch.equal(first[name], value) for name, value in before.items())
    assert not all(torch.equal(second[name], value) for name, value in before.items())
    rollouts = trainer.regularisers[0].rollouts
    assert [rollout.prompt_ids for rollout in rollouts] == made.calls[-1]
    assert all(rollout.complies == ("e" not in rollout.completion) for rollout in rollouts)
    assert logged(trainer, "rude/fit") == ["fitted", "fitted"]


def test_the_model_beneath_adapters_in_half_precision_does_not_drift(tiny_folder):
    folder = str(tiny_folder())
    model, tokenizer = load_model(folder, dtype="bfloat16", lora=LoraOptions(r=2)), load_tokenizer(folder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = {"max_new_tokens": 4, "end_token_ids": [2], "traces": {}, "on_batch": lambda drawn: None}
    engine.sampler(VLLM, tokenizer)(model, [[1, 5, 9]], **how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (synced,) = Engine.made[0].synced
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(synced[f"{name}.weight"], before[f"base_model.model.{name}.base_layer.weight"]), "merged"


@pytest.mark.parametrize("off", [0.0, 0.2])
def test_labels_are_weighted_where_the_engine_differs(tiny_folder, tmp_path, monkeypatch, off):
    monkeypatch.setattr(Engine, "off", off)
    trainer = trainer_of(tiny_folder(), tmp_path, RUDE, sampler=VLLM)
    trainer.train()
    effective = logged(trainer, "rude/sampler_effective")
    if off:
        assert len(effective) == 2
        assert max(effective) < 0.95
    else:
        assert effective == pytest.approx([1.0] * len(effective), abs=1e-3)


def test_a_server_is_asked_at_its_address(tiny_folder, tmp_path):
    options = SamplerOptions(engine="vllm", mode="server", server_url="http://localhost:8000")
    trainer_of(tiny_folder(), tmp_path, RUDE, sampler=options).train()
    assert [(made.mode, made.server_base_url) for made in Engine.made] == [("server", "http://localhost:8000")]


def test_without_vllm_the_error_names_what_to_install(tiny_folder, tmp_path, monkeypatch):
    if vllm_generation.is_vllm_available():
        pytest.skip("vLLM is installed")
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", REAL)
    with pytest.raises(UserError, match=r'engine: vllm needs the package vllm; run pip install "\.\[vllm\]"'):
        trainer_of(tiny_folder(), tmp_path, RUDE, sampler=VLLM).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary": AuxiliaryOptions(seek=0.5)}, "auxiliary.seek: R cannot guide vLLM"),
        ({"schedule": "parallel"}, "schedule: parallel does not sample by vLLM"),
    ],
)
def test_what_it_cannot_do_is_refused(tiny_folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        trainer_of(tiny_folder(), tmp_path, RUDE, sampler=VLLM, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "server"}, "mode: has no effect without engine: vllm"),
        ({"engine": "vllm", "server_url": "http://localhost:1"}, "server_url: has no effect without mode: server"),
        ({"engine": "vllm", "mode": "server"}, "server_url: mode: server needs one"),
        ({"engine": "vllm", "gpu_memory": 2.0}, "gpu_memory: is a share"),
        (
            {"engine": "vllm", "mode": "server", "server_url": "http://localhost:1", "sleep": False},
            "sleep: has no effect without mode: colocate",
        ),
    ],
)
def test_options_that_nothing_reads_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SamplerOptions(**options)
