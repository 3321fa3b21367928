import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

import bridle.data.readers as readers
from bridle.data import ROW, DataSource, texts_of
from bridle.data.source import row_range
from bridle.errors import UserError

ROWS = [{"text": f"row {n}", "label": n % 3} for n in range(10)]


def jsonl(path: Path, rows=ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def fails(source: str | DataSource) -> str:
    """The message of the one-line error that reading ends in."""
    with pytest.raises(UserError) as caught:
        (DataSource(source) if isinstance(source, str) else source).read()
    message = str(caught.value)
    assert "\n" not in message
    return message


def save_jsonl(path):
    return jsonl(path / "rows.jsonl")


def save_array(path):
    return written(path / "rows.json", json.dumps(ROWS, indent=1))


def save_csv(path):
    return written(path / "rows.csv", "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS))


def save_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path / "rows.parquet")
    return str(path / "rows.parquet")


def save_folder(path):
    Dataset.from_list(ROWS).save_to_disk(path / "rows")
    return str(path / "rows")


@pytest.mark.parametrize("save", [save_jsonl, save_array, save_csv, save_parquet, save_folder])
def test_every_kind_of_file_gives_the_same_rows(save, tmp_path):
    dataset = DataSource(save(tmp_path)).read()
    assert dataset.remove_columns(ROW).to_list() == ROWS
    if save is not save_array:
        assert dataset[ROW][:] == list(range(1, 11))


def test_text_file_has_a_row_for_each_line(tmp_path):
    dataset = DataSource(written(tmp_path / "lines.txt", "one\r\n\ntwo \u2028 still two\n")).read()
    assert dataset["text"][:] == ["one", "", "two \u2028 still two"]


def test_folder_with_splits(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path / "d")
    assert len(DataSource(str(tmp_path / "d"), split="test").read()) == 2
    assert "no split 'dev'; it has 'train', 'test'" in fails(DataSource(str(tmp_path / "d"), split="dev"))


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = DataSource(jsonl(path)).read()
    second = DataSource(jsonl(path, [{"text": "another", "label": 0}])).read()
    assert first["text"][0] == "row 0"
    assert second["text"][:] == ["another"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("2:4", [2, 3]),
        ("0:80%", range(8)),
        ("90%:", [9]),
        (":-8", [0, 1]),
        ("-25%:", [7, 8, 9]),
        ("7:99", [7, 8, 9]),
    ],
)
def test_row_slices(rows, expected):
    assert list(row_range(rows, 10)) == list(expected)


@given(st.integers(0, 1000), st.decimals(0, 100, places=2))
def test_percentages_part_the_rows(total, percent):
    first, second = row_range(f":{percent}%", total), row_range(f"{percent}%:", total)
    assert [*first, *second] == list(range(total))


@pytest.mark.parametrize("rows", ["", "3", "1:2:3", "a:b", "10%-20%", "1.5:2", "9" * 5000 + ":", 630])
def test_bad_slices_are_refused_at_once(rows):
    with pytest.raises(UserError, match=r"^rows: .* is not a slice"):
        DataSource("rows.jsonl", rows=rows)


def test_rows_are_sliced_before_they_are_filtered(tmp_path):
    dataset = DataSource(jsonl(tmp_path / "rows.jsonl"), rows=":50%", where={"label": [1, 2]}).read()
    assert dataset["text"][:] == ["row 1", "row 2", "row 4"]
    assert dataset[ROW][:] == [2, 3, 5]


