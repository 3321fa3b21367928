"""Domains that are held and not learnt (`learn: false`): a real run, its figures, resuming, and what is refused."""

import json
import re

import pytest
import torch
import yaml
from datasets import Dataset
from test_training import StopAt

from bridle.core.tokens import pad_right
from bridle.errors import UserError
from bridle.models.loading import load_model, load_tokenizer
from bridle.recipes.recipe import load_recipe
from bridle.training.config import BestOptions, EvalOptions, ParallelOptions, Regulariser
from chats import TEMPLATES, chat_folder
from conftest import SENTENCES
from trainers import NO_E, LocalWorker, corpus, logged, trainer_of, weights

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


def test_a_recipe_that_would_do_nothing_is_refused(bridle, held, tmp_path):
    code, _, err = bridle("train", held, "--output_dir", tmp_path / "run", "--regularisers.plain.weight", 0)
    assert code == 2
    assert "corpus.plain.learn: false, but no regulariser of a weight above 0 names plain" in err


# ---------------------------------------------------------------------- rollouts, and prompts alone


def prompts(*texts):
    return Dataset.from_dict({"prompt": list(texts or SENTENCES[:2]) * 4})


ROWS = {"rude": corpus()["rude"], "asked": prompts()}
ASKED = {"asked": False}


@pytest.mark.parametrize("of", ["anchor", "policy"])
def test_prompts_alone_are_continued_and_held(tiny_folder, tmp_path, of):
    folder, options = tiny_folder(), {"max_steps": 12, "rounds": 3}
    learnt = trainer_of(folder, tmp_path / "sft", {}, rows={"rude": ROWS["rude"]}, **options)
    asked = Regulariser(weight=20.0, kl_on="rollouts", rollouts_of=of)
    held = trainer_of(folder, tmp_path / "held", {"asked": asked}, rows=ROWS, learn=ASKED, **options)
    learnt.train(), held.train()
    (regulariser,) = held.regularisers
    texts = pad_right([one.prompt_ids + one.completion_ids for one in regulariser.rollouts], 0)
    with torch.no_grad():
        p_0, kept, lost = (
            model.eval()(*texts).logits.log_softmax(-1) for model in (load_model(str(folder)), held.model, learnt.model)
        )
    mask = texts[1].bool()
    of_held, of_sft = ((p_0.exp() * (p_0 - p)).sum(-1)[mask].mean() for p in (kept, lost))
    assert of_held < 0.3 * of_sft

    files = sorted(path.name for path in (tmp_path / "held" / "rollouts").iterdir())
    assert files == [f"round-{index}.asked.jsonl" for index in ((1,) if of == "anchor" else (1, 2, 3))]
    assert {rollout.prompt for rollout in regulariser.rollouts} == set(SENTENCES[:2])
    (first, *rest) = [record for record in held.state.log_history if "round" in record]
    assert first["asked/rollouts"] == 32
    assert "asked/compliance" not in first
    assert all(("asked/rollouts" in record) == (of == "policy") for record in rest)


