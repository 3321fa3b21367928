"""Builds a `Constraint` from its specification in a recipe or on the command line."""

import os
import re
from collections.abc import Mapping
from inspect import signature
from json import dumps
from reprlib import repr as short_repr
from typing import Any

from bridle.constraints.base import AllOf, AnyOf, Constraint, Not
from bridle.constraints.cache import Cached
from bridle.constraints.classifier import Classifier, labels_of
from bridle.constraints.function import PythonFunction
from bridle.constraints.guard import Guard
from bridle.constraints.nli import NLI
from bridle.constraints.remote import Remote
from bridle.constraints.reward import Reward
from bridle.constraints.rules import Length, Regex, WordList
from bridle.constraints.similarity import Similarity
from bridle.errors import UserError
from bridle.utils.settings import as_mapping, known_name, parse_yaml
from bridle.utils.variables import NO_VARIABLES, Variables

TYPES: dict[str, type[Constraint]] = {
    cls.type_name: cls
    for cls in (Classifier, Guard, NLI, Reward, Similarity, WordList, Regex, Length, PythonFunction, Remote)
}
# The key that VALUE sets in the short form TYPE:VALUE
SHORT_KEYS = {
    "classifier": "model",
    "guard": "model",
    "nli": "model",
    "reward": "model",
    "similarity": "model",
    "words": "file",
    "regex": "pattern",
    "length": "min_words",
    "python": "function",
    "remote": "preset",
}
OPERATORS = ("all", "any", "not")
CACHE_KEYS = ("cache", "version")  # of any constraint; a remote one has them among its own
PATH_KEYS = ("model", "file")  # their values may begin with ~/
ORACLE_KEYS = (
    "type",
    "model",
    "hypothesis",
    "guideline",
    "texts",
    "file",
    "words",
    "pattern",
    "function",
    "preset",
    "url",
)
"""What tells one oracle from another; another label, threshold or cache makes no other oracle."""
RETENTION = "retention"
"""In the place of a constraint's name: a domain is only held to the initial model."""


def build_constraint(
    spec: str | Mapping | list, name: str | None = None, variables: Variables = NO_VARIABLES
) -> Constraint:
    """Builds a constraint; `Constraint.load` loads its models and functions.

    Args:
        spec: one of
            a mapping with the key `type` (classifier, guard, nli, reward, similarity, words, regex, length, python,
            remote) and that class's arguments;
            a mapping `{all: [..]}`, `{any: [..]}` or `{not: ..}` of further specifications;
            either of them with `cache: FILE` and optionally `version`: see `Cached`;
            a list, which means all of them;
            a string `TYPE:VALUE[,key=value ...]`, e.g. "classifier:FOLDER,label=toxic,threshold=0.5",
            "words:FILE", "python:module:function" or "regex:PATTERN" (no options: the rest is the pattern);
            a string that begins with "{": a mapping in YAML.
        name: replaces the specification's own name.
        variables: environment variables whose values stand in `spec` and are never shown.

    Raises:
        UserError: a type or key is unknown (it names the nearest known one), or an option is wrong or missing.
    """
    constraint = _build(spec)
    if name is not None:
        constraint.name = name
    constraint.variables = variables
    return constraint


def trained_on(recipe: Mapping[str, Any]) -> list[str]:
    """The constraints of a recipe that are not independent, by name; the others judge without a share in training.

    Of each regulariser its own, then those that share an oracle with it, as its part or with another threshold. Last
    those by which `eval.best` chooses a checkpoint.

    Args:
        recipe: the mapping of its YAML file.

    Raises:
        UserError: a specification cannot be read.
    """
    specs = as_mapping(recipe.get("constraints"), "constraints")
    regularisers = as_mapping(recipe.get("regularisers"), "regularisers")
    used = [as_mapping(options, f"regularisers.{name}").get("constraint") for name, options in regularisers.items()]
    evaluated = as_mapping(recipe.get("eval"), "eval")
    used += evaluated.get("constraints") or [] if evaluated.get("best") else []
    found = [str(name) for name in dict.fromkeys(used) if name in specs]
    alike: dict[str, None] = {}
    for own in found:
        sharing = [name for name in specs if _oracles(specs[own]) & _oracles(specs[name])]
        alike |= dict.fromkeys([own, *sharing])
    return list(alike)


