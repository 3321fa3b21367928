"""`bridle score`: a constraint tried on texts."""

import json

import pytest

from bridle.constraints import Constraint, Score, build_constraint
from bridle.data import DataSource
from bridle.evaluation.scoring import try_constraint

VALUES = {"kind words": 0.99, "you grumblefish": 0.01, "a door": 0.55, "a muddlehead": 0.45, "?": None, "bread": 0.9}


class Graded(Constraint):
    name = "polite"

    def _score(self, texts):
        return [Score.missing("no\x1b[2J answer") if VALUES[text] is None else VALUES[text] for text in texts]


@pytest.fixture
def try_on(tmp_path):
    """Tries the constraint on texts, which stand from row 2 on."""

    def run(texts=VALUES, constraint=None):
        rows = [{"text": ""}, *({"text": text} for text in texts)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return try_constraint(constraint or Graded(), DataSource(str(tmp_path / "rows.jsonl")))

    return run


def test_rows_are_ranked_by_how_sure_it_is(try_on):
    trial = try_on()
    assert (trial.violation_rate.value, trial.violation_rate.n, trial.violation_rate.missing) == (0.4, 5, 1)
    assert trial.violation_rate.low < 0.4 < trial.violation_rate.high
    assert trial.histogram == [1, 0, 0, 0, 1, 1, 0, 0, 0, 2]
    numbers = {title: [trial.numbers[index] for index in indices] for title, indices in trial.extremes(2).items()}
    assert numbers == {
        "surest to violate": [3, 5],
        "least sure to violate": [5],
        "surest to comply": [2, 7],
        "least sure to comply": [4, 7],
    }


@pytest.mark.parametrize("show_texts", [False, True])
def test_texts_are_shown_where_they_are_asked_for(try_on, show_texts):
    trial = try_on()
    lines = list(trial.lines(2, show_texts))
    assert max(map(len, lines)) <= 100
    assert not any("\x1b" in line for line in lines)
    assert any("1 without a score, the first in row 6: no" in line for line in lines)
    for shown in ("\n".join(lines), json.dumps(trial.to_json(show_texts))):
        assert ("grumblefish" in shown) is show_texts


def test_yes_or_no_is_never_unsure_and_may_be_missing_altogether(try_on):
    trial = try_on(["you grumblefish"] * 2)
    assert trial.extremes(5)["least sure to violate"] == []
    nothing = try_on(["?"])
    assert nothing.violation_rate.value is None
    assert next(nothing.lines(5, False)) == "polite: violation rate missing n=0 missing=1"


def test_a_prompt_is_read_where_the_constraint_reads_it(tmp_path):
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "you ", "completion": "door"}) + "\n")
    for reads, rate in (("completion", 0), ("prompt+completion", 1)):
        constraint = build_constraint({"type": "regex", "pattern": "you", "reads": reads})
        assert try_constraint(constraint, DataSource(str(tmp_path / "asked.jsonl"))).violation_rate.value == rate


def test_the_command_line_names_rows_of_the_file(bridle, tmp_path):
    (tmp_path / "texts.txt").write_text("you grumblefish\n\nbread\n")
    ask = ("score", "regex:grumble", tmp_path / "texts.txt", "--json", tmp_path / "scores.json")
    code, out, err = bridle(*ask)
    assert code == 0, err
    assert "violation rate 0.5" in out
    assert "row 3" in out
    assert "grumblefish" not in out
    assert [row["row"] for row in json.loads((tmp_path / "scores.json").read_text())["rows"]] == [1, 3]
    assert "grumblefish" in bridle(*ask, "--show_texts")[1]
