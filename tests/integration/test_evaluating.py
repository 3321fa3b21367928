"""Evaluation on held-out rows while a run goes on: what it measures, that it disturbs nothing, the best checkpoint."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from bridle.errors import RunStopped, UserError
from bridle.models.auxiliary import AuxiliaryModel, fingerprint
from bridle.training.config import BestOptions, EvalOptions, Regulariser
from bridle.training.evaluating import best_evaluation, has_waited, hold_out
from conftest import SENTENCES
from trainers import NO_E, corpus, logged, trainer_of, weights

HELD_OUT = {"plain": Dataset.from_dict({"text": SENTENCES[:6]}), "rude": Dataset.from_dict({"text": SENTENCES[2:]})}


ALIEN = {"rude": Dataset.from_dict({"text": ["ZZ9 qqq 7#7#7 XX", "%% JJJ 0x0x0x", "QWVX 123123 @@@", "{}{}{} KKK"]})}
"""What a model says ever less likely as it learns the corpus."""


class Restless(type(NO_E)):
    """Draws from every generator of random numbers at each score."""

    def _score(self, texts):
        torch.rand(1), random.random(), np.random.rand()
        return super()._score(texts)


@pytest.fixture
def trained(tiny_folder, tmp_path):
    folder = tiny_folder("gpt2", resid_pdrop=0.2)  # dropout draws from torch's generator

    def train(name, resume=None, **options):
        trainer = trainer_of(
            folder, tmp_path / name, {"rude": Regulariser(NO_E)}, **{"save_strategy": "steps", **options}
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def evaluations(trainer):
    return [record for record in trainer.state.log_history if "eval_violation" in record]


def test_no_more_completions_than_asked_for_of_the_domains_in_turn(trained):
    held_out = {name: Dataset.from_dict({"text": SENTENCES[at : at + 3]}) for name, at in (("plain", 0), ("rude", 3))}
    options = EvalOptions(corpus=held_out, constraints=[NO_E], domains=["plain", "rude"], completions=3)
    trainer = trained("few", max_steps=1, rounds=1, eval_options=options)
    (record,) = evaluations(trainer)
    assert record["eval_completions"] == len(trainer.eval_prompts) == 3
    of_plain = [any(row.startswith(prompt.text) for row in SENTENCES[:3]) for prompt in trainer.eval_prompts]
    assert of_plain == [True, False, True]


def test_each_round_is_measured_and_training_is_not_disturbed(trained):
    plain = trained("plain", max_steps=6, rounds=3)
    measured = trained(
        "measured",
        max_steps=6,
        rounds=3,
        eval_options=EvalOptions(corpus=HELD_OUT, constraints=[NO_E, Restless(["unused"], name="restless")]),
    )
    assert [record["step"] for record in evaluations(measured)] == [2, 4, 6]
    for record in evaluations(measured):
        assert record["eval_violation/no e"] == record["eval_violation/restless"] == record["eval_violation"]
        assert record["eval_violation_low/no e"] <= record["eval_violation"] <= record["eval_violation_high/no e"]
        assert record["eval_missing/no e"] == 0
        assert 1 < record["eval_completions"] <= len(HELD_OUT["rude"]), "prompts of the regularised domain, each once"
    losses = [logged(measured, f"eval_{name}_loss") for name in ("plain", "rude")]
    assert logged(measured, "eval_loss") == pytest.approx([sum(pair) / 2 for pair in zip(*losses, strict=True)])
    assert "eval_loss" not in {key for record in plain.state.log_history for key in record}
    assert all(map(torch.equal, weights(plain).values(), weights(measured).values()))
    trained_on = ("loss", "ce", "kl/rude", "entropy", "mean_token_accuracy", "num_tokens")
    assert all(logged(plain, key) == logged(measured, key) for key in trained_on)


def test_the_best_checkpoint_is_kept_and_a_resumed_run_finds_the_same(trained, tmp_path):
    def options(bound, patience=None):
        best = BestOptions(bound, patience)
        return {
            "max_steps": 8,
            "rounds": 4,
            "learning_rate": 0.05,
            "keep_last": 1,
            "eval_options": EvalOptions(corpus=ALIEN, best=best),
        }

    every = trained("every", **options(1.0) | {"keep_last": None})
    losses = logged(every, "eval_loss")
    best = losses.index(min(losses))
    assert best < 3, "the last is not the best here"
    (told,) = [record for record in every.state.log_history if "best_step" in record]
    assert told["best_step"] == 2 * (best + 1)
    assert told["best_loss"] == min(losses)
    kept = load_file(tmp_path / "every" / f"checkpoint-{told['best_step']}" / "model.safetensors")
    assert all(torch.equal(weight, kept[name]) for name, weight in weights(every).items() if name in kept)
    auxiliary = AuxiliaryModel.from_pretrained(tmp_path / "every" / "auxiliary")
    of_best = tmp_path / "every" / f"checkpoint-{told['best_step']}" / "regularisers" / "rude" / "auxiliary.safetensors"
    assert all(torch.equal(auxiliary.state_dict()[name], weight) for name, weight in load_file(of_best).items())
    assert auxiliary.config.provenance["trained_model"] == fingerprint(every.model), "R is of the model that is kept"

    rates = logged(every, "eval_violation")
    allowed = [i for i, rate in enumerate(rates) if rate <= min(rates)]
    strict = trained("strict", **options(min(rates)))
    assert logged(strict, "best_step") == [2 * (min(allowed, key=losses.__getitem__) + 1)]
    assert logged(strict, "eval_loss") == losses, "the rule chooses and does not train"

    none = trained("none", **options(0.0) if min(rates) else options(0.0) | {"max_steps": 4})
    if min(rates):
        assert not logged(none, "best_step")
        assert "no violation rate was 0.0 or less" in logged(none, "warnings")[-1][0]

    early = trained("early", **options(1.0, patience=1))
    steps = [record["step"] for record in evaluations(early)]
    assert steps[-1] == 2 * (next(i for i in range(1, 4) if losses[i] >= min(losses[:i])) + 1) < 8
    assert early.state.global_step == steps[-1]

    again = trained("early", resume=str(tmp_path / "early" / f"checkpoint-{steps[-1]}"), **options(1.0, patience=1))
    assert again.state.global_step == steps[-1], "it takes no further step"
    assert all(map(torch.equal, weights(early).values(), weights(again).values()))

    whole = trained("whole", **options(1.0) | {"keep_last": None})
    resumed = trained("whole", resume=str(tmp_path / "whole" / "checkpoint-4"), **options(1.0))
    assert logged(whole, "eval_loss") == logged(resumed, "eval_loss") == losses
    assert all(map(torch.equal, weights(whole).values(), weights(resumed).values()))


def test_the_best_checkpoint_outlives_a_move_of_the_run(trained, tmp_path):
    options = {"max_steps": 8, "rounds": 4, "learning_rate": 0.05}
    options["eval_options"] = EvalOptions(corpus=ALIEN, best=BestOptions(1.0))
    whole = trained("here", **options)
    (best,) = logged(whole, "best_step")
    assert best < 6
    (tmp_path / "here").rename(tmp_path / "there")
    middle = str(tmp_path / "there" / "checkpoint-6")
    moved = trained("there", resume=middle, **options, keep_last=1)
    assert {folder.name for folder in (tmp_path / "there").glob("checkpoint-*")} == {
        f"checkpoint-{best}",
        "checkpoint-8",
    }
    assert logged(moved, "best_step") == [best]
    assert all(map(torch.equal, weights(whole).values(), weights(moved).values()))

    shutil.rmtree(tmp_path / "there" / f"checkpoint-{best}")
    with pytest.raises(RunStopped, match="the best checkpoint is gone, so no model is written"):
        trained("there", resume=str(tmp_path / "there" / "checkpoint-8"), **options)


def test_the_best_model_of_transformers_has_its_own_r(trained, tmp_path):
    """And the keys of an evaluation begin as they are asked to."""
    trainer = trained(
        "run",
        max_steps=6,
        rounds=3,
        learning_rate=0.05,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        eval_options=EvalOptions(corpus=ALIEN),
    )
    best = tmp_path / "run" / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    kept = load_file(best / "regularisers" / "rude" / "auxiliary.safetensors")
    auxiliary = AuxiliaryModel.from_pretrained(tmp_path / "run" / "auxiliary")
    for found in (auxiliary.state_dict(), trainer.regularisers[0].auxiliary.state_dict()):
        assert all(torch.equal(found[name], weight) for name, weight in kept.items())
    assert auxiliary.config.provenance["trained_model"] == fingerprint(trainer.model)

    measured = trainer.evaluate(metric_key_prefix="test")
    assert measured["test_loss"] == trainer.evaluate()["eval_loss"]
    assert measured.keys() >= {"test_rude_loss", "test_violation", "test_violation/no e"}
    assert not measured.keys() & {"eval_loss", "eval_rude_loss", "eval_violation"}


def test_rows_of_another_domain_are_no_prompts_of_a_domain_of_prompts_alone(tiny_folder, tmp_path):
    rows = {"plain": corpus()["plain"], "asked": Dataset.from_dict({"prompt": SENTENCES})}
    given = (tiny_folder(), tmp_path, {"asked": Regulariser(NO_E, kl_on="rollouts")}, rows)
    assert not trainer_of(*given, learn={"asked": False}, eval_options=EvalOptions(share=0.2)).eval_prompts
    with pytest.raises(UserError, match=r"^eval.best: goes by a violation rate; .* or eval.prompts of their domain"):
        trainer_of(*given, learn={"asked": False}, eval_options=EvalOptions(share=0.2, best=BestOptions(0.5)))


def test_prompts_of_a_sorted_file_are_of_all_its_kinds(tiny_folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": start}) + "\n" for start in ["the"] * 20 + ["ZZ9"] * 20)
    )
    source = {"path": str(tmp_path / "prompts.jsonl")}
    options = EvalOptions(share=0.2, prompts=source, completions=20)
    prompts = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, eval_options=options).eval_prompts
    assert len(prompts) == 20
    assert {prompt.text for prompt in prompts} == {"the", "ZZ9"}
    with pytest.raises(UserError, match=r"^domains: prompts say what is completed"):
        EvalOptions(share=0.2, prompts=source, domains=["rude"])


def test_prompts_are_rows_of_the_domains_that_are_named(tiny_folder, tmp_path):
    rows = {"plain": Dataset.from_dict({"text": SENTENCES}), "rude": Dataset.from_dict({"text": ["ZZ9 qqq 7#7#7"] * 9})}

    def prompts(*domains):
        options = EvalOptions(share=0.3, domains=list(domains))
        return trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, rows, eval_options=options).eval_prompts

    assert all(prompt.text.startswith("ZZ9") for prompt in prompts())
    assert prompts("rude") == prompts()
    assert not any(prompt.text.startswith("ZZ9") for prompt in prompts("plain"))
    with pytest.raises(UserError, match=r"^eval\.domains: there is no domain 'rued'; did you mean rude"):
        prompts("rued")


def test_the_rule_names_both():
    log = [
        {"step": 1, "eval_loss": 1.0, "eval_violation": 0.5},
        {"step": 2, "eval_loss": 3.0, "eval_violation": 0.05},
        {"step": 3, "eval_loss": 2.0, "eval_violation": 0.01},
        {"step": 4, "eval_loss": 1.5},  # nothing was scored
        {"step": 5, "eval_loss": math.nan, "eval_violation": 0.0},
        {"step": 5, "loss": 0.1},
        {"step": 6, "eval_loss": 2.0, "eval_violation": 0.02},
    ]
    assert best_evaluation(log, BestOptions(0.05))["step"] == 3
    assert best_evaluation(log, BestOptions(0.6))["step"] == 1
    assert best_evaluation(log, BestOptions(0.001)) is None
    assert has_waited(log, BestOptions(0.05, patience=2))
    assert not has_waited(log, BestOptions(0.05, patience=3))
    assert not has_waited(log, BestOptions(0.05))
    assert not has_waited(log, BestOptions(0.001, patience=1)), "patience begins with the first that is allowed"


def test_a_share_is_held_out_of_each_domain_that_has_no_other_rows():
    rows = corpus()
    trained, held_out = hold_out(rows, EvalOptions(share=0.1, corpus={"plain": HELD_OUT["plain"]}))
    assert trained["plain"] is rows["plain"]
    assert held_out["plain"] is HELD_OUT["plain"]
    assert len(held_out["rude"]) == 4
    assert sorted([*trained["rude"]["text"], *held_out["rude"]["text"]]) == sorted(rows["rude"]["text"])
    with pytest.raises(UserError, match=r"eval\.share: leaves domain plain with its 32 rows none to train on"):
        hold_out(rows, EvalOptions(share=1.0))
    with pytest.raises(UserError, match="constraints: two are called 'no e'"):
        EvalOptions(share=0.5, constraints=[NO_E, NO_E])
    with pytest.raises(UserError, match="share: nothing is held out"):
        EvalOptions()


def test_a_recipe_with_the_section(bridle, recipe, tmp_path):
    path = recipe(
        constraints={"no e": {"type": "regex", "pattern": "e"}, "no a": {"type": "regex", "pattern": "a"}},
        eval={"share": 0.2, "constraints": ["no a"], "completions": 8, "best": {"violation": 1.0}},
    )
    code, _, err = bridle("train", path, "--output_dir", tmp_path / "run")
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if "eval_violation" in record]
    assert len(found) == 2
    assert all(record["eval_violation"] == record["eval_violation/no a"] for record in found)
    (best,) = [record for record in records if "best_step" in record]
    kept = load_file(tmp_path / "run" / f"checkpoint-{best['best_step']}" / "model.safetensors")
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in kept.items())
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"after update {best['best_step']}" in card
    assert "no a violated" in err
