"""The recipe's JSON Schema: every shipped recipe is valid, and what a recipe refuses by its key is not."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest

from bridle.cli.schema import VERSION, recipe_schema
from bridle.constraints.spec import TYPES
from bridle.recipes.recipe import NOT_IN_RECIPES
from bridle.utils.settings import read_yaml, set_dotted

ROOT = Path(__file__).parents[2]
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), ROOT / "src" / "bridle" / "quickstart" / "recipe.yaml"]
DETOX = ROOT / "recipes" / "detox-mini.yaml"


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(recipe_schema())


def places(validator, recipe):
    return [".".join(map(str, error.absolute_path)) for error in validator.iter_errors(recipe)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_recipe_is_valid(validator, path):
    assert places(validator, read_yaml(path)) == []


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("learning_rat", 1e-4, ""),
        ("max_steps", "many", "max_steps"),
        ("model", None, "model"),
        ("corpus.toxigen.pathh", "a", "corpus.toxigen"),
        ("auxiliary.depth", -1, "auxiliary.depth"),
        ("lora", {"rank": 8}, "lora"),
        ("constraints.mine", {"type": "word", "words": ["a"]}, "constraints.mine"),
        ("constraints.mine", {"type": "guard", "model": "m", "family": "gpt"}, "constraints.mine"),
        ("constraints.mine", {"type": "classifier", "model": "m"}, "constraints.mine"),
        ("constraints.mine", {"any": "regex:a"}, "constraints.mine"),
        ("regularisers.toxigen", {"weight": 3}, "regularisers"),
        ("regularisers.toxigen.wieght", 3, "regularisers"),
        ("evaluation.prompts.mine", {"temperatur": 1}, "evaluation.prompts.mine"),
    ],
)
def test_what_a_recipe_refuses_is_invalid_there(validator, key, value, place):
    recipe = read_yaml(DETOX)
    assert places(validator, recipe) == []
    set_dotted(recipe, key, value)
    assert places(validator, recipe) == [place]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", "${STEPS:-10}"),
        ("lora", None),
        ("constraints.mine", ["regex:a", {"not": {"type": "length", "min_words": 3}}]),
        ("constraints.mine", {"type": "words", "words": ["a"], "cache": "labels.sqlite", "version": 2}),
        ("regularisers", [{"domain": ["toxigen", "wikitext"], "name": "both", "constraint": "policy"}]),
        ("methods.rl", None),
        ("evaluation.judge", None),
    ],
)
def test_what_a_recipe_takes_is_valid(validator, key, value):
    recipe = copy.deepcopy(read_yaml(DETOX))
    set_dotted(recipe, key, value)
    assert places(validator, recipe) == []


def test_it_has_every_key_and_type_with_its_meaning():
    schema = recipe_schema()
    assert not NOT_IN_RECIPES.keys() & set(schema["properties"])
    assert "learning_rate" in schema["properties"]
    assert schema["properties"]["rollouts_per_round"]["description"]
    kinds = [one["properties"]["type"]["const"] for one in schema["$defs"]["constraint"]["anyOf"][5:]]
    assert kinds == list(TYPES)


def test_the_command_prints_it_with_its_version(bridle):
    code, shown, _ = bridle("schema")
    assert code == 0
    assert json.loads(shown) == recipe_schema()
    assert json.loads(shown)["$id"] == f"urn:bridle:recipe:{VERSION}"


def test_defaults_are_shown():
    named = recipe_schema()["properties"]["regularisers"]["anyOf"][0]["anyOf"][0]["additionalProperties"]["properties"]
    assert named["weight"]["default"] == 30
    assert "default" not in named["kl_on"], "it depends on the constraint"