def test_a_prompt_s_own_row_costs_no_forward(tiny_folder, tmp_path):
    """Its rollout rides along in its place."""
    asked = Regulariser(weight=1.0, kl_on="rollouts")
    trainer = trainer_of(tiny_folder(), tmp_path, {"asked": asked}, rows=ROWS, learn=ASKED)
    trainer.parts = lambda inputs: [inputs]  # no rollouts apart
    shapes, step = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        shapes.append((len(inputs["input_ids"]), int((inputs["prefixes"].regulariser >= 0).sum())))
        return step(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert {rows for rows, _ in shapes} == {8}, "as many rows as a batch has"
    assert sum(rollouts for _, rollouts in shapes) > 0


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
@pytest.mark.parametrize("of", ["anchor", "policy"])
@pytest.mark.parametrize("targets", ["computed", "precomputed"])
def test_a_run_on_rollouts_that_died_ends_as_if_it_had_not(tiny_folder, tmp_path, schedule, of, targets):
    folder = tiny_folder()
    options = {"max_steps": 8, "rounds": 4, "save_strategy": "steps", "save_steps": 1}
    options |= {"schedule": schedule, "targets": targets, "parallel": ParallelOptions(first_round="train")}
    regularisers = {"asked": Regulariser(weight=3.0, kl_on="rollouts", rollouts_of=of)}

    def made(name):
        trainer = trainer_of(folder, tmp_path / name, regularisers, rows=ROWS, learn=ASKED, **options)
        if schedule == "parallel":
            trainer.schedule.worker = LocalWorker(trainer.regularisers)
        return trainer

    whole = made("whole")
    whole.train()
    assert logged(whole, "kl/asked")
    for step in (1, 5):
        resumed = made(f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, weight in weights(whole).items():
            assert torch.equal(weights(resumed)[name], weight), name


def test_rollouts_of_the_anchor_go_on_from_round_to_round(tiny_folder, tmp_path):
    """They are drawn once, so a round that began with the first one again would never reach the last."""
    taken = {}
    for schedule in ("sequential", "parallel"):
        asked = {"asked": Regulariser(weight=1.0, kl_on="rollouts")}
        options = {"max_steps": 8, "rounds": 4, "schedule": schedule}
        trainer = trainer_of(tiny_folder(), tmp_path / schedule, asked, rows=ROWS, learn=ASKED, **options)
        if schedule == "parallel":
            trainer.schedule.worker = LocalWorker(trainer.regularisers)
        trainer.train()
        taken[schedule] = trainer.regularisers[0].rollout_cursor
    assert taken["parallel"] == taken["sequential"] > 0


def test_a_policy_holds_on_prompts_alone(tiny_folder, tmp_path):
    """No text at all: the constraint's rollouts start at the prompts."""
    trainer = trainer_of(
        *(tiny_folder(), tmp_path, {"asked": Regulariser(NO_E, kl_on="rollouts")}),
        **{"rows": {"asked": prompts()}, "learn": ASKED},
    )
    trainer.train()
    assert {rollout.prompt for rollout in trainer.regularisers[0].rollouts} == set(SENTENCES[:2])
    assert logged(trainer, "kl/asked")


def test_chats_that_end_with_a_user_s_turn_are_continued(tiny_model, tmp_path):
    folder = chat_folder(tiny_model, tmp_path / "chat", next(iter(TEMPLATES.values()))[0])
    turns = [{"role": "user", "content": SENTENCES[0]}]
    rows = {"rude": ROWS["rude"], "asked": Dataset.from_dict({"prompt": [turns] * 8})}
    asked = Regulariser(weight=1.0, kl_on="rollouts")
    trainer = trainer_of(folder, tmp_path, {"asked": asked}, rows=rows, learn=ASKED)
    trainer.train()
    assert all(rollout.messages == turns for rollout in trainer.regularisers[0].rollouts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rollouts_of": "policy"}, "^rollouts_of: retention has rollouts only with kl_on: rollouts or both"),
        ({"prompts": {"path": "some.jsonl"}}, "^prompts: retention has rollouts only with kl_on: rollouts or both"),
        ({"constraint": NO_E, "rollouts_of": "policy"}, "^rollouts_of: R is fitted on its anchor's rollouts"),
        ({"target": {"rate": 0.1}, "kl_on": "both"}, "^target: retention asks no constraint"),
        ({"anchor": "previous"}, "^anchor: retention's is the initial model"),
        ({"anchor": "live"}, "^anchor: retention's is the initial model"),
        ({"guidance_scale": 2.0}, "^guidance_scale: retention has no R to scale"),
        ({"soft_labels": True}, "^soft_labels: retention has no labels"),
    ],
)
def test_options_of_retention_without_effect_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        Regulariser(**options)


@pytest.mark.parametrize(
    ("learn", "regularisers", "options", "said"),
    [
        ({}, {"asked": Regulariser(kl_on="rollouts")}, {}, "corpus.asked: has prompts and no completions to learn"),
        (ASKED, {"asked": Regulariser()}, {}, "corpus.asked: .* no regulariser of asked looks at rollouts after them"),
        (
            ASKED,
            {"asked": Regulariser(kl_on="rollouts")},
            {"eval_options": EvalOptions(corpus={"asked": ROWS["asked"]})},
            "eval.corpus.asked: prompts alone have no loss",
        ),
    ],
)
def test_prompts_that_would_do_nothing_are_refused(tiny_folder, tmp_path, learn, regularisers, options, said):
    with pytest.raises(UserError, match=said):
        trainer_of(tiny_folder(), tmp_path, regularisers, rows=ROWS, learn=learn, **options)


def test_a_recipe_with_prompts_alone(bridle, held, tmp_path):
    """Checked, trained, and compared with a rival that has no use for them."""
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in SENTENCES))
    mapping = yaml.safe_load(held.read_text())
    mapping["corpus"]["asked"] = {"path": str(tmp_path / "asked.jsonl"), "prompt": "question", "learn": False}
    mapping["regularisers"]["asked"] = {"constraint": "retention", "kl_on": "rollouts", "rollouts_of": "policy"}
    mapping["eval"] = {"share": 0.2}
    held.write_text(yaml.safe_dump(mapping))
    code, out, err = bridle("check", held)
    assert code == 0, err
    assert re.search(r"asked: 8 rows; .*\n  held and not learnt: .*\n  a prompt: ", out)
    assert "rollouts for asked start at: " in out
    names = "filtration,constrained-adaptive"
    code, _, err = bridle("compare", held, "--methods", names, "--output_dir", tmp_path / "out")
    assert code == 0, err
    card = (tmp_path / "out" / "constrained-adaptive" / "seed-0" / "model" / "README.md").read_text("utf-8")
    assert re.search(r"\| asked \|.*\| rollouts \|.*\| the domain's rows \|", card)
    mapping["corpus"]["asked"]["learn"] = True
    held.write_text(yaml.safe_dump(mapping))
    code, _, err = bridle("train", held, "--output_dir", tmp_path / "run")
    assert code == 2
    assert "asked.jsonl has no column 'completion'; it has 'prompt'; to hold the model after" in err
