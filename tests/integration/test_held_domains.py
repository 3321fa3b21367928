"""Domains that are held and not learnt (`learn: false`): a real run, its figures, resuming, and what is refused."""

import json

import pytest
import torch
from test_training import StopAt

from bridle.errors import UserError
from bridle.models.loading import load_model, load_tokenizer
from bridle.recipes.recipe import load_recipe
from bridle.training.config import BestOptions, EvalOptions, Regulariser
from bridle.training.worker import LocalWorker
from conftest import SENTENCES
from trainers import NO_E, corpus, logged, trainer_of, weights

HELD = {"plain": False}


def drift(trainer, folder):
    """KL(p_0 ‖ p) per token on text that is held."""
    tokenizer = load_tokenizer(str(folder))
    texts = tokenizer([f"{text} 0" for text in SENTENCES[::2]], return_tensors="pt", padding=True)
    with torch.no_grad():
        p_0, p = (model.eval()(**texts).logits.log_softmax(-1) for model in (load_model(str(folder)), trainer.model))
    return (p_0.exp() * (p_0 - p)).sum(-1)[texts["attention_mask"].bool()].mean().item()


def test_it_stays_as_it_was_while_the_other_is_learnt(tiny_folder, tmp_path):
    folder, options = tiny_folder(), {"max_steps": 20, "rounds": 1}
    rude = {"rude": corpus()["rude"]}
    plain = trainer_of(folder, tmp_path / "sft", {}, rows=rude, **options)
    held = trainer_of(folder, tmp_path / "held", {"plain": Regulariser(weight=20.0)}, learn=HELD, **options)
    plain.train(), held.train()
    assert drift(held, folder) < 0.2 * drift(plain, folder)
    assert logged(held, "ce")[-1] < 0.8 * logged(held, "ce")[0], "the other is learnt"

    (record,) = [record for record in held.state.log_history if "round" in record]
    assert record["held_rows"] == pytest.approx(0.5, abs=0.15)
    lengths = {domain: sum(map(len, rows["input_ids"])) - len(rows) for domain, rows in held.tokenised.items()}
    epochs = options["max_steps"] / 8  # 64 rows in batches of 8
    assert record["tokens_trained"] == pytest.approx(epochs * lengths["rude"], rel=0.15), "of the learnt domain alone"
    assert all("held_rows" not in record for record in plain.state.log_history)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_a_run_that_died_ends_as_if_it_had_not(tiny_folder, tmp_path, schedule):
    folder, options = tiny_folder(), {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "schedule": schedule}
    regularisers = {"plain": Regulariser(weight=3.0), "rude": Regulariser(NO_E, kl_on="both")}

    def made(name):
        trainer = trainer_of(folder, tmp_path / name, regularisers, learn=HELD, **options)
        if schedule == "parallel":
            trainer.schedule.worker = LocalWorker(trainer.regularisers)
        return trainer

    whole, died, resumed = made("whole"), made("died"), made("died")
    whole.train()
    died.add_callback(StopAt(7))
    with pytest.raises(KeyboardInterrupt):
        died.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "died" / "checkpoint-6"))
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name


def test_packed_with_precomputed_targets_and_evaluated(tiny_folder, tmp_path):
    options = {"packing": True, "packing_strategy": "wrapped", "targets": "precomputed", "max_steps": 4, "rounds": 1}
    evaluated = EvalOptions(share=0.2, constraints=[NO_E], completions=4)
    trainer = trainer_of(
        *(tiny_folder(), tmp_path, {"plain": Regulariser(weight=3.0)}),
        **{"learn": HELD, "eval_options": evaluated, **options},
    )
    trainer.train()
    (record,) = [record for record in trainer.state.log_history if "eval_completions" in record]
    losses = {key: logged(trainer, key)[-1] for key in ("eval_plain_loss", "eval_rude_loss")}
    assert record["eval_loss"] == losses["eval_rude_loss"] != losses["eval_plain_loss"], "goes by what is learnt"
    assert logged(trainer, "kl/plain")[-1] > 0


