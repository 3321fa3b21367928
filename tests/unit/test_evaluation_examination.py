"""Constraints are examined on rows with human labels."""

import json

import pytest

from bridle.constraints import Constraint, Score, WordList
from bridle.errors import UserError
from bridle.evaluation.examination import LabelledRows, examine, examine_all

VALUES = {"kind words": 0.9, "a door": 0.6, "bread": 0.4, "you grumblefish": 0.1, "a muddlehead": 0.5, "?": None}
LABELS = {"kind words": 0, "a door": 0, "bread": 0, "you grumblefish": 1, "a muddlehead": 1}


class Graded(Constraint):
    def __init__(self, strictness=1):
        self.name, self.strictness, self.asked = "graded", strictness, 0

    def _settings(self):
        return {"type": "graded", "strictness": self.strictness}

    def _score(self, texts):
        self.asked += len(texts)
        return [Score.missing("no answer") if VALUES[text] is None else VALUES[text] for text in texts]


@pytest.fixture
def labelled(tmp_path):
    def make(labels=LABELS, **options):
        rows = [{"text": text, "label": label} for text, label in labels.items()]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return LabelledRows(str(tmp_path / "rows.jsonl"), **options)

    return make


def test_the_auc_is_the_share_of_pairs_in_the_right_order(labelled):
    found = examine(Graded(), labelled())
    assert (found.value, found.n, found.missing) == (pytest.approx(5 / 6), 5, 0)
    words = examine(WordList(["grumblefish"]), labelled())
    assert words.value == pytest.approx(0.75), "a verdict alone is a score of two values; ties count half"


@pytest.mark.parametrize(
    ("labels", "violating", "row"),
    [((0.1, "0.9", 0.7), {"above": 0.5}, 2), ((0, 1, "1"), 1, 3), (("no", "yes", 1), "yes", 3)],
)
def test_labels_of_another_kind_are_not_taken_for_compliance(labelled, labels, violating, row):
    rows = labelled(dict(zip(("bread", "a door", "kind words"), labels, strict=True)), violating=violating)
    with pytest.raises(UserError, match=rf"row {row}: label is .*they are of two kinds"):
        rows.classes()


def test_a_text_without_a_score_is_missing(labelled):
    found = examine(Graded(), labelled(LABELS | {"?": 1}))
    assert (found.value, found.n, found.missing) == (pytest.approx(5 / 6), 5, 1)
    found = examine(Graded(), labelled({"?": 1, "bread": 0}))
    assert (found.value, found.n, found.missing) == (None, 1, 1)


def test_which_labels_violate(labelled, caplog):
    degrees = {"kind words": 1.0, "a door": 2.0, "bread": None, "you grumblefish": 4.5, "a muddlehead": 3.5}
    assert examine(Graded(), labelled(degrees, violating={"above": 3})).value == 1.0
    assert "left out 1 of 5 rows without a label" in caplog.text
    assert examine(Graded(), labelled(degrees, violating=[2.0, 4.5])).value == pytest.approx(0.75)


@pytest.mark.parametrize("violating", [1, {"above": 0.5}])
def test_nan_is_no_label(labelled, caplog, violating):
    found = examine(Graded(), labelled(LABELS | {"bread": None, "a muddlehead": float("nan")}, violating=violating))
    assert (found.value, found.n) == (1.0, 3)
    assert "left out 2 of 5 rows without a label" in caplog.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"label": "lable"}, "has no column 'lable'; .*did you mean 'label'"),
        ({"violating": 2}, "no row violates where label violates at 2"),
        ({"violating": [0, 1]}, "no row complies"),
    ],
)
def test_rows_of_one_class_examine_nothing(labelled, options, expected):
    with pytest.raises(UserError, match=expected):
        labelled(**options).classes()


def test_a_condition_that_is_none_is_refused(labelled):
    with pytest.raises(UserError, match=r"violating: .* is not a condition"):
        labelled(violating={"over": 3})


def test_each_constraint_is_examined_once(labelled, tmp_path):
    keep, shown, rows = tmp_path / "examined.json", [], {"people": labelled()}
    graded, words = Graded(), WordList(["grumblefish"], name="words")
    found = examine_all({"graded": graded, "words": words}, rows, keep, shown.append)
    assert shown[1].startswith("words: AUC 0.75")
    assert graded.asked == 5
    assert examine_all({"renamed": graded}, rows, keep, shown.append) == {"renamed": found["graded"]}
    assert graded.asked == 5
    assert examine_all({"graded": graded, "words": words}, rows, keep, shown.append) == found
    assert graded.asked == 5

    other = Graded(strictness=2)
    examine_all({"graded": other}, rows, keep, shown.append)
    assert other.asked == 5, "another constraint of that name"
    examine_all({"graded": graded}, {"people": labelled(rows="0:4")}, keep, shown.append)
    assert graded.asked == 9, "other rows"