def test_filters_on_several_columns_and_types(tmp_path):
    rows = [{"text": "a", "kind": "x", "flag": True}, {"text": "b", "kind": "x", "flag": None}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    assert DataSource(path, where={"kind": "x", "flag": None}).read()["text"][:] == ["b"]


def test_where_bounds_numbers_and_leaves_out_what_is_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": str(value), "score": value} for value in (0.2, 0.5, 0.7, 0.9, None)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert DataSource(str(path), where={"score": {"above": 0.5}}).read()["text"][:] == ["0.7", "0.9"]
    assert DataSource(str(path), where={"score": {"above": 0.2, "below": 0.7}}).read()["text"][:] == ["0.5"]
    assert DataSource.parse(f"{path},score={{below: 0.5}}").read()["text"][:] == ["0.2"]
    for wrong in ({"over": 0.5}, {"above": "high"}, {"above": True}):
        with pytest.raises(UserError, match=r"^where: score: .* is not a condition; give \{above: NUMBER\}"):
            DataSource(str(path), where={"score": wrong})


def test_missing_filter_column_names_the_nearest(tmp_path):
    message = fails(DataSource(jsonl(tmp_path / "rows.jsonl"), where={"lable": 1}))
    assert message.endswith("has no column 'lable'; it has 'text', 'label'; did you mean 'label'?")
    message = fails(DataSource.parse(jsonl(tmp_path / "rows.jsonl") + ",row=0:3"))
    assert message.endswith("has no column 'row'; it has 'text', 'label'; did you mean the option rows=?")


def test_nothing_left_names_rows_and_filter(tmp_path):
    message = fails(DataSource(jsonl(tmp_path / "rows.jsonl"), rows="90%:", where={"label": 5}))
    assert message.endswith("rows=90%: and where={'label': 5} keep none of its 10 rows")


def test_parse_reads_the_command_line_form():
    source = DataSource.parse("FILE.csv,rows=80%:90%,label=0,kind=plain,text=comment")
    assert source == DataSource("FILE.csv", rows="80%:90%", where={"label": 0, "kind": "plain"}, text="comment")
    assert DataSource.parse("name:config,split=test") == DataSource("name:config", split="test")
    assert DataSource.parse("FILE,label=0,label=2").where == {"label": [0, 2]}


@pytest.mark.parametrize("text", ["FILE,label", "FILE,=3", "FILE,rows=x", "FILE,a=[", "FILE,a=.nan", ""])
def test_parse_refuses_what_is_no_source(text):
    with pytest.raises(UserError):
        DataSource.parse(text)


def test_named_columns_get_standard_names_and_fix_the_format(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"comment": "a", "text": "b", "messages": [], "label": 1}])
    dataset = DataSource(path, text="comment").read()
    assert dataset.remove_columns(ROW).to_list() == [{"text": "a", "label": 1}]


def test_named_columns_may_swap_names(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    dataset = DataSource(path, prompt="completion", completion="prompt").read()
    assert dataset.remove_columns(ROW).to_list() == [{"prompt": "b", "completion": "a"}]


def test_named_column_that_is_absent(tmp_path):
    message = fails(DataSource(jsonl(tmp_path / "rows.jsonl"), text="txt"))
    assert "has no column 'txt'; it has 'text', 'label'; did you mean 'text'?" in message


NESTED = [{"prompt": {"text": f"row {n}", "rude": 0.5}, "continuation": {"text": "more"}} for n in range(3)]


def save_nested_folder(path):
    Dataset.from_list(NESTED).save_to_disk(path / "rows")
    return str(path / "rows")


@pytest.mark.parametrize("save", [lambda path: jsonl(path / "rows.jsonl", NESTED), save_nested_folder])
@pytest.mark.parametrize("field", ["prompt", "text"])
def test_a_column_within_a_column_is_reached_by_a_dot(save, field, tmp_path):
    dataset = DataSource.parse(f"{save(tmp_path)},rows=1:,{field}=prompt.text").read()
    assert dataset[field][:] == ["row 1", "row 2"]
    assert dataset[ROW][:] == [2, 3]


def test_a_column_that_has_a_dot_in_its_name_comes_first(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"a.b": "itself", "a": {"b": "within"}}])
    assert DataSource(path, text="a.b").read()["text"][:] == ["itself"]


