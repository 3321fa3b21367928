"""Data as people have it: ShareGPT and Alpaca, several files, compressed files."""

import gzip
import json

import pyarrow as pa
import pytest

from bridle.data import DataSource, Domain
from bridle.errors import UserError
from chats import write_rows

SAID = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "A hat?"}, {"from": "gpt", "value": "No."}]
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "A hat?"},
    {"role": "assistant", "content": "No."},
]
TASK = {"instruction": "Name a {fish}.", "input": "", "output": "Grumblefish."}


def rows_of(path, **options):
    return list(DataSource(path if isinstance(path, list) else str(path), **options).read())


class TestShareGpt:
    def test_conversations_become_messages(self, tmp_path):
        file = write_rows(tmp_path / "a.jsonl", [{"id": "x", "conversations": SAID}, {"conversations": MESSAGES}])
        assert [row["messages"] for row in rows_of(file)] == [MESSAGES, MESSAGES]
        assert Domain(str(file), name="talk").read().column_names == ["id", "__row__", "messages"]

    @pytest.mark.parametrize("speaker", [["human"], None, 7])
    def test_a_speaker_that_is_none_is_named(self, tmp_path, speaker):
        file = write_rows(tmp_path / "a.jsonl", [{"conversations": [{"from": speaker, "value": "hello"}]}])
        with pytest.raises(UserError, match="row 1: a turn is from"):
            rows_of(file)

    def test_a_column_of_system_prompts_comes_first_and_tools_stay(self, tmp_path):
        row = {"system": "Be kind.", "conversations": SAID[1:], "tools": []}
        (found,) = rows_of(write_rows(tmp_path / "a.jsonl", [row]))
        assert found["messages"] == MESSAGES
        assert found["tools"] == []

    def test_it_can_be_forced_where_there_is_another_column(self, tmp_path):
        file = write_rows(tmp_path / "a.jsonl", [{"text": "a", "conversations": SAID}])
        assert rows_of(file)[0]["text"] == "a"
        (row,) = rows_of(file, format="sharegpt")
        assert "text" not in row
        assert row["messages"] == MESSAGES


class TestAlpaca:
    def test_instructions_become_prompt_and_completion(self, tmp_path):
        file = write_rows(tmp_path / "a.jsonl", [TASK, TASK | {"input": "Old {ones}."}])
        first, second = rows_of(file)
        assert first["prompt"].endswith("\n\n### Instruction:\nName a {fish}.\n\n### Response:\n")
        assert "### Input:\nOld {ones}.\n\n### Response:" in second["prompt"]
        assert first["completion"] == second["completion"] == "Grumblefish."

    def test_in_a_table_without_inputs_numbers_stay_text(self, tmp_path):
        (tmp_path / "a.csv").write_text("instruction,output\nCount.,5\n")
        (row,) = rows_of(tmp_path / "a.csv")
        assert row["completion"] == "5"


class TestFiles:
    def test_a_pattern_is_its_files_in_order_and_rows_count_on(self, tmp_path):
        for name in ("b", "a"):
            write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number}"} for number in (1, 2)])
        rows = rows_of(tmp_path / "*.jsonl")
        assert [(row["text"], row["__row__"]) for row in rows] == [("a 1", 1), ("a 2", 2), ("b 1", 3), ("b 2", 4)]
        assert rows_of(tmp_path / "*.jsonl", rows="3:") == rows[3:]
        with pytest.raises(UserError, match="no file matches this pattern"):
            rows_of(tmp_path / "*.csv")

    def test_a_list_is_read_as_it_stands_whatever_the_kinds_and_columns(self, tmp_path):
        write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 1}])
        (tmp_path / "b.txt").write_text("b\n")
        write_rows(tmp_path / "c.jsonl", [{"text": "c", "label": "rude"}])
        rows = rows_of([str(tmp_path / name) for name in ("c.jsonl", "b.txt", "a.jsonl")])
        assert [(row["text"], row["label"]) for row in rows] == [("c", "rude"), ("b", None), ("a", 1)]

    def test_a_file_whose_name_is_a_pattern(self, tmp_path):
        write_rows(tmp_path / "[a].jsonl", [{"text": "a"}])
        assert len(rows_of(tmp_path / "[a].jsonl")) == 1

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl", json.dumps({"text": "a kettle"}) + "\n"),
            ("a.json", json.dumps([{"text": "a kettle"}])),
            ("a.csv", "text\na kettle\n"),
            ("a.txt", "a kettle\n"),
        ],
    )
    def test_compressed_files_hold_the_same_rows(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        (tmp_path / f"{name}.zst").write_bytes(pa.Codec("zstd").compress(content.encode(), asbytes=True))
        plain = rows_of(tmp_path / name)
        assert plain[0]["text"] == "a kettle"
        assert rows_of(tmp_path / f"{name}.gz") == rows_of(tmp_path / f"{name}.zst") == plain
