"""Reinforcement learning with TRL's trainers: what it learns, when it stops, how it goes on, what it leaves behind."""

import copy
import os
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from bridle.baselines.reinforcement import HISTORY, ReinforcementOptions, reinforce
from bridle.constraints import Constraint, Regex
from bridle.errors import UserError
from bridle.models.loading import load_model
from bridle.utils.interruption import Interrupted, catching_signals

VOWELS = Regex("[aeiou]", name="no vowels")
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
OPTIONS = {"learning_rate": 1e-2, "batch_size": 8, "beta": 0.01}


class Fixed(Constraint):
    """Gives every text in turn the next of some scores."""

    name = "fixed"

    def __init__(self, *scores: float | None):
        self.scores = scores

    def _score(self, texts):
        return [self.scores[index % len(self.scores)] for index in range(len(texts))]


@pytest.fixture
def make(tiny_model, tiny_tokenizer):
    """A factory of equal tiny models of some architecture."""
    return lambda kind="llama", **options: tiny_model(kind, vocab_size=len(tiny_tokenizer), **options)


@pytest.fixture
def run(tiny_tokenizer, tmp_path):
    """Reinforces a model for a few updates; options and arguments have small defaults."""
    prompts = [tiny_tokenizer(text)["input_ids"] for text in ("The old", "A", "You never", "Every morning")]

    def reinforced(model, constraint=VOWELS, *, folder="run", max_steps=3, options=None, **arguments):
        settings = {"max_new_tokens": 6, "seconds": None, "seed": 0, "prompts": prompts, **arguments}
        chosen = ReinforcementOptions(**{**OPTIONS, "max_steps": max_steps, **(options or {})})
        given = settings.pop("prompts")
        return reinforce(model, tiny_tokenizer, given, constraint, chosen, output_dir=tmp_path / folder, **settings)

    return reinforced


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float) -> bool:
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], **{"rtol": 0, "atol": 0, **tolerance}) for name in first)


def rewards(report: dict, steps: slice) -> float:
    values = [record["reward"] for record in report["history"][steps]]
    return sum(values) / len(values)


# ------------------------------------------------------------------ what it learns


def test_a_constraint_that_reads_prompts_gets_the_prompt_of_each_completion(run, make):
    constraint, asked = Fixed(0.2, 0.8), []
    constraint.reads = "chat"
    constraint._score = lambda chats: asked.extend(chats) or [index % 2 for index in range(len(chats))]
    run(make(), constraint, max_steps=1)
    assert len(asked) == OPTIONS["batch_size"]
    assert {chat[0]["content"] for chat in asked} <= {"The old", "A", "You never", "Every morning"}
    assert all([turn["role"] for turn in chat] == ["user", "assistant"] for chat in asked)


@pytest.mark.parametrize(("algorithm", "kind"), [("rloo", "llama"), ("grpo", "gpt2")])
def test_the_reward_rises(run, make, algorithm, kind):
    report = run(make(kind), max_steps=16, options={"algorithm": algorithm, "batch_size": 32})
    assert rewards(report, slice(-4, None)) > rewards(report, slice(4)) + 0.25
    assert report["steps"] == len(report["history"]) == 16
    assert report["history"][-1].keys() == set(HISTORY)
    assert report["kl"] > 0
    assert report["stopped_because"] == "steps"


def test_a_strong_penalty_holds_the_model_to_its_start(run, make):
    free, held = (run(make(), max_steps=12, folder=str(beta), options={"beta": beta}) for beta in (0.0, 1.0))
    assert free["kl"] is None  # not measured, and not 0
    assert abs(held["kl"]) < 0.1
    assert held["reward"] < free["reward"]


def test_soft_reward_is_the_constraints_value(run, make):
    constraint = Fixed(0.2, 0.4)
    assert run(make(), constraint, max_steps=1, options={"soft_reward": True})["reward"] == pytest.approx(0.3)
    assert run(make(), constraint, max_steps=1, folder="hard")["reward"] == 0


