"""`bridle schema`: the keys of a recipe as JSON Schema, made from the dataclasses that read them."""

import json
import types
from collections.abc import Collection, Mapping
from typing import Any, Union, get_args, get_origin

import typer

VERSION = 1
"""Of the recipe's format: it rises when a recipe that was valid no longer is."""

app = typer.Typer()


@app.command(epilog="Example: bridle schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of a recipe, by which editors complete and check keys.

    In a recipe's first line: # yaml-language-server: $schema=recipe.schema.json
    """
    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe. Every text may hold `${NAME}`, and stand for a number then."""
    from bridle.constraints.spec import TYPES
    from bridle.models.loading import LoraOptions
    from bridle.recipes.recipe import NOT_IN_RECIPES, Recipe
    from bridle.training.config import ConstrainedConfig

    own = {
        "model": {"type": "string"},
        "dtype": {"type": "string"},
        "env": {"type": "array", "items": {"type": "string"}},
        "lora": _or_null(_object(LoraOptions)),
        "corpus": _by_name(_domain()),
        "constraints": _or_null(_by_name({"$ref": "#/$defs/constraint"})),
        "regularisers": _or_null(_regularisers()),
        "eval": _or_null(_eval()),
        "evaluation": _or_null(_evaluation()),
        "methods": _or_null(_methods()),
    }
    described = _object(Recipe, given=own)["properties"]
    trained = _object(ConstrainedConfig, skip=NOT_IN_RECIPES)["properties"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:bridle:recipe:{VERSION}",
        "title": f"Bridle recipe, version {VERSION}",
        "type": "object",
        "properties": trained | {key: described.get(key, own[key]) for key in own},
        "required": ["model", "corpus"],
        "additionalProperties": False,
        "$defs": {"constraint": _constraint(TYPES)},
    }


def _object(cls: type, skip: Collection[str] = (), given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The schema of a dataclass's mapping; `given` has fields whose form in a recipe is another."""
    from dataclasses import MISSING, fields
    from inspect import getdoc
    from typing import get_type_hints

    from bridle.cli.keys import entries

    hints, meanings = get_type_hints(cls, include_extras=True), entries(getdoc(cls) or "", "Attributes")
    properties, required = {}, []
    for field in fields(cls):
        if not field.init or field.name in skip:
            continue
        found = dict((given or {}).get(field.name) or _value(hints[field.name]))
        meaning = meanings.get(field.name) or field.metadata.get("help")
        default = {"default": field.default} if isinstance(field.default, (str, int, float)) else {}
        properties[field.name] = found | ({"description": " ".join(meaning.split())} if meaning else {}) | default
        if field.default is MISSING and field.default_factory is MISSING:
            required.append(field.name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(kind: Any) -> dict[str, Any]:
    """The schema of a type hint."""
    from dataclasses import is_dataclass

    from bridle.constraints import Constraint

    if kind is Constraint:
        return {"$ref": "#/$defs/constraint"}
    if isinstance(kind, type) and is_dataclass(kind):
        return _object(kind)
    if get_origin(kind) in (Union, types.UnionType):
        parts = [_value(part) for part in get_args(kind) if part is not types.NoneType]
        found = parts[0] if len(parts) == 1 else {"anyOf": parts}
        return _or_null(found) if types.NoneType in get_args(kind) else found
    if get_origin(kind) is list:
        return {"type": "array", "items": _value(get_args(kind)[0])}
    if get_origin(kind) is dict:
        return _by_name(_value(get_args(kind)[1]))
    return _scalar(kind)


def _scalar(kind: Any) -> dict[str, Any]:
    """The schema of a type that holds no dataclass; any value where pydantic has none."""
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    from bridle.utils.settings import CHECKED_STRICTLY

    try:
        found = TypeAdapter(kind, config=CHECKED_STRICTLY).json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError):
        return {}
    return found if found in ({"type": "string"}, {"type": "null"}, {}) else {"anyOf": [found, _VARIABLE]}


_VARIABLE = {"type": "string", "pattern": r"\$\{"}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    if schema.get("type") == "object":  # as one type, so that an error is found at the key itself
        return {**schema, "type": ["object", "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def _by_name(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": schema}


def _domain() -> dict[str, Any]:
    from bridle.data import Domain

    return _object(Domain, skip={"name"})


def _regularisers() -> dict[str, Any]:
    """By name, or a list whose entries may have names."""
    from bridle.training.config import Regulariser

    one = _object(Regulariser, skip={"name"}, given={"constraint": {"type": "string"}}) | {"required": ["constraint"]}
    named = one | {"properties": one["properties"] | {"name": {"type": "string"}}}
    return {"anyOf": [_by_name(_or_null(one)), {"type": "array", "items": named}]}


def _eval() -> dict[str, Any]:
    from bridle.training.config import EvalOptions

    names = {"type": "array", "items": {"type": "string"}}
    return _object(EvalOptions, given={"corpus": _by_name(_domain()), "constraints": names})


def _evaluation() -> dict[str, Any]:
    """The section `evaluation`, whose prompts may be decoded in their own way."""
    from bridle.comparison.plan import Evaluation
    from bridle.data import DataSource
    from bridle.evaluation.prompt_sets import GENERATION, GenerationOptions

    decoding = {key: value for key, value in _object(GenerationOptions)["properties"].items() if key in GENERATION}
    prompts = _object(DataSource)
    prompts |= {"properties": prompts["properties"] | decoding | {"set": {"type": "string"}}, "required": []}
    names = {"type": "array", "items": {"type": "string"}}
    given = {"prompts": _by_name(_or_null(prompts)), "constraints": names}
    found = _object(Evaluation, skip={"label", "trained_on"}, given=given)
    properties = {key: _or_null(value) for key, value in (found["properties"] | decoding).items()}
    return found | {"properties": properties, "required": ["prompts"]}


def _methods() -> dict[str, Any]:
    from bridle.comparison.methods import OPTIONS

    return {"type": "object", "properties": {name: _or_null(_object(cls)) for name, cls in OPTIONS.items()}}


def _constraint(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A specification: the short form, a list, an operator, or a mapping with a type and its arguments."""
    from bridle.constraints.spec import OPERATORS

    this = {"$ref": "#/$defs/constraint"}
    several = {"type": "array", "items": this}
    cached: dict[str, Any] = {key: {} for key in ("cache", "version", "name")}
    operators = [
        {"properties": {name: this if name == "not" else several, **cached}, "required": [name]} for name in OPERATORS
    ]
    typed = [_of_type(name, cls, cached) for name, cls in kinds.items()]
    mappings = [{"type": "object", "additionalProperties": False, **one} for one in [*operators, *typed]]
    return {"anyOf": [{"type": "string"}, several, *mappings]}


def _of_type(name: str, cls: Any, cached: dict[str, Any]) -> dict[str, Any]:
    from inspect import Parameter, signature
    from typing import get_type_hints

    hints = get_type_hints(cls.__init__.__wrapped__, include_extras=True)
    arguments = signature(cls).parameters
    required = [key for key, one in arguments.items() if one.default is Parameter.empty]
    properties = {key: _value(hints[key]) for key in arguments}
    return {"properties": cached | properties | {"type": {"const": name}}, "required": ["type", *required]}
