"""The lines that people read while a run goes on."""

import json
from types import SimpleNamespace

import pytest

from bridle.recipes.metrics import MetricsFile, TrainingProgress, round_line


def record(*names, kl=3e-5, **more):
    of_each = {"compliance": 0.65625, "compliance_low": 0.4829, "compliance_high": 0.7963, "r_ece": 0.241, "lambda": 40}
    measured = {f"{name}/{key}": value for name in names for key, value in of_each.items()}
    return {"round": 1, **measured, "ce": 5.90712, **{f"kl/{name}": kl for name in names}, **more}


@pytest.mark.parametrize("names", [["rude"], ["toxigen", "encyclopaedia"], ["a" * 200, *map(str, range(9))]])
def test_a_round_s_lines_fit_a_hundred_columns(names):
    lines = round_line(record(*names, kl=1.23456e-17), 1000).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line.startswith(" ") for line in lines[1:])
    assert sum(line.count("complies 0.656 [0.483, 0.796]") for line in lines) == len(names)


def test_one_regulariser_is_one_line():
    assert round_line(record("rude"), 2) == (
        "round 1/2  CE 5.907  rude: complies 0.656 [0.483, 0.796], R's ECE 0.241, λ·KL 0.0012"
    )


@pytest.mark.parametrize(
    ("kl", "shown"), [(0.02, "λ·KL 0.8"), (3e-9, "λ·KL 1.2e-07"), (0.0, "λ·KL 0"), (None, "0.241")]
)
def test_a_small_divergence_is_not_zero(kl, shown):
    assert round_line(record("rude", kl=kl), 2).endswith(shown)


def test_retention_has_a_divergence_alone():
    line = round_line({"round": 2, "plain/lambda": 2.0, "ce": 1.0, "kl/plain": 0.25}, 2)
    assert line == "round 2/2  CE 1.000  plain: λ·KL 0.5"


def test_a_round_shows_what_is_held():
    line = round_line({"round": 1, "plain/lambda": 2.0, "ce": 1.0, "kl/plain": 0.25, "held_rows": 0.2}, 2)
    assert line == "round 1/2  CE 1.000  20% of the rows held  plain: λ·KL 0.5"


@pytest.mark.parametrize("disabled", [False, True])
def test_progress_is_shown_unless_it_is_disabled(disabled, capsys):
    args, state = SimpleNamespace(disable_tqdm=disabled, rounds=2), SimpleNamespace(max_steps=3, global_step=0)
    progress = TrainingProgress()
    progress.on_train_begin(args, state, None)
    progress.on_log(args, state, None, logs=record("rude"))
    progress.on_train_end(args, state, None)
    assert ("round 1/2" in capsys.readouterr().err) != disabled


def test_a_file_that_is_named_by_a_text_goes_on(tmp_path):
    """As in the README: a resumed run reads the records before its checkpoint."""
    args, name = SimpleNamespace(rounds=2), str(tmp_path / "metrics.jsonl")
    state = SimpleNamespace(max_steps=3, global_step=0, log_history=[])
    for step in (0, 2):
        state.global_step = step
        writer = MetricsFile(name)
        writer.on_train_begin(args, state, None)
        for loss in (3.0, 2.0):
            state.global_step += 1
            state.log_history.append({"loss": loss})
            writer.on_log(args, state, None, logs={"loss": loss})
    with open(name) as file:
        assert [json.loads(row)["step"] for row in file] == [1, 2, 3, 4]