def test_a_column_within_a_column_that_no_row_has(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", NESTED)
    assert "has no column 'prompt.txt'; it has 'prompt', 'continuation'" in fails(DataSource(path, prompt="prompt.txt"))
    assert "has no column 'title.text'" in fails(DataSource(path, prompt="title.text"))


def test_rows_that_lack_the_inner_column_are_blank_and_wrong_ones_named(tmp_path):
    rows = [{"a": {"b": "x"}}, {"a": {}}, {"a": None}]
    assert texts_of(DataSource(jsonl(tmp_path / "blank.jsonl", rows), text="a.b")) == ["x"]
    with pytest.raises(UserError, match=r"row 2: column 'text' holds int, not text"):
        texts_of(DataSource(jsonl(tmp_path / "wrong.jsonl", [{"a": {"b": "x"}}, {"a": {"b": 5}}]), text="a.b"))


def test_named_columns_of_two_formats_are_refused():
    with pytest.raises(UserError, match=r"^prompt: is of another format than text"):
        DataSource("rows.jsonl", text="a", prompt="b")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", "", "holds no rows"),
        ("rows.jsonl", "\n\n", "holds no rows"),
        ("rows.jsonl", '{"text": "a"}\n\n{"text": \n', "row 3: malformed JSON: "),
        ("rows.jsonl", '{"text": "a"}\n["b"]\n', "row 2: expected a mapping of columns, found list"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "row 2: not UTF-8 text"),
        ("rows.jsonl", '{"text": "a"}'.encode("utf-16"), "row 1: not UTF-8 text"),
        ("rows.jsonl", "[" * 100_000, "row 1: malformed JSON: "),
        ("rows.jsonl", '{"n": ' + "9" * 30 + "}", "row 1: malformed JSON: 9999999999"),
        ("rows.json", '[{"text": "a"}, 5]', "row 2: expected a mapping of columns, found int"),
        ("rows.json", '[{"text": "a"},\n {"text"]', "malformed JSON: "),
        ("rows.csv", "", "holds no rows"),
        ("rows.csv", "text,label\n", "holds no rows"),
        ("rows.csv", "text,label\na,1\nb,2,3\n", "row 2: 3 values for 2 columns"),
        ("rows.csv", 'text,label\na,1\n"b,2\nc,3\n', "row 2: broken CSV: "),
        ("rows.csv", "text,text\na,b\n", "two columns share a name"),
        ("rows.csv", b"text\n\xff\n", "row 2: not UTF-8 text"),
        ("rows.parquet", "PAR1 it is not", "cannot read"),
        ("rows.tsv", "text\na\n", "not a kind of file known here; use one of .jsonl"),
    ],
)
def test_unreadable_files_are_named_in_one_line(name, content, expected, tmp_path):
    path = written(tmp_path / name, content)
    message = fails(path)
    assert path in message
    assert expected in message


def test_missing_files_and_folders_are_named(tmp_path, monkeypatch):
    assert fails(str(tmp_path / "no.jsonl")).endswith("no.jsonl: no such file")
    assert fails(str(tmp_path / "no")).endswith("no: no such file or folder")
    assert "is not a folder written by" in fails(str(tmp_path))


def test_hub_name_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert fails("nobody/nothing:config").startswith("nobody/nothing:config: no such file or folder, and not read")


