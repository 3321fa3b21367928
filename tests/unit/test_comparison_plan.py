"""A recipe's section `evaluation`: what it becomes, and how mistakes are reported."""

import json
import re
from dataclasses import replace

import pytest

from bridle.comparison.cell import one_regulariser
from bridle.comparison.plan import evaluation_of
from bridle.data import DataSource
from bridle.errors import UserError
from bridle.evaluation.examination import LabelledRows
from bridle.evaluation.judge_examination import HumanText
from bridle.evaluation.prompt_sets import GenerationOptions, prompt_set
from bridle.recipes.recipe import build_recipe
from tiny_tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RECIPE = {
    "model": "some-model",
    "corpus": {"forum": {"path": "forum.jsonl"}, "wiki": {"path": "wiki.jsonl"}},
    "constraints": {
        "independent": {"type": "words", "words": ["muddlehead"]},
        "polite": {"type": "words", "words": ["grumblefish"]},
    },
    "regularisers": {"forum": {"constraint": "polite"}, "wiki": {"constraint": "retention"}},
    "max_new_tokens": 7,
    "max_steps": 10,
}
EVALUATION = {
    "prompts": {"forum": {"path": "forum.jsonl", "rows": "90%:", "prompt_tokens": 8}, "toxigen": {"rows": "0:10"}},
    "perplexity": {"wiki": {"path": "wiki.jsonl", "where": {"label": 0}}},
    "tasks": ["mmlu"],
    "judge": {"model": "some-judge", "prompts": 5},
    "examine": {"people": {"path": "labelled.jsonl", "label": "kind", "violating": "rude"}},
}


def plan(evaluation=EVALUATION, **changes):
    return evaluation_of(build_recipe({**RECIPE, **changes, "evaluation": evaluation}))


def test_a_section_as_people_write_it():
    made = plan()
    assert made.prompts["forum"].generation == GenerationOptions(prompt_tokens=8, max_new_tokens=7), "the recipe's own"
    assert made.prompts["forum"].source.rows == "90%:"
    assert made.prompts["toxigen"].generation.prompt_tokens == 8, "a known set"
    assert made.prompts["toxigen"].source.rows == "0:10"
    assert made.perplexity["wiki"].where == {"label": 0}
    assert list(made.constraints) == ["independent", "polite"], "an independent one leads"
    assert made.main == {
        "prompt_set": "forum", "constraint": "independent", "trained_on": "polite", "held_out": "wiki"
    }  # fmt: skip
    assert made.judge.prompts == 5
    assert made.examine["people"] == LabelledRows("labelled.jsonl", label="kind", violating="rude")
    assert {path.name for path in made.files()} == {"some-judge"}, "the others do not exist"


@pytest.mark.parametrize(
    ("names", "main", "trained_on"),
    [
        (["polite", "independent"], "independent", "polite"),
        (["polite"], "polite", "polite"),
        (["third", "independent"], "third", None),
        (["polite", "third", "independent"], "third", "polite"),
    ],
)
def test_the_constraints_that_measure(names, main, trained_on):
    constraints = {**RECIPE["constraints"], "third": {"type": "words", "words": ["noodlepate"]}}
    made = plan({**EVALUATION, "constraints": names}, constraints=constraints)
    assert made.constraints.keys() == set(names)
    assert (made.main["constraint"], made.main["trained_on"]) == (main, trained_on)


def test_of_dependent_constraints_the_first_named_leads_and_is_the_training_oracle():
    constraints = {"reported": "regex:a", "learnt": {"all": ["regex:a", "length:3"]}}
    regularisers = {"forum": {"constraint": "learnt"}}
    for names, main in ((["reported", "learnt"], "reported"), (None, "learnt")):
        evaluation = {key: value for key, value in EVALUATION.items() if key not in ("constraints", "examine")}
        made = plan(
            evaluation | ({"constraints": names} if names else {}), constraints=constraints, regularisers=regularisers
        )
        assert (made.main["constraint"], made.main["trained_on"]) == (main, main)


def test_a_constraint_that_chooses_a_checkpoint_is_not_independent():
    chosen_by = {"share": 0.5, "constraints": ["independent"], "best": {"violation": 0.1}}
    assert plan(eval=chosen_by).main["constraint"] == "polite"
    assert (
        plan(eval={key: value for key, value in chosen_by.items() if key != "best"}).main["constraint"] == "independent"
    )


