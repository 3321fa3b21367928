"""`bridle check`: a dry run shows what there is to see, and leaves nothing behind."""

import json
import re

import pytest
import yaml

from bridle.recipes.dry_run import unsaved
from bridle.recipes.recipe import build_recipe
from conftest import SENTENCES


@pytest.fixture
def dry(bridle, recipe, tmp_path, monkeypatch):
    """A recipe with a third domain, of prompts and completions, and folders that are watched."""
    for variable, folder in {"TMPDIR": "temporary", "BRIDLE_CACHE": "cache", "HOME": "home"}.items():
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.setattr("tempfile.tempdir", None)  # TMPDIR is read anew
    monkeypatch.chdir(tmp_path)
    path = recipe()
    mapping = yaml.safe_load(path.read_text())
    rows = [{"prompt": text[:9], "completion": f"{text[9:]} \x1b]0;title\x07"} for text in SENTENCES]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapping["corpus"]["asked"] = {"path": "asked.jsonl", "weight": 2.0}
    mapping["constraints"] = {
        "no w": {"type": "regex", "pattern": "w", "cache": "labels.sqlite"},
        "no ladder": {"type": "words", "words": ["ladder"]},
    }
    mapping["regularisers"] = {"rude": {"constraint": "no w"}, "plain": {"constraint": "retention"}}
    path.write_text(yaml.safe_dump(mapping))
    return path


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_it_shows_what_a_run_would_do_and_writes_nothing(bridle, dry, tmp_path):
    before = contents(tmp_path)
    code, out, err = bridle("check", dry, "--max_steps", 1000, "--rollouts_per_round", 640)
    assert code == 0, err
    assert contents(tmp_path) == before
    assert "\x1b" not in out

    assert "rude: 32 rows; in an epoch 32 of 128, with 768 tokens, 32 of them" in out
    assert "asked: 8 rows; in an epoch 64 of 128" in out
    (asked,) = re.findall(r"asked: 8 rows.*\n.*of a row: (.*)\n.*tokens: (.*)", out)
    assert all(re.match(r"[^›‹]+›[^›‹]+‹$", shown) for shown in asked), "the completion alone is trained on"
    assert re.search(r"rollouts for rude start at: .+ · .+", out)
    of_each = r"of asked \d of 8 violate, of plain \d+ of 22 violate, of rude \d+ of 22 violate"
    assert re.search(f"no w on rows {of_each}; ", out)
    assert re.search(r"no ladder on rows .*; [\d,.]+ texts a second", out)
    assert re.search(r"no w on rollouts for rude: \d+ of 64 violate", out)
    assert re.search(
        r"rounds 1 to 2, each: [\d.]+ m?s: sampling .*, scoring .*, fitting R .*\nan update: [\d.]+ m?s", out
    )
    assert re.search(r"the run takes about .+: 1000 updates and 2 rounds", out)
    assert re.search(r"most memory so far: [\d.]+ GiB", out)


@pytest.mark.parametrize(
    ("command", "key", "message"),
    [
        ("check", "evaluation.sampels", "evaluation.sampels: there is no key 'sampels'; did you mean samples?"),
        ("train", "evaluation.sampels", "evaluation.sampels: there is no key 'sampels'; did you mean samples?"),
        ("check", "methods.rll.beta", "methods.rll: there is no key 'rll'; did you mean rl?"),
        ("train", "methods.rl.betaa", "methods.rl.betaa: there is no key 'betaa'; did you mean beta?"),
    ],
)
def test_sections_that_only_comparisons_read_have_known_keys(bridle, dry, tmp_path, command, key, message):
    code, _, err = bridle(command, dry, f"--{key}", 3, *(["--output_dir", tmp_path / "run"] * (command == "train")))
    assert (code, err) == (2, f"bridle: {dry}: {message}\n")


def test_files_that_only_comparisons_read_are_there(bridle, dry):
    code, _, err = bridle("check", dry, "--evaluation.perplexity.plain.path", "none.jsonl")
    assert (code, err) == (2, "bridle: evaluation.perplexity.plain: none.jsonl: no such file\n")


@pytest.mark.parametrize(
    "options",
    [
        {"report_to": "tensorboard", "run_name": "x"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
    ],
)
def test_what_needs_checkpoints_or_a_tracker_is_left_out_with_them(options):
    recipe = build_recipe({"model": "m", "corpus": {"a": {"path": "a.jsonl"}}, "eval": {"share": 0.5}, **options})
    dry = unsaved(recipe).config("unused")
    assert (dry.save_strategy, dry.report_to, dry.run_name) == ("no", [], None)


def test_rows_that_are_not_cut(bridle, dry):
    code, out, err = bridle("check", dry, "--max_length", 60)
    assert code == 0, err
    assert "768 tokens" not in out
    assert "tokens, no row is cut at max_length" in out


def test_mistakes_are_those_of_a_run(bridle, dry):
    code, _, err = bridle("check", dry, "--learning_rat", 1)
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean learning_rate?" in err