def test_the_same_seed_gives_the_same_weights(run, make):
    models = [make() for _ in range(3)]
    for index, model in enumerate(models):
        run(model, folder=str(index), seed=index // 2, max_steps=2)
    first, second, other = map(weights, models)
    assert same(first, second)
    assert not same(first, other)


def test_a_batch_may_be_cut_in_any_way(run, make):
    whole, parts = make(), make()
    run(whole, folder="whole")
    run(parts, folder="parts", options={"micro_batch_size": 2})
    assert same(weights(whole), weights(parts), atol=1e-4)
    assert not same(weights(whole), weights(make()), atol=1e-4)


# ------------------------------------------------------------------ missing scores


def test_missing_rewards_move_nothing(run, make):
    model, before = make(), weights(make())
    report = run(model, Fixed(None), max_steps=2)
    assert same(weights(model), before)
    assert report["missing"] == 16
    assert report["reward"] is None
    assert [record["reward"] for record in report["history"]] == [None, None]


def test_a_missing_reward_is_no_number(run, make, caplog, capfd):
    model, before = make(), weights(make())
    report = run(model, Fixed(1.0, None, 1.0, None), max_steps=2, options={"beta": 0.0})
    assert report["reward"] == 1.0
    assert report["missing"] == 8
    assert same(weights(model), before)  # as a 0, it would have made the others look good
    assert "returned None" not in caplog.text + capfd.readouterr().err


# ------------------------------------------------------------------ when it stops, and how it goes on


def test_the_time_is_up_within_one_update(run, make):
    report = run(make(), max_steps=50, seconds=0.0)
    assert report["steps"] == 1
    assert report["stopped_because"] == "time"
    assert report["checkpoint"] == "checkpoint-1"


def test_time_used_before_a_resumption_counts(run, make):
    before = run(make(), max_steps=2, seconds=60.0)
    after = run(make(), max_steps=50, seconds=before["seconds"] + 1e-3, resume=True)
    assert after["steps"] == 3
    assert after["seconds"] > before["seconds"]
    assert after["stopped_because"] == "time"
    assert after["history"][:2] == before["history"]


def test_it_stops_once_the_reward_no_longer_rises(run, make):
    options = {"window": 3, "tolerance": 0.01}
    report = run(make(), Fixed(1.0), max_steps=50, options=options)
    assert report["steps"] == 6
    assert report["stopped_because"] == "converged"
    timed = run(make(), Fixed(1.0), max_steps=8, options=options, seconds=60.0, folder="timed")
    assert timed["steps"] == 8  # who gets a time gets all of it


class Signal(TrainerCallback):
    """Sends a signal during the second update."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_leaves_a_checkpoint_from_which_it_goes_on(run, make):
    through, stopped = make(), make()
    run(through, max_steps=4, folder="through")
    with catching_signals(), pytest.raises(Interrupted):
        run(stopped, max_steps=4, callbacks=[Signal()])
    resumed = make()
    report = run(resumed, max_steps=4, resume=True)
    assert report["steps"] == 4
    assert len(report["history"]) == 4
    assert same(weights(resumed), weights(through))


@pytest.mark.parametrize("adapter", [False, True])
def test_going_on_is_as_if_never_stopped(run, make, adapter, tmp_path):
    def model():
        torch.manual_seed(1)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(make(), lora) if adapter else make()

    through, begun, resumed, elsewhere = (model() for _ in range(4))
    run(through, max_steps=4, folder="through")
    run(begun, max_steps=2, folder="begun")
    checkpoint = tmp_path / "begun" / "checkpoint-2"
    run(elsewhere, max_steps=4, folder="elsewhere", resume=True, resume_from=checkpoint)
    run(resumed, max_steps=4, folder="begun", resume=True)
    assert not same(weights(begun), weights(through))
    assert same(weights(resumed), weights(through))
    assert same(weights(elsewhere), weights(through))


@pytest.mark.parametrize("end", [{"seconds": 0.0}, {"options": {"window": 2, "tolerance": 1.0}}, {"max_steps": 2}])
def test_a_run_that_has_ended_takes_no_further_update(run, make, end):
    ended, resumed = make(), make()
    before = run(ended, **end)
    assert run(resumed, **end, resume=True) == before
    assert same(weights(resumed), weights(ended))


# ------------------------------------------------------------------ what it takes and leaves behind


def test_the_model_is_given_back_as_it_came_but_for_its_weights(run, make, tmp_path):
    model = make()
    model.generation_config.top_k = 3
    before, name = weights(model), model.config._name_or_path
    run(model)
    assert not same(weights(model), before)
    assert model.generation_config.top_k == 3
    assert model.config._name_or_path == name
    assert not model.training
    ids = torch.tensor([[1, 5, 9]])
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.get_output_embeddings().weight)
    assert twin(ids).logits.abs().max() == 0  # a twin of its own
    assert model(ids).logits.abs().max() > 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]


def test_the_reference_is_the_model_as_it_is_and_not_as_it_was_loaded(run, tiny_folder):
    model = load_model(str(tiny_folder()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    first, *_, last = run(model)["history"]
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(last["kl"]) > 1e-3


def test_an_adapter_that_was_loaded_is_trained_and_keeps_its_reference_apart(run, make, tmp_path):
    get_peft_model(make(), LORA).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(make(), str(tmp_path / "adapter"))
    before = weights(model)
    report = run(model)
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora" in name for name in moved)
    assert after.keys() == before.keys()  # TRL's copy is gone
    assert report["history"][0]["kl"] == pytest.approx(0, abs=1e-5)


def test_prompts_are_the_token_ids_given(run, make, tiny_tokenizer):
    spelt = [1, *tiny_tokenizer.convert_tokens_to_ids(list("kettle"))]
    assert tiny_tokenizer(tiny_tokenizer.decode(spelt[1:]))["input_ids"] != spelt
    report = run(make(), prompts=[spelt, spelt], max_new_tokens=1, max_steps=2)
    assert report["tokens"] == 2 * 8 * (len(spelt) + 1)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_gpu_is_left_alone_if_asked(monkeypatch, tmp_path, algorithm):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = ReinforcementOptions(algorithm=algorithm).config(tmp_path, 0, 6, use_cpu=True)
    assert config.use_cpu
    assert not config.bf16
    assert not config.gradient_checkpointing


def test_mistakes_are_named(run, make):
    with pytest.raises(UserError, match="num_generations: 3 must be at least 2 and divide batch_size=8"):
        ReinforcementOptions(num_generations=3, batch_size=8)
    with pytest.raises(UserError, match="micro_batch_size: 3 must divide batch_size=8"):
        ReinforcementOptions(micro_batch_size=3, batch_size=8)
    with pytest.raises(UserError, match="algorithm: 'ppo' is unknown; use rloo or grpo"):
        ReinforcementOptions(algorithm="ppo")
    with pytest.raises(UserError, match="prompts: there are none"):
        run(make(), prompts=[])
    with pytest.raises(UserError, match=r"prompts\[0\]: the prompt has 60 tokens"):
        run(make(), prompts=[[1] * 60, [1]])
