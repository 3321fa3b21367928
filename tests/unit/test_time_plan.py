"""The seconds that `bridle plan --measured` and `bridle check` predict."""

import json

import pytest

from bridle.errors import UserError
from bridle.recipes.recipe import load_recipe
from bridle.recipes.time_plan import TimePlan, time_plan

RECORDS = [
    {"step": 2, "round": 1, "rude/seconds_sampling": 4.0, "rude/seconds_scoring": 1.0, "rude/seconds_fitting": 9.0}
    | {"seconds_policy": 5.0, "seconds": 19.0, "max_steps": 4, "rounds": 2},
    {"step": 4, "round": 2, "rude/seconds_sampling": 6.0, "rude/seconds_scoring": 2.0, "rude/seconds_fitting": 3.0}
    | {"seconds_policy": 7.0, "seconds": 37.0, "max_steps": 4, "rounds": 2},
]


@pytest.fixture
def run(recipe, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe().read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return folder


def test_the_same_recipe_takes_the_same_time(recipe, run):
    found = time_plan(load_recipe(recipe()), run)
    assert found.rounds == [
        {"sampling": 4, "scoring": 1, "fitting R": 9},
        {"sampling": 6, "scoring": 2, "fitting R": 3},
    ]
    assert (found.updates, found.update, found.whole) == (4, 3.0, 14 + 11 + 12)


def test_it_is_in_proportion(recipe, run):
    changed = recipe(rollouts_per_round=64, max_new_tokens=16, rounds=3, per_device_train_batch_size=8, max_steps=10)
    first, *later = (found := time_plan(load_recipe(changed), run)).rounds
    assert first == {"sampling": 16, "scoring": 2, "fitting R": 36}
    assert later == [{"sampling": 24, "scoring": 4, "fitting R": 12}] * 2
    assert (found.updates, found.update) == (10, 6.0)


@pytest.mark.parametrize(
    ("first_round", "rounds", "whole"),
    [
        ("wait", 1, 14 + 12),
        ("wait", 2, 14 + 12),  # R_1 serves both rounds
        ("wait", 4, (14 + 3) + 11 + 11 + 3),
        ("train", 1, 12),
        ("train", 4, 14 + 11 + 11 + 3),
    ],
)
def test_in_the_parallel_schedule_r_is_fitted_beside_updates_but_at_the_ends(recipe, run, first_round, rounds, whole):
    path = recipe(schedule="parallel", parallel={"first_round": first_round}, rounds=rounds)
    assert time_plan(load_recipe(path), run).whole == whole


def test_what_overlaps_is_said(recipe, run):
    *_, last = time_plan(load_recipe(recipe(schedule="parallel", rounds=4)), run).lines()
    assert "4 updates and 4 rounds, R fitted beside the updates in 2 of them" in last


@pytest.mark.parametrize(
    ("changes", "records", "said"),
    [
        ({"max_steps": -1}, RECORDS, "max_steps: name the number of updates"),
        ({}, RECORDS[:0], "no round of a run has ended there"),
    ],
)
def test_what_cannot_be_planned_is_refused(recipe, run, changes, records, said):
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        time_plan(load_recipe(recipe(**changes)), run)


def test_a_parallel_run_is_refused(recipe, run):
    (run / "recipe.yaml").write_text(recipe(schedule="parallel").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match="its phases overlapped"):
        time_plan(load_recipe(recipe()), run)


def test_rounds_that_are_alike_share_a_line():
    alike = {"sampling": 4.0, "scoring": 5.0, "fitting R": 1.0}
    assert [*TimePlan([{"sampling": 2.0, "scoring": 0.0051}], 0.02, 1).lines()] == [
        "round 1: 2.01 s: sampling 2 s (100%), scoring 5.1 ms (0%)",
        "an update: 20 ms",
        "the run takes about 2 s: 1 update and 1 round, without saving",
    ]
    assert [*TimePlan([alike | {"scoring": 0.0}, alike, alike], 0.5, 4).lines()] == [
        "round 1: 5 s: sampling 4 s (80%), scoring 0 s (0%), fitting R 1 s (20%)",
        "rounds 2 to 3, each: 10 s: sampling 4 s (40%), scoring 5 s (50%), fitting R 1 s (10%)",
        "an update: 0.5 s",
        "the run takes about 27 s: 4 updates and 3 rounds, without saving",
    ]


def test_the_command_takes_a_run(bridle, recipe, tmp_path):
    path = recipe()
    code, _, err = bridle("train", path, "--output_dir", tmp_path / "run")
    assert code == 0, err
    code, out, err = bridle("plan", path, "--measured", tmp_path / "run", "--max_steps", 100)
    assert code == 0, err
    assert "the run takes about" in out
    assert "100 updates and 2 rounds" in out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = time_plan(load_recipe(path), tmp_path / "run")
    assert 0 < found.whole <= records[-1]["seconds"]
