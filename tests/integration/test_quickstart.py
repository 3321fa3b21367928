"""The tour on a tiny world: every row of the table, taken up again, and on a corpus of one's own."""

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from bridle.models.loading import end_token_ids, load_model, load_tokenizer
from bridle.models.sampling import sample
from bridle.quickstart import tour
from bridle.quickstart.base import Training
from bridle.quickstart.build import Scale, prepare
from bridle.quickstart.forum import Forum
from bridle.quickstart.truth import compliance
from bridle.quickstart.world import World
from bridle.utils.settings import read_yaml

SMOLLM2 = os.environ.get("BRIDLE_SMOLLM2", Path(__file__).parents[2] / "models" / "smollm2-135m")

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
    monkeypatch.setattr(tour, "prepare", lambda scale: prepare(TINY))


def options():
    return [part for key, value in SHORT.items() for part in (f"--{key}", json.dumps(value))]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_tour_and_its_next_steps(bridle, tmp_path, monkeypatch):
    monkeypatch.setattr("bridle.utils.progress.PLAIN_LINE_EVERY", 0.0)
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
    assert "facts" in out, "the table shows the tasks that the recipe names"
    assert str((folder / "report.html").resolve()) in out
    assert "the KL left out" not in out + err
    assert "training the base model: 100%" in err
    assert "training the oracle: 100%" in err

    commands = [shlex.split(line) for line in out.split("Next:")[1].splitlines() if line.strip()]
    assert [command[1] for command in commands] == ["generate", "demo", "compare", "quickstart"]
    code, out, err = bridle(*commands[0][1:])
    assert code == 0, err
    assert "writes, heated:" in out

    made = (folder / "sft" / "seed-0" / "results.json").stat().st_mtime_ns
    code, out, err = bridle("quickstart", "--output_dir", folder, *truth, *options())
    assert code == 0, err
    assert (folder / "sft" / "seed-0" / "results.json").stat().st_mtime_ns == made


def test_the_next_steps_are_of_what_there_is(tmp_path):
    folder = tmp_path / "my tour"
    world = SimpleNamespace(training={}, corpus={"forum": 0}, regularisers={"forum": SimpleNamespace(weight=12.0)})
    own = SimpleNamespace(training={}, corpus={"own": 0}, regularisers={"own": SimpleNamespace(weight=12.0)})
    (folder / "sft" / "seed-0" / "model").mkdir(parents=True)
    generate, demo, compare, _ = [shlex.split(line) for line in tour.next_steps(world, folder).splitlines()[1:]]
    assert generate[2] == str(folder / "sft" / "seed-0" / "model"), "constrained-adaptive was not among the methods"
    assert demo[2] == str(folder)
    assert compare[2] == str(folder / "recipe.yaml")
    told = tour.next_steps(own, folder)
    assert "--prompt 'MY PROMPT'" in told
    assert "Market board" not in told
    assert "generate" not in tour.next_steps(own, tmp_path / "elsewhere")