@pytest.mark.parametrize(
    ("learn", "regularisers", "said"),
    [
        (
            {"plain": False},
            {"rude": Regulariser(NO_E)},
            r"corpus.plain.learn: false, but no regulariser .* names plain",
        ),
        ({"plain": False}, {"plain": Regulariser(weight=0.0)}, r"corpus.plain.learn: .* weight above 0"),
        ({"plain": False, "rude": False}, {"all": Regulariser()}, "corpus: no domain is learnt, and retention alone"),
        ({"plan": False}, {"plain": Regulariser()}, "learn.plan: there is no domain 'plan'; did you mean plain"),
        ({"plain": "perhaps"}, {"plain": Regulariser()}, "learn.plain: input should be a valid boolean"),
    ],
)
def test_what_would_do_nothing_is_refused(tiny_folder, tmp_path, learn, regularisers, said):
    with pytest.raises(UserError, match=said) as caught:
        trainer_of(tiny_folder(), tmp_path, regularisers, learn=learn)
    assert "\n" not in str(caught.value)


def test_the_best_checkpoint_goes_by_what_is_learnt(tiny_folder, tmp_path):
    rows = corpus()
    held_out = EvalOptions(corpus={"plain": rows["plain"]}, constraints=[NO_E], best=BestOptions(violation=1.0))
    with pytest.raises(UserError, match=r"eval\.best: goes by the loss of domains that are learnt"):
        trainer_of(tiny_folder(), tmp_path, {"plain": Regulariser()}, rows, learn=HELD, eval_options=held_out)


def test_a_policy_may_be_all_there_is(tiny_folder, tmp_path):
    """Nothing is learnt, and the constraint alone moves the model."""
    learn = {"plain": False, "rude": False}
    trainer = trainer_of(tiny_folder(), tmp_path, Regulariser(NO_E, kl_on="both"), learn=learn)
    before = weights(trainer)
    trainer.train()
    assert not all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())
    assert not logged(trainer, "ce")
    assert logged(trainer, "kl/all")


# ---------------------------------------------------------------------- a recipe


@pytest.fixture
def held(recipe, corpus_files):
    """A recipe whose plain domain is held, and a comparison of it."""
    return recipe(
        corpus={
            "plain": {"path": str(corpus_files["plain"]), "learn": False, "weight": 0.25},
            "rude": {"path": str(corpus_files["rude"])},
        },
        constraints={"no p": {"type": "regex", "pattern": "p"}},
        regularisers={"rude": {"constraint": "no p"}, "plain": {"constraint": "retention", "weight": 3.0}},
        eval={"corpus": {name: {"path": str(path), "rows": "0:4"} for name, path in corpus_files.items()}},
        evaluation={"prompts": {"rude": {"path": str(corpus_files["rude"]), "rows": "0:4", "prompt_tokens": 2}}},
    )


def test_a_dry_run_shows_what_it_costs(bridle, held):
    code, out, err = bridle("check", held)
    assert code == 0, err
    assert "plain: 32 rows; in an epoch 8 of 40" in out
    assert "  held and not learnt: 20% of the rows, 0.8 of the 4 of an update\n  ›what is held‹ of a row: ›" in out
    assert "›what is trained on‹ of a row: ›" in out


def test_rivals_learn_what_is_learnt(bridle, held, tmp_path):
    names = "sft,filtration,constrained,constrained-adaptive"
    code, _, err = bridle("compare", held, "--methods", names, "--output_dir", tmp_path / "out")
    assert code == 0, err
    for name in names.split(","):
        folder = tmp_path / "out" / name / "seed-0"
        corpus = load_recipe(folder / "recipe.yaml").corpus
        held = name == "constrained-adaptive"
        assert set(corpus) == ({"plain", "rude"} if held else {"rude"})
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert any("held_rows" in record for record in records) == held
        card = (folder / "model" / "README.md").read_text("utf-8")
        assert ("20.0%, held, not learnt" in card) == held
        assert f"after {name} on rude." in card


def test_a_recipe_that_would_do_nothing_is_refused(bridle, held):
    code, _, err = bridle("train", held, "--regularisers.plain.weight", 0)
    assert code == 2
    assert "corpus.plain.learn: false, but no regulariser of a weight above 0 names plain" in err