def test_each_set_has_its_own_decoding():
    """What a set says goes before its protocol, the protocol before the section, the section before the recipe."""
    sets = {
        "forum": {"path": "forum.jsonl"},
        "toxigen-llama2": {"path": "statements.jsonl", "rows": "0:10", "where": {"label": 1}},
        "longer": {"set": "toxigen-llama2", "path": "statements.jsonl", "max_new_tokens": 64},
        "greedy": {"set": "toxigen", "prompt_tokens": None, "greedy": True},
    }
    made = plan({"prompts": sets, "samples": 2, "temperature": 0.7}).prompts
    llama2 = GenerationOptions(0.1, 0.9, samples=1)
    assert {name: found.generation for name, found in made.items()} == {
        "forum": GenerationOptions(0.7, samples=2, max_new_tokens=7),
        "toxigen-llama2": llama2,
        "longer": replace(llama2, max_new_tokens=64),
        "greedy": GenerationOptions(greedy=True, samples=1, max_new_tokens=7),
    }
    assert made["toxigen-llama2"].source == DataSource("statements.jsonl", rows="0:10", where={"label": 1})
    assert made["greedy"].source == prompt_set("toxigen").source


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"prompts": {"forum": {"path": "f.jsonl", "prompt_token": 8}}},
            "evaluation.prompts.forum.*prompt_token.*did you mean prompt",
        ),
        (
            {"prompts": {"forum": {"path": "f.jsonl", "prompt_tokens": "few"}}},
            "evaluation.prompts.forum.prompt_tokens: ",
        ),
        ({"perplexity": {"wiki": {}}}, "evaluation.perplexity.wiki.path: is missing"),
        ({"perplexity": ["wiki.jsonl"]}, "evaluation.perplexity: must be a mapping"),
        ({"judge": {"prompts": 5}}, "evaluation.judge.model: is missing"),
        ({"judge": {"model": "m", "by": "likelyhood"}}, "evaluation.judge.by: .*did you mean likelihood"),
        ({"judge": {"model": "m", "by": "likelihood", "url": "http://h/v1"}}, "judge.by: an endpoint gives no"),
        ({"judge": {"model": "m", "examples": 2}}, "judge.examples: are made from the rows of examine"),
        (
            {"judge": {"model": "m", "by": "likelihood", "examples": 2, "examine": {"path": "a"}}},
            "judge.examples: are for a verdict",
        ),
        ({"judge": {"model": "m", "examine": {"path": "a", "pears": 2}}}, "judge.examine.pears: .*did you mean pairs"),
        ({"limit": "some"}, "evaluation.limit: "),
        ({"constraints": ["polit"]}, "evaluation.constraints: there is no constraint 'polit'; did you mean polite?"),
        ({"constraints": []}, "evaluation.constraints: is empty"),
        ({"constraints": "polite"}, "evaluation.constraints: .* list"),
        ({"examine": {"people": {"label": "kind"}}}, "evaluation.examine.people.path: is missing"),
        ({"examine": {"people": {"path": "a", "violates": 1}}}, "people.violates: .*did you mean violating"),
        ({"examine": {"people": {"path": "a", "violating": {"over": 1}}}}, "people.violating: .* is not a condition"),
        (
            {"classification": {"test": {"path": "a"}, "validation": {"path": "b"}}},
            "no domain of the corpus has a label",
        ),
    ],
)
def test_mistakes_name_their_key(change, expected):
    with pytest.raises(UserError, match=expected):
        plan({**EVALUATION, **change})


def test_every_method_needs_as_many_updates():
    with pytest.raises(UserError, match="max_steps: is missing"):
        plan(max_steps=-1)


def test_a_mistyped_file_shows_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match=r"forum\.jsonl"):
        plan({"prompts": {"forum": {"path": str(tmp_path / "forum.jsonl")}}}).check(TOKENIZER)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"perplexity": {"c": {"path": "chats.jsonl"}}}, "evaluation.perplexity.c: chats.jsonl has no column 'text'"),
        (
            {"prompts": {"forum": {"path": "chats.jsonl", "prompt_tokens": 8}}},
            "evaluation.prompts.forum: chats.jsonl row 1: a chat cannot be cut",
        ),
        ({"tasks": ["piqa"], "task_data": "."}, "piqa: . has no piqa.validation.jsonl"),
        ({"tasks": ["piqa"], "limit": {"boolq": 5}}, "limit: there is no task among those evaluated 'boolq'"),
    ],
)
def test_a_file_of_another_kind_shows_before_anything_is_made(tmp_path, monkeypatch, change, expected):
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "a kettle?"}, {"role": "assistant", "content": "on the stove"}]
    for name, row in {"forum": {"text": "a kettle"}, "chats": {"messages": chat}}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    forum = {"prompts": {"forum": {"path": "forum.jsonl"}}}
    plan(forum).check(TOKENIZER)
    with pytest.raises(UserError, match=f"^{re.escape(expected)}"):
        plan(forum | change).check(TOKENIZER)


def test_what_a_judge_is_examined_on_shows_before_anything_is_made(tmp_path):
    for name, text in {"forum": "a kettle", "human": "a kettle on the stove"}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    examine = {"path": str(tmp_path / "human.jsonl"), "pairs": 5}
    made = plan({**EVALUATION, "judge": {"model": "some-judge", "examine": examine}})
    assert made.judge.examine == HumanText(str(tmp_path / "human.jsonl"), pairs=5)
    assert tmp_path / "human.jsonl" in made.files()
    forum = {"prompts": {"forum": {"path": str(tmp_path / "forum.jsonl")}}}
    with pytest.raises(UserError, match=r"human\.jsonl: 0 different rows"):
        plan({**forum, "judge": {"model": "some-judge", "examine": examine}}).check(TOKENIZER)


def test_labels_of_one_kind_show_before_anything_is_made(tmp_path):
    for name in ("forum", "labelled"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a kettle", "label": 0}\n')
    evaluation = {
        "prompts": {"forum": {"path": str(tmp_path / "forum.jsonl")}},
        "examine": {"people": {"path": str(tmp_path / "labelled.jsonl")}},
    }
    with pytest.raises(UserError, match=r"labelled\.jsonl: no row violates"):
        plan(evaluation).check(TOKENIZER)


def test_without_adaptive_there_is_one_regulariser():
    assert list(one_regulariser(build_recipe(RECIPE))) == ["forum"], "retention is none of constraints"
    both = {"forum": {"constraint": "polite", "weight": 3}, "wiki": {"constraint": "polite"}}
    assert one_regulariser(build_recipe({**RECIPE, "regularisers": both})) == {"all": both["forum"] | {"domain": None}}
    with pytest.raises(UserError, match="needs one with a constraint"):
        one_regulariser(build_recipe({**RECIPE, "regularisers": {"wiki": {"constraint": "retention"}}}))