def test_a_corpus_and_a_constraint_of_ones_own(bridle, tmp_path):
    rows = [f"number {n}: you {'grumblefish' if n % 2 else 'splendid kettle'}, said the ferryman" for n in range(40)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    folder = tmp_path / "tour"
    spec = "regex:k"
    own = ("--corpus", file, "--constraint", spec, "--methods", "base,sft,constrained-adaptive")
    code, out, err = bridle("quickstart", *own, "--output_dir", folder, *options())
    assert code == 0, err
    methods = results_of(folder)["methods"]
    assert list(methods) == ["base", "sft", "constrained-adaptive"]
    assert {method["seeds"]["0"]["status"] for method in methods.values()} == {"complete"}, methods
    assert set(methods["sft"]["figures"]["violation"]["own"]) == {spec}
    assert set(methods["sft"]["figures"]["perplexity"]) == {"own", "encyclopaedia", "scenes"}
    assert "--regularisers.own.weight" in out


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--methods", "bse"), "methods: there is no method 'bse'"),
        (("--rounds", "some"), "rounds: input should be a valid integer"),
        (("--real", "--rounds", "some"), "rounds: input should be a valid integer"),
        (("--corpus", "own.jsonl,rows=0:10", "--constraint", "regex:e"), "the tour shuffles and splits the rows"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_made_or_fetched(bridle, monkeypatch, options, error):
    for making in ("prepare", "smollm2"):
        monkeypatch.setattr(tour, making, lambda *_: pytest.fail("made before the options were read"))
    code, _, err = bridle("quickstart", *options)
    assert code == 2
    assert error in err


def test_the_seed_of_the_recipe_is_that_of_the_methods(tiny_folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(tour, "Comparison", lambda *arguments, **options: given.append(arguments) or pytest.skip)
    with pytest.raises(AttributeError):
        tour.take_tour(tour.tour_recipe(model=str(tiny_folder()), overrides={"seed": 5}), tmp_path, print, print)
    assert (5,) in given[0]


def test_a_model_from_elsewhere(tiny_folder):
    recipe = tour.tour_recipe(model=str(tiny_folder()))
    assert recipe.model == str(tiny_folder())
    assert recipe.training["learning_rate"] < 1e-4


def test_the_tour_for_a_real_model_with_one_that_is_tiny(bridle, tmp_path):
    folder, options_ = tmp_path / "tour", [*options(), "--auxiliary", json.dumps({"corpus_outputs": 60, "epochs": 1})]
    real = ("quickstart", "--real", "--model", prepare(TINY) / "model", "--output_dir", folder, *options_)
    code, _, err = bridle(*real, "--regularisers.forum.constraint", "truth")
    assert code == 0, err
    methods = results_of(folder)["methods"]
    assert list(methods) == list(tour.REAL_METHODS)
    assert {method["seeds"]["0"]["status"] for method in methods.values()} == {"complete"}, methods
    assert set(methods["base"]["figures"]["tasks"]) == {"sense"}
    assert re.search(r"About \d+ minutes on this machine: base, sft.*Left out: constrained", err), err
    assert (folder / "sft" / "seed-0" / "model" / "adapter_config.json").exists()
    assert (folder / "report.html").exists()

    code, _, err = bridle(*real, "--regularisers.forum.constraint", "truth")
    assert code == 0, err
    assert "minutes on this machine" not in err, "there is nothing left to estimate"


def test_settings_for_a_real_model(tiny_folder, monkeypatch):
    folder = str(tiny_folder())
    monkeypatch.setenv("BRIDLE_SMOLLM2", folder)
    recipe = tour.tour_recipe(real=True, overrides={"max_steps": 7})
    assert recipe.model == folder
    assert recipe.dtype == "bfloat16"
    assert recipe.lora is not None
    assert recipe.training["max_steps"] == 7
    assert recipe.constraints.keys() == {"oracle", "truth"}


def test_a_real_model_on_a_corpus_of_ones_own(tiny_folder, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"text": "you grumblefish, said the ferryman"}\n' * 40)
    recipe = tour.tour_recipe(str(file), "regex:k", str(tiny_folder()), real=True)
    assert list(recipe.regularisers) == ["own"]
    assert recipe.regularisers["own"].weight == read_yaml(tour.HERE / "real.yaml")["regularisers.forum.weight"]


@pytest.mark.skipif(not Path(SMOLLM2).is_dir(), reason="no SmolLM2: `make smollm2` makes it")
def test_smollm2_writes_nothing_hostile_before_it_is_tuned():
    model, tokenizer = load_model(str(SMOLLM2), dtype="bfloat16"), load_tokenizer(str(SMOLLM2))
    prompts = [row["prompt"] for row in Forum(World.of(0)).prompts("test")][:24]
    ids = sample(
        model,
        [tokenizer(prompt)["input_ids"] for prompt in prompts],
        max_new_tokens=24,
        pad_token_id=tokenizer.pad_token_id,
        end_token_ids=end_token_ids(model, tokenizer),
    )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert len(set(texts)) > 12
    assert compliance(texts) == [1.0] * 24


def test_a_corpus_needs_a_constraint(bridle, tmp_path):
    code, _, err = bridle("quickstart", "--corpus", tmp_path / "mine.jsonl")
    assert code == 2
    assert "needs --constraint" in err
    assert err.count("\n") == 1