def _oracles(spec: Any) -> set[str]:
    """What the parts of a specification ask for their verdicts."""
    spec = _parse(spec) if isinstance(spec, str) else {"all": spec} if isinstance(spec, list) else spec
    spec = as_mapping(spec, "constraint")
    parts = next((spec[key] for key in OPERATORS if key in spec), None)
    if parts is None:
        if spec.get("type") == Length.type_name:
            return set()  # there is nothing in it to please
        return {dumps({key: spec[key] for key in ORACLE_KEYS if key in spec}, sort_keys=True)}
    return {oracle for part in (parts if isinstance(parts, list) else [parts]) for oracle in _oracles(part)}


def _build(spec: object) -> Constraint:
    if isinstance(spec, str):
        spec = _parse(spec)
    if isinstance(spec, list):
        return AllOf([_build(part) for part in spec])
    if not isinstance(spec, Mapping):
        raise UserError(f"constraint {short_repr(spec)}: is not a mapping, list or string")
    heads = [key for key in ("type", *OPERATORS) if key in spec]
    if len(heads) != 1:
        raise UserError(f"constraint {short_repr(spec)}: needs exactly one of the keys type, all, any, not")
    head, options = heads[0], dict(spec)
    value = options.pop(head)
    keys = CACHE_KEYS if "cache" in options and value != Remote.type_name else ()
    kept = {key: options.pop(key) for key in keys if key in options}
    constraint = _build_type(value, options) if head == "type" else _build_operator(head, value, options)
    return Cached(constraint, **kept) if kept else constraint


def _build_type(kind: object, options: dict[Any, Any]) -> Constraint:
    known_name(str(kind), TYPES, "constraint", "type")
    cls = TYPES[str(kind)]
    for key in options:
        known_name(key, signature(cls).parameters, f"constraint '{kind}'", "key")
    paths = {key: os.path.expanduser(options[key]) for key in PATH_KEYS if isinstance(options.get(key), str)}
    options = options | paths
    if cls is Classifier and "label" not in options and (labels := labels_of(options.get("model"))):
        raise UserError(f"constraint '{kind}', key 'label': is missing; the model's labels are: {', '.join(labels)}")
    return cls(**options)


def _build_operator(operator: str, value: object, options: dict[Any, Any]) -> Constraint:
    for key in options:
        known_name(key, ["name"], f"constraint '{operator}'", "key")
    if operator == "not":
        return Not(_build(value), **options)
    if not isinstance(value, list):
        raise UserError(f"constraint '{operator}': needs a list of constraints, not {short_repr(value)}")
    return (AllOf if operator == "all" else AnyOf)([_build(part) for part in value], **options)


def _parse(spec: str) -> Mapping[str, Any]:
    """Returns the mapping that a string stands for."""
    if spec.lstrip().startswith("{"):
        where = f"constraint {short_repr(spec)}"
        return as_mapping(parse_yaml(spec, where), where)
    kind, colon, value = spec.partition(":")
    if not colon or not value:
        raise UserError(f"constraint '{spec}': write TYPE:VALUE; the types are {', '.join(SHORT_KEYS)}")
    known_name(kind, SHORT_KEYS, f"constraint '{spec}'", "type")
    if kind == "regex":
        return {"type": kind, "pattern": value}
    # a comma separates only before `key=`
    value, *pairs = re.split(r",(?=\w+=)", value)
    return {"type": kind, SHORT_KEYS[kind]: value} | dict(pair.split("=", 1) for pair in pairs)
