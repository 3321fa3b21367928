"""The command line before any work: versions, help, completion, and how soon they are there."""

import os
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest

from bridle.cli.keys import COMPARISON, NO_KEYS, RENAMED, TRAINING, keys_of
from bridle.cli.schema import recipe_schema
from bridle.evaluation.prompt_sets import GENERATION
from bridle.utils.settings import parse_yaml

GROUPS = {heading: group for groups in (TRAINING, COMPARISON) for heading, group in groups.items()}


def run(*arguments, **variables):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_versions_are_told():
    told = run("-m", "bridle", "--version")
    assert [word for word in told.split() if word.isalpha()] == ["bridle", "torch", "transformers", "trl"]


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["watch"], ["generate"], ["demo"], ["evaluate"], ["certify"], ["judge"], ["compare"], ["report"]],
)
def test_help_has_a_short_form(bridle, command):
    code, told, _ = bridle(*command, "-h")
    assert code == 0
    assert told == bridle(*command, "--help")[1]
    assert told.startswith("Usage: bridle")


def test_help_says_what_exit_codes_mean(bridle):
    told = " ".join(bridle("-h")[1].split())
    assert "Exit codes: 0, done; 1, a plan that does not fit, or nothing certified; 2, a mistake" in told
    assert "130 or 143, ended by Ctrl-C or SIGTERM." in told


def test_a_shell_completes_commands():
    asked = {"_BRIDLE_COMPLETE": "complete_bash", "COMP_WORDS": "bridle gen", "COMP_CWORD": "1"}
    assert run("-m", "bridle", **asked).split() == ["generate"]


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("import bridle; print(bridle.__version__)", "."),
        ("from bridle.cli import app; app(['-h'], standalone_mode=False)", "quickstart"),
        ("from bridle.cli import app; app(['--version'], standalone_mode=False)", "transformers"),
        ("from bridle.cli import app; app(['train', '-h'], standalone_mode=False)", "rollouts_per_round"),
    ],
)
def test_no_library_that_takes_seconds_is_loaded_before_any_work(code, shown):
    told = run("-c", f"{code}; import sys; print({{'torch', 'transformers', 'datasets', 'numpy'}} & set(sys.modules))")
    assert shown in told
    assert told.splitlines()[-1] == "set()"


@pytest.mark.parametrize("heading", GROUPS)
def test_help_lists_every_key_with_its_default(heading):
    _, places = GROUPS[heading]
    told = {key: text for place in places for key, text in keys_of(place)}
    file, _, name = places[-1].partition(":")
    cls = getattr(import_module(f"bridle.{file.removesuffix('.py').replace('/', '.')}"), name)
    ours = [vars(base).get("__annotations__", {}) for base in cls.__mro__ if base.__module__.startswith("bridle.")]
    names = [name for annotated in ours for name in annotated]
    own = {RENAMED.get(field.name, field.name): field for field in fields(cls) if field.name in names}
    assert told.keys() == own.keys() - NO_KEYS.get(name, set())
    for key, text in told.items():
        if not text.endswith("]"):
            continue
        shown = parse_yaml(text[text.rindex("  [") + 3 : -1], key)
        default = own[key].default
        assert shown == (list(default) if isinstance(default, tuple) else default) or shown == "required"


@pytest.mark.parametrize(
    ("place", "key", "told"),
    [
        ("data/source.py:DataSource", "where", "or lies above or below a number, {toxicity: {above: 0.5}}  [null]"),
        ("training/config.py:ConstrainedConfig", "target_cache", "targets of retention with `kl_on: corpus`  [null]"),
        ("training/engine.py:SamplerOptions", "server_url", 'of a server, e.g. "http://localhost:8000"  [null]'),
        ("training/config.py:Regulariser", "anchor", ": live | previous | initial  [null]"),
        ("comparison/knobs.py:InterleaveOptions", "choose", ": random | gap"),
        ("baselines/reinforcement.py:ReinforcementOptions", "algorithm", '"rloo" or "grpo"  [rloo]'),
    ],
)
def test_a_clause_of_help_is_whole_and_has_the_choices(place, key, told):
    assert dict(keys_of(place))[key].endswith(told)


def test_help_lists_what_a_comparison_reads_and_nothing_else():
    read = recipe_schema()["properties"]["evaluation"]["properties"].keys() - set(GENERATION)
    assert {key for key, _ in keys_of("comparison/plan.py:Evaluation")} == read


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_prints_them(bridle, command):
    told = bridle(command, "-h")[1]
    for above, places in (TRAINING if command == "train" else COMPARISON).values():
        assert all(above + key in told for place in places for key, _ in keys_of(place))