def test_a_hub_name_may_begin_as_a_file_or_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readers, "load_dataset", lambda *names, split: Dataset.from_list([{"text": names[0]}]))
    (tmp_path / "forum.jsonl").touch()
    (tmp_path / "nobody").mkdir()
    assert [DataSource(name).read()["text"][0] for name in ("forum", "nobody/rows")] == ["forum", "nobody/rows"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert fails("forum").startswith("forum: no such file or folder; did you mean forum.jsonl? It is not read from")


def test_json_columns_found_late_and_of_mixed_types_are_kept(tmp_path):
    rows = [{"text": "a"}] * 1500 + [{"text": "b", "id": 7, "n": 1}, {"text": "c", "id": "x", "n": 0.5}]
    tail = DataSource(jsonl(tmp_path / "rows.jsonl", rows), rows="1499:").read().remove_columns(ROW)
    assert tail.to_list() == [
        {"text": "a", "id": None, "n": None},
        {"text": "b", "id": 7, "n": 1.0},
        {"text": "c", "id": "x", "n": 0.5},
    ]


def test_lone_surrogates_are_replaced_and_pairs_kept(tmp_path):
    path = written(tmp_path / "rows.jsonl", r'{"text": "a\ud800b \ud83d\ude00", "more": ["\uDFFF"]}')
    row = DataSource(path).read()[0]
    assert row["text"] == "a?b \U0001f600"
    assert row["more"] == ["?"]


def test_hostile_but_legal_text_survives(tmp_path):
    texts = ["\x00", "\u202eright to left", "\u2028", "x" * 1_000_000, "\U0001f469\u200d\U0001f4bb"]
    assert DataSource(jsonl(tmp_path / "rows.jsonl", [{"text": t} for t in texts])).read()["text"][:] == texts


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    assert DataSource(written(tmp_path / "a.csv", "\ufefftext\nhello\n")).read()["text"][:] == ["hello"]
    assert DataSource(written(tmp_path / "a.jsonl", '\ufeff{"text": "hello"}')).read()["text"][:] == ["hello"]


def test_csv_types_are_found_but_text_stays_text(tmp_path):
    content = (
        'text,label,score,flag,note\n007,1,1,true,\n"a ""b""\nc",,0.5,false,NA\n' + "x" * 300_000 + ",3,2,true,7\n"
    )
    rows = DataSource(written(tmp_path / "a.csv", content)).read().remove_columns(ROW).to_list()
    assert rows[:2] == [
        {"text": "007", "label": 1, "score": 1.0, "flag": True, "note": ""},
        {"text": 'a "b"\nc', "label": None, "score": 0.5, "flag": False, "note": "NA"},
    ]
    assert len(rows[2]["text"]) == 300_000


def test_csv_text_that_looks_like_numbers_stays_text(tmp_path):
    path = written(tmp_path / "a.csv", "completion,body,label\n007,1,1\n8,2,2\n")
    rows = DataSource(path).read().remove_columns(ROW).to_list()
    assert rows[0] == {"completion": "007", "body": 1, "label": 1}
    assert DataSource(path, text="body").read()["text"][:] == ["1", "2"]


def test_errors_name_the_row_of_the_file_and_not_of_the_selection(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "n": n} for n in range(8)] + [{"text": 5, "n": 9}])
    with pytest.raises(UserError, match=r"rows.jsonl row 9: column 'text' holds int"):
        texts_of(DataSource(path, rows="50%:", where={"n": [7, 9]}))


def test_texts_of_leaves_out_blank_rows(tmp_path, caplog):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": " \n"}, {"text": None}, {"text": "b"}])
    with caplog.at_level(logging.WARNING):
        assert texts_of(DataSource(path)) == ["a", "b"]
    assert "left out 2 of 4 rows that hold no text" in caplog.text


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a"}, {"text": 5}], "row 2: column 'text' holds int, not text"),
        ([{"text": ""}], "none of its 1 rows holds a text"),
        ([{"body": "a"}], "has no column 'text'; it has 'body'"),
    ],
)
def test_texts_of_names_what_is_wrong(rows, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        texts_of(DataSource(jsonl(tmp_path / "rows.jsonl", rows)))


@pytest.mark.shared
def test_real_files_are_read(shared):
    hateful = DataSource(str(shared / "data" / "toxigen.jsonl"), rows=":90%", where={"label": 1}).read()
    assert set(hateful["label"]) == {1}
    assert 100 < len(hateful) < 3000
