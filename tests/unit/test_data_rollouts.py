import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridle.data import Rollout, read_rollouts, write_rollouts
from bridle.errors import UserError


def rollout(**fields):
    defaults = {
        "prompt_ids": [1, 7],
        "completion_ids": [8, 2],
        "prompt": "The old kettle",
        "completion": " sings",
        "round": 1,
        "regulariser": "tales",
        "model_hash": "abc",
        "constraint": "non-toxic",
    }
    return Rollout(**(defaults | fields))


SCORED = rollout(value=0.25, complies=False)
MISSING = rollout(reason="the scorer timed out")
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates and control characters too


def test_rollouts_come_back_as_they_were(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, [SCORED, MISSING])
    assert read_rollouts(path) == [SCORED, MISSING]
    write_rollouts(path, iter([]))
    assert read_rollouts(str(path)) == []


@given(text=ANY_TEXT, value=st.none() | st.floats(0, 1))
def test_any_text_and_score_survives(text, value, tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts") / "r.jsonl"
    kept = rollout(completion=text, reason=text, value=value)
    write_rollouts(path, [kept, SCORED])
    assert read_rollouts(path) == [kept, SCORED]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, [SCORED])

    def interrupted():
        yield MISSING
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rollouts(path, interrupted())
    assert read_rollouts(path) == [SCORED]
    assert os.listdir(tmp_path) == ["rollouts.jsonl"]


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, steps = tmp_path / "rollouts.jsonl", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append(("fsync", path.exists())), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append(("replace", path.exists())), replace(*names)))
    write_rollouts(path, [SCORED])
    assert steps == [("fsync", False), ("replace", False)]
    assert path.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"value": float("nan")},
        {"value": 1.5},
        {"value": -0.1},
        {"value": "0.5"},
        {"complies": 1},
        {"prompt_ids": [1.0]},
        {"prompt_ids": [True]},
        {"completion_ids": [-1]},
        {"completion_ids": "12"},
        {"completion_ids": [np.int64(3)]},
        {"completion": None},
        {"round": "1"},
    ],
)
def test_what_is_no_label_or_token_is_refused(fields):
    with pytest.raises(UserError):
        rollout(**fields)


WHOLE = json.dumps(vars(SCORED))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[1]",
        b"5",
        WHOLE[:-20].encode(),
        WHOLE.replace('"round"', '"rund"').encode(),
        WHOLE.replace("0.25", "NaN").encode(),
        WHOLE.replace("false", '"no"').encode(),
        WHOLE.replace("sings", "\xff").encode("latin-1"),
        b"[" * 100_000,
    ],
)
def test_a_broken_line_names_file_and_row(line, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(WHOLE.encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError) as caught:
        read_rollouts(path)
    assert str(caught.value).startswith(f"{path} row 2 is not a rollout: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*no.jsonl: No such file"):
        read_rollouts(tmp_path / "no.jsonl")
