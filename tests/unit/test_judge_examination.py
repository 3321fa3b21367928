"""A judge is examined on pairs whose better text is known."""

import json

import pytest

from bridle.errors import RunStopped, UserError
from bridle.evaluation.judge_examination import HUMAN, KINDS, HumanText, JudgeExamination, examine_judge
from bridle.evaluation.judges import Verdict
from bridle.evaluation.statistics import Estimate
from judges import FunctionJudge

SENTENCES = [
    "the kettle on the old stove sings while it rains over the town",
    "bread in the lower town is baked long before dawn by the miller and his two sons",
    "a ladder leans at the wall of the mill until the ferryman brings it back",
    "you grumblefish, said the keeper, who has hidden my lantern under the bridge",
    "the river bends north below the weir and slows beside the meadow",
]


def by(value):
    """A judge that prefers the text with the higher value."""

    def winner(first, second):
        one, other = value(first), value(second)
        return "tie" if one == other else "first" if one > other else "second"

    return FunctionJudge(winner)


@pytest.fixture
def rows(tmp_path):
    def make(rows=SENTENCES, **options):
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return HumanText(str(tmp_path / "rows.jsonl"), **{"prompt_words": 3, "completion_words": 6} | options)

    return make


def continuations(source, examples=0):
    return source.examples_and_continuations(examples)[1]


def test_each_row_has_a_human_continuation_and_four_worse_ones(rows):
    found = continuations(rows())
    assert sorted(one.row for one in found) == [1, 2, 3, 4, 5]
    for one in found:
        text = SENTENCES[one.row - 1]
        human = one.texts[HUMAN]
        assert text.startswith(one.prompt + human)
        assert (len(one.prompt.split()), len(human.split())) == (3, 6)
        assert human.startswith(" "), "as a model's completion does"
        assert one.texts["shuffled"] != human
        assert sorted(one.texts["shuffled"].split()) == sorted(human.split())
        assert one.texts["truncated"].split() == human.split()[:3]
        assert one.texts["repeated"].split() == human.split()[:2] * 3
    another = {one.texts["another"] for one in found}
    assert another == {one.texts[HUMAN] for one in found}
    assert all(one.texts["another"] != one.texts[HUMAN] for one in found)
    assert continuations(rows()) == found, "always the same"
    assert continuations(rows(pairs=2)) == [
        found[0],
        found[1].__class__(found[1].row, found[1].prompt, found[1].texts | {"another": found[0].texts[HUMAN]}),
    ]


def test_prompts_and_completions_stay_apart(rows):
    given = [{"prompt": f"go on {number}:", "completion": text} for number, text in enumerate(SENTENCES)]
    found = continuations(rows(given, prompt_words=50))
    assert {one.prompt for one in found} == {row["prompt"] for row in given}
    assert all(SENTENCES[one.row - 1].startswith(one.texts[HUMAN]) for one in found)
    chat = {"prompt": [{"role": "user", "content": "hm"}], "completion": [{"role": "assistant", "content": "no"}]}
    with pytest.raises(UserError, match=r"rows\.jsonl row 1: holds a chat"):
        continuations(rows([chat]))


def test_short_and_repeated_rows_are_left_out(rows):
    useless = ["the kettle on the old stove", "ho ho ho ho ho ho ho", SENTENCES[0], "the kettle on a wire of tin, then"]
    assert len(continuations(rows(SENTENCES[:3] + useless))) == 3
    with pytest.raises(UserError, match=r"rows\.jsonl: 1 different rows .* but 2 are needed"):
        continuations(rows(SENTENCES[:1] + useless))
    with pytest.raises(UserError, match=r"5 different rows .* but 6 are needed .* sees 3 examples"):
        continuations(rows(), examples=3)


