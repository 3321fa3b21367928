"""Filtration: which rows are left, and what of a row is scored."""

from dataclasses import asdict

import pytest
from datasets import Dataset

from bridle.baselines.filtration import Filtered, compliant_rows
from bridle.constraints import Constraint, Regex
from bridle.data import DataSource
from bridle.errors import UserError

RUDE = Regex("grumblefish", name="polite")


class Recorder(Constraint):
    """Complies unless a text is rude, has no answer to a question, and remembers what it was asked."""

    name = "recorder"

    def __init__(self):
        self.asked: list[str] = []

    def _score(self, texts):
        self.asked += texts
        return [None if "?" in text else float("grumblefish" not in text) for text in texts]


def test_violating_and_missing_rows_go_and_are_counted_apart():
    texts = ["the kettle sang", "you grumblefish", "is it late?", "rain on the roofs", "who knows?"]
    kept, counts = compliant_rows(Dataset.from_dict({"text": texts}), Recorder(), "corpus")
    assert kept["text"][:] == ["the kettle sang", "rain on the roofs"]
    assert asdict(counts) == {"kept": 2, "rejected": 1, "missing": 2}


def test_rows_keep_their_columns_and_their_numbers_in_the_file(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("one\nyou grumblefish\nthree\n\nfive\n", encoding="utf-8")
    rows = DataSource(str(path), shuffle=3).read()
    kept, counts = compliant_rows(rows, RUDE, str(path))
    assert counts == Filtered(kept=3, rejected=1, missing=0)  # the blank line is none of them
    assert kept.column_names == rows.column_names
    expected = [row for row in rows if row["text"] in ("one", "three", "five")]
    assert list(kept) == expected


def test_a_prompt_is_not_what_the_model_learns_to_say():
    recorder = Recorder()
    rows = {"prompt": ["say grumblefish", "say hello"], "completion": ["hello", "you grumblefish"]}
    kept, counts = compliant_rows(Dataset.from_dict(rows), recorder, "corpus")
    assert recorder.asked == ["hello", "you grumblefish"]
    assert kept["completion"][:] == ["hello"]
    assert counts == Filtered(kept=1, rejected=1, missing=0)


def turn(role: str, content: str | None) -> dict:
    return {"role": role, "content": content}


def test_of_a_chat_the_assistant_turns_are_scored():
    recorder = Recorder()
    chats = [
        [turn("user", "you grumblefish"), turn("assistant", "good day"), turn("assistant", None)],
        [turn("user", "good day"), turn("assistant", "ah"), turn("user", "eh"), turn("assistant", "grumblefish")],
    ]
    kept, _ = compliant_rows(Dataset.from_dict({"messages": chats}), recorder, "corpus")
    assert recorder.asked == ["good day", "ah\ngrumblefish"]
    assert kept["messages"][:] == chats[:1]


def test_a_completion_may_be_a_chat():
    recorder = Recorder()
    rows = {"prompt": [[turn("user", "hello")]], "completion": [[turn("assistant", "good day")]]}
    compliant_rows(Dataset.from_dict(rows), recorder, "corpus")
    assert recorder.asked == ["good day"]


@pytest.mark.parametrize(
    ("rows", "read"),
    [
        ({"text": ["good day"]}, "good day"),
        ({"prompt": ["say hello: "], "completion": ["hello"]}, "say hello: hello"),
        (
            {"prompt": [[turn("user", "hello")]], "completion": [[turn("assistant", "good day")]]},
            "user: hello\nassistant: good day",
        ),
        (
            {"messages": [[turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]]},
            "user: a\nassistant: b\nuser: c\nassistant: d",
        ),
    ],
)
def test_a_constraint_that_reads_prompts_gets_the_row_s(rows, read):
    recorder = Recorder()
    recorder.reads = "prompt+completion"
    compliant_rows(Dataset.from_dict(rows), recorder, "corpus")
    assert recorder.asked == [read]


def test_no_row_left_is_an_error_that_says_why():
    rows = Dataset.from_dict({"text": ["you grumblefish", "really?"]})
    with pytest.raises(UserError, match=r"corpus: none of its 2 rows complies with 'recorder' \(1 violate, 1 got no"):
        compliant_rows(rows, Recorder(), "corpus")
