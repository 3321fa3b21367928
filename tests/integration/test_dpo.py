"""The method `dpo`: its pairs, what it learns from them, resuming, and what is refused."""

import json
import shutil

import pytest
import torch
import yaml

from bridle.baselines.preference import preference_pairs
from bridle.comparison import dpo as method
from bridle.comparison.cell import Candidate, Cell
from bridle.data import Rollout, read_rollouts
from bridle.errors import RunStopped, UserError
from bridle.models.loading import LoraOptions, load_model, load_tokenizer
from bridle.recipes.recipe import build_recipe
from bridle.training.config import ALL
from chats import CHATS, TEMPLATES, chat_folder, write_rows

UPDATES = 4


@pytest.fixture
def cell(recipe, tmp_path):
    """A factory of cells whose plainly tuned model is `start`, by default the recipe's."""

    def make(start=None, *, resume=False, name="dpo@0.5", **changes):
        mapping = yaml.safe_load(recipe().read_text()) | {"learning_rate": 1e-2, "save_steps": 2} | changes
        found = build_recipe(mapping)
        tuned = Candidate(start or found.model, cost={"updates": UPDATES})
        (tmp_path / "cell").mkdir(exist_ok=True)
        return Cell(name, found, 0, tmp_path / "cell", lambda other: tuned, resume)

    return make


def margins(model, pairs):
    """log p(chosen) − log p(rejected) of each pair."""

    def log_p(prompt, completion):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()

    found = [log_p(p.prompt_ids, p.chosen_ids) - log_p(p.prompt_ids, p.rejected_ids) for p in pairs]
    return torch.stack(found)


def test_it_prefers_what_complies_and_resumes_as_if_never_stopped(cell, monkeypatch, capsys, tmp_path):
    work = cell()
    made = method.dpo(work)
    assert "Traceback" not in capsys.readouterr().err
    rollouts = read_rollouts(work.folder / "rollouts.jsonl")
    report = json.loads((work.folder / "pairs.json").read_text())
    pairs = preference_pairs(rollouts, 4)
    assert report["pairs"] == len(pairs) >= 4
    assert (report["prompts"], report["completions"]) == (16, 64), "two rounds of 32 rollouts"
    assert report["violating"] == sum("e" in one.completion for one in rollouts)
    decode = load_tokenizer(made.model).decode
    for pair in pairs:
        assert "e" not in decode(pair.chosen_ids, skip_special_tokens=True)
        assert "e" in decode(pair.rejected_ids, skip_special_tokens=True)

    start, tuned = (load_model(name) for name in (work.recipe.model, made.model))
    assert margins(tuned, pairs).mean() > margins(start, pairs).mean() + 1
    assert made.cost["updates"] == UPDATES
    assert made.cost["tokens_sampled"] == sum(len(one.completion_ids) for one in rollouts)
    last = json.loads((work.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert made.cost["seconds"] == last["seconds"] + report["seconds_sampling"] + report["seconds_scoring"]
    assert made.about["beta"] == 0.5

    monkeypatch.setattr(method, "build_trainer", lambda *_: pytest.fail("samples again"))
    for gone in (["model"], ["model", "checkpoint-4"]):  # it was stopped after its last update, and within it
        for name in gone:
            shutil.rmtree(work.folder / name)
        resumed = method.dpo(cell(resume=True))
        assert resumed.cost["updates"] == UPDATES
        again = load_model(resumed.model)
        for name, weight in tuned.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), name
    metrics = [json.loads(line) for line in (work.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics if "loss" in record] == [1, 2, 3, 4]


def test_adapters_in_half_precision_on_chats(cell, tiny_model, tmp_path):
    folder = chat_folder(tiny_model, tmp_path / "chat", TEMPLATES["smollm2"][0])
    rows = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    tuned = load_model(str(folder), lora=LoraOptions(r=2))
    tuned.save_pretrained(tmp_path / "sft")
    load_tokenizer(str(folder)).save_pretrained(tmp_path / "sft")
    work = cell(
        str(tmp_path / "sft"),
        **{"model": str(folder), "dtype": "bfloat16", "lora": {"r": 2}, "max_length": 160, "save_steps": 500},
        **{"rounds": 1, "rollouts_per_round": 16, "per_device_train_batch_size": 1},
        **{"corpus": {"chats": {"path": str(rows)}}, "regularisers": {"chats": {"constraint": "no e"}}},
    )
    made = method.dpo(work)
    prompts = [one.prompt for one in read_rollouts(work.folder / "rollouts.jsonl")]
    assert all(prompt.endswith("assistant\n") for prompt in prompts)
    before, after = (load_model(name, dtype="bfloat16") for name in (str(tmp_path / "sft"), made.model))
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert moved
    assert all("lora" in name for name in moved)
    assert not (work.folder / "model" / "ref").exists(), "the reference is not part of it"


def test_what_makes_no_pair_is_said(cell, tmp_path, monkeypatch):
    few = {"rounds": 1, "rollouts_per_round": 8}
    with pytest.raises(UserError, match=r"^methods\.dpo: 0 of 2 prompts make a pair \(8 of 8 completions violate, 0 g"):
        method.dpo(cell(constraints={"no e": {"type": "length", "min_words": 99}}, **few))
    (tmp_path / "unscored.py").write_text("def judge(texts):\n    return [None] * len(texts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunStopped, match=r"^methods\.dpo: 8 of 8 completions got no score \(first reason: .* gave no"):
        method.dpo(cell(constraints={"no e": "python:unscored:judge"}, **few))
    share = {"constraint": "no e", "share": {"at_least": 0.4, "at_most": 0.6}}
    with pytest.raises(UserError, match=r"^regularisers\.rude\.share: pairs would make all outputs comply"):
        method.dpo(cell(regularisers={"rude": share}))


def scored(*values):
    """Completions of one prompt with these scores, each told by its place."""
    known = {"prompt": "", "completion": "", "round": 1, "regulariser": ALL, "model_hash": "", "constraint": "c"}
    return [
        Rollout(
            prompt_ids=[1],
            completion_ids=[place],
            value=value,
            complies=None if value is None else value >= 0.5,
            **known,
        )
        for place, value in enumerate(values)
    ]


def test_a_pair_is_the_best_and_the_worst_by_the_score():
    (pair,) = preference_pairs(scored(0.6, 0.4, None, 0.9, 0.1, 0.9, 0.1), 7)
    assert (pair.chosen_ids, pair.rejected_ids) == ([3], [4])
    groups = [*scored(0.9, 0.8), *scored(0.1, None), *scored(None, 0.7), *scored(0.2, 0.7)]
    assert [(pair.chosen_ids, pair.rejected_ids) for pair in preference_pairs(groups, 2)] == [([1], [0])]