def test_examples_are_of_rows_that_are_not_examined(rows):
    examples, others = rows().examples_and_continuations(2)
    assert [winner for _, winner in examples] == ["first", "second"]
    assert len(others) == 2
    (one, _), (other, _) = examples
    assert any(text.startswith(one.prompt + one.first) for text in SENTENCES)
    assert any(text.startswith(other.prompt + other.second) for text in SENTENCES)
    assert sorted(other.first.split()) == sorted(other.second.split()), "the second kind: shuffled"
    seen = {text for item, _ in examples for text in (item.first, item.second)}
    assert not seen & {text for continuation in others for text in continuation.texts.values()}


def test_the_accuracy_is_the_one_by_hand(rows):
    human = {one.texts[HUMAN] for one in continuations(rows())}
    found = examine_judge(by(lambda text: text in human), continuations(rows()))
    assert {kind: one.value for kind, one in found.by_kind.items()} == dict.fromkeys(KINDS, 1) | {"another": 0.5}
    assert found.accuracy.value == pytest.approx(35 / 40)
    assert (found.accuracy.n, found.asked, found.missing, found.passed) == (20, 40, 0, True)
    assert found.position_bias.value == 0.5
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high
    assert all(one.low is not None for one in found.by_kind.values()), "also where all are right"


@pytest.mark.parametrize(
    ("judge", "accuracy", "bias"),
    [
        (FunctionJudge(lambda first, second: "first"), 0.5, 1.0),
        (FunctionJudge(lambda first, second: "tie"), 0.5, None),
        (by(lambda text: len(text.split())), 5 / 8, 0.5),
        (by(lambda text: -len(text.split())), 3 / 8, 0.5),
    ],
)
def test_a_judge_of_place_or_length_alone_does_not_pass(rows, judge, accuracy, bias):
    found = examine_judge(judge, continuations(rows()))
    assert found.accuracy.value == pytest.approx(accuracy)
    assert found.position_bias.value == bias
    assert not found.passed
    assert "win rates by it are not meaningful" in str(found)


def test_a_missing_verdict_excludes_its_pair(rows):
    many = [f"{text} number {number}" for number in range(5) for text in (f"row {number} says {s}" for s in SENTENCES)]
    found_rows = continuations(rows(many, completion_words=9))
    calls = []

    def silent_once(first, second):
        calls.append(first)
        return Verdict.missing("no answer") if len(calls) == 3 else "first"

    found = examine_judge(FunctionJudge(silent_once), found_rows)
    assert (found.missing, found.reasons) == (1, {"no answer": 1})
    assert found.accuracy.missing == sum(one.missing for one in found.by_kind.values()) == 1
    assert found.accuracy.n == len(KINDS) * len(found_rows) - 1
    with pytest.raises(RunStopped, match="verdicts are missing"):
        examine_judge(FunctionJudge(lambda first, second: Verdict.missing("no answer")), found_rows)


def test_its_verdicts_can_be_kept(rows, tmp_path):
    examine_judge(by(len), continuations(rows()), keep=tmp_path / "verdicts.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len(kept) == 40
    assert {(one["first"], one["second"]) for one in kept} == {
        pair for kind in KINDS for pair in ((HUMAN, kind), (kind, HUMAN))
    }


@pytest.mark.parametrize(
    ("accuracy", "kinds", "passed"),
    [
        (0.6, (0.6, 0.6, 0.6, 0.6), True),
        (0.59, (0.6, 0.6, 0.6, 0.57), False),
        (0.8, (0.9, 1, 0.5, 0.8), True),
        (0.7, (0.5, 0.59, 1, 0.8), False),
        (None, (None,) * 4, False),
    ],
)
def test_it_passes_from_60_percent_over_all_and_in_all_kinds_but_one(accuracy, kinds, passed):
    one, *by_kind = (Estimate(value, None, None, 10) for value in (accuracy, *kinds))
    found = JudgeExamination("j", one, dict(zip(KINDS, by_kind, strict=True)), one, 20, 0, {})
    assert found.passed is passed
    assert ("not meaningful" in str(found)) is not passed
