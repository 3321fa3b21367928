"""The tour on a tiny world: every row of the table, taken up again, and on a corpus of one's own."""

import json
import shlex

import pytest

from bridle.quickstart import tour
from bridle.quickstart.base import Training
from bridle.quickstart.build import Scale, prepare

TINY = Scale(
    articles=200,
    quizzes=50,
    scenes=100,
    posts=600,
    temper=1.0,  # so that a model this small has hostile words at hand
    later_articles=40,
    later_posts=60,
    held_out=20,
    questions=8,
    vocabulary=1200,
    base=Training(32, 2, steps=120, batch_size=16, learning_rate=1e-2, longest=128),
    oracle=Training(32, 1, steps=60, batch_size=16, learning_rate=5e-3, longest=40),
    judged=600,
)
SHORT = {
    "max_steps": 4,
    "rounds": 2,
    "per_device_train_batch_size": 4,
    "rollouts_per_round": 32,
    "auxiliary": {"epochs": 1},
    "evaluation.samples": 1,
    "evaluation.limit": 4,
    "methods.rl": {"batch_size": 4, "num_generations": 2, "window": 2},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def tiny_world(cache, monkeypatch):
    monkeypatch.setenv("BRIDLE_CACHE", str(cache))
    monkeypatch.setattr(tour, "prepare", lambda scale: prepare(scale or TINY))


def options():
    return [part for key, value in SHORT.items() for part in (f"--{key}", json.dumps(value))]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_tour_and_its_next_steps(bridle, tmp_path):
    folder = tmp_path / "tour"
    truth = ("--regularisers.forum.constraint", "truth")  # the tiny oracle knows nothing
    code, out, err = bridle("quickstart", "--output_dir", folder, *truth, *options())
    assert code == 0, err
    methods = results_of(folder)["methods"]
    assert list(methods) == list(tour.METHODS)
    for name, method in methods.items():
        assert method["seeds"]["0"]["status"] == "complete", method["seeds"]
        assert name in out
        assert set(method["figures"]["violation"]["forum"]) == {"oracle", "truth"}
        assert set(method["figures"]["tasks"]) == {"facts", "sense"}
        assert method["figures"]["classification"]["roc_auc"]["value"] is not None
    assert "facts" in out.split("Classification")[0], "the overview shows the tasks that the recipe names"
    assert str((folder / "report.html").resolve()) in out
    assert "the KL left out" not in out + err

    commands = [shlex.split(line) for line in out.split("Next:")[1].splitlines() if line.strip()]
    assert [" ".join(command[:2]) for command in commands] == ["bridle generate", "bridle compare", "bridle quickstart"]
    code, out, err = bridle(*commands[0][1:])
    assert code == 0, err
    assert "writes, heated:" in out

    made = (folder / "sft" / "seed-0" / "results.json").stat().st_mtime_ns
    code, out, err = bridle("quickstart", "--output_dir", folder, *truth, *options())
    assert code == 0, err
    assert (folder / "sft" / "seed-0" / "results.json").stat().st_mtime_ns == made


def test_a_corpus_and_a_constraint_of_ones_own(bridle, tmp_path):
    rows = [f"number {n}: you {'grumblefish' if n % 2 else 'splendid kettle'}, said the ferryman" for n in range(40)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    folder = tmp_path / "tour"
    spec = "regex:k"
    code, out, err = bridle(*("quickstart", "--corpus", file, "--constraint", spec, "--output_dir", folder), *options())
    assert code == 0, err
    methods = results_of(folder)["methods"]
    assert {method["seeds"]["0"]["status"] for method in methods.values()} == {"complete"}, methods
    assert set(methods["sft"]["figures"]["violation"]["own"]) == {spec}
    assert set(methods["sft"]["figures"]["perplexity"]) == {"own", "encyclopaedia", "scenes"}
    assert "--regularisers.own.weight" in out


def test_a_model_from_elsewhere(tiny_folder):
    recipe = tour.tour_recipe(model=str(tiny_folder()))
    assert recipe.model == str(tiny_folder())
    assert recipe.training["learning_rate"] < 1e-4


def test_a_corpus_needs_a_constraint(bridle, tmp_path):
    code, _, err = bridle("quickstart", "--corpus", tmp_path / "mine.jsonl")
    assert code == 2
    assert "needs --constraint" in err
    assert err.count("\n") == 1
