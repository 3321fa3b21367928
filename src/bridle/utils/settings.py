"""Settings from YAML and dotted overrides, and dataclasses built from them, with errors that name the key."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.error import MarkedYAMLError

from bridle.errors import UserError, prefixed
from bridle.utils.files import read_text

LONGEST_NAME = 200  # bytes of a name within a file name, which may have 255
MOST_VALUES = 100_000  # in a recipe with its aliases expanded

CHECKED_STRICTLY = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
"""How pydantic validates settings."""


def build(cls: type, options: Any, where: str) -> Any:
    """Builds a dataclass, and those within it, from a mapping.

    Args:
        cls: the dataclass; its `__post_init__` may raise a `UserError` that begins with the field's name.
        options: the mapping from YAML.
        where: stands before the keys in errors, e.g. "corpus.toxigen".

    Raises:
        UserError: a key is unknown (with the nearest known one) or missing, or a value is wrong.
    """
    options = dict(as_mapping(options, where))
    hints = get_type_hints(cls, include_extras=True)
    known = [f.name for f in fields(cls) if f.init]
    check_keys(options, known, where)
    for f in fields(cls):
        if f.init and f.default is MISSING and f.default_factory is MISSING and f.name not in options:
            raise UserError(f"{where}.{f.name}: is missing")
        if f.name in options:
            options[f.name] = validated(hints[f.name], options[f.name], f"{where}.{f.name}")
    with prefixed(f"{where}."):
        return cls(**options)


def validated(kind: Any, value: Any, where: str) -> Any:
    """Converts a value to a type hint: "3" to 3, a mapping to a dataclass. Raises UserError if it does not fit."""
    options = (kind, *get_args(kind))
    if isinstance(value, bool) and bool not in options and Any not in options:
        raise UserError(f"{where}: needs a value, not {str(value).lower()}")  # pydantic would take true for 1
    inner: Any = next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)
    if inner is not None and not (value is None and NoneType in options):
        return value if isinstance(value, inner) else build(inner, value, where)
    if isinstance(value, str) and (choices := _choices(kind)):
        known_name(value, {*choices}, where, "choice")
    try:
        return TypeAdapter(kind, config=CHECKED_STRICTLY).validate_python(value)
    except ValidationError as error:
        said = _A_RANGE if get_origin(kind) is tuple else error.errors()[0]["msg"].lower()
        raise UserError(f"{where}: {said}, not {value!r}") from error


# Pydantic would ask for a tuple, which YAML does not have.
_A_RANGE = "needs a list of two whole numbers such as [2, 16]"


def _choices(kind: Any) -> list[str]:
    """The texts that a Literal, or an enumeration of `transformers`, allows, also beside None; none for other hints."""
    options = [kind, *get_args(kind)]
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    texts = [text for option in options if get_origin(option) is Literal for text in get_args(option)]
    return [*texts, *(member.value for enum in enums for member in enum)]


def check_fields(instance: Any, names: Iterable[str] | None = None) -> None:
    """Converts a dataclass's fields (by default all) with `validated` in place, for its `__post_init__`."""
    hints = get_type_hints(type(instance), include_extras=True)
    for name in [f.name for f in fields(instance)] if names is None else names:
        setattr(instance, name, validated(hints[name], getattr(instance, name), name))


def check_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str, more: str = "...") -> None:
    """Raises a UserError that names the first unknown key and the nearest known one; arguments as of `known_name`."""
    for key in mapping:
        known_name(key, known, f"{where}.{key}" if where else str(key), "key", more)


def known_name(name: Any, known: Iterable[str], where: str, what: str, more: str = "...") -> None:
    """Raises a UserError unless `name` is known: "corpus.wiki: there is no `what` 'wiki'; did you mean ...".

    Args:
        known: of a list the first twelve are shown, of others the first by alphabet.
        more: stands behind them.
    """
    known = known if isinstance(known, list) else sorted(known)
    if name in known:
        return
    near = get_close_matches(str(name), known, n=1)
    listed = ", ".join([*known[:12], *([more] if len(known) > 12 else [])])
    hint = f"did you mean {near[0]}?" if near else f"there are: {listed or 'none'}"
    raise UserError(f"{where}: there is no {what} '{name}'; {hint}")


def as_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Returns a mapping as it is, and an empty one for None; raises UserError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: must be a mapping of keys to values, not {value!r}")
    return value


def as_named(value: Any, where: str) -> Mapping[str, Any]:
    """Returns `as_mapping`; raises UserError unless its keys are names: printable text on one line."""
    mapping = as_mapping(value, where)
    for name in mapping:
        if not (isinstance(name, str) and name.strip() and name.isprintable()):
            raise UserError(f"{where}: {name!r} is not a name: printable text on one line, with numbers in quotes")
    return mapping


def check_file_name(name: str, where: str) -> None:
    """Raises a UserError if a name cannot be part of a file name, as a domain's is of its rollouts file."""
    whole = name.isprintable() and not {"/", "\\"}.intersection(name) and 0 < len(name.encode()) <= LONGEST_NAME
    if not whole or not name.strip(". "):
        raise UserError(
            f"{where}: {name!r} names files and so must be printable, without slashes, of 1 to {LONGEST_NAME} bytes, "
            "and not dots alone"
        )


def different_keys(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> list[str]:
    """Returns the dotted keys whose values differ; of a missing mapping, its own key alone."""
    found = []
    for key in sorted({*one, *other}):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += different_keys(mine, theirs, f"{above}{key}.")
        elif mine != theirs:
            found.append(f"{above}{key}")
    return found


def reordered(one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Returns those of the keys whose mappings have the same keys in another order."""
    orders = {key: [[*(mapping.get(key) or {})] for mapping in (one, other)] for key in keys}
    return [key for key, (mine, theirs) in orders.items() if mine != theirs and sorted(mine) == sorted(theirs)]


# ---------------------------------------------------------------------- YAML


_NOT_JSON = {f"tag:yaml.org,2002:{tag}" for tag in ("binary", "timestamp", "omap", "pairs", "set")}


class _Loader(yaml.SafeLoader):
    """Safe YAML limited to the values of JSON, with the scalars of YAML 1.2: 2e-5 is a number, `on` and `no` are words.

    It refuses duplicate keys, and more than `MOST_VALUES` values with aliases expanded.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML defines it
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_JSON | {"tag:yaml.org,2002:bool"}]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012 - as PyYAML defines it
        tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag not in _NOT_JSON
    }

    def __init__(self, stream: str):
        super().__init__(stream)
        self._values = 0
        self._sizes: dict[yaml.Node, int] = {}  # values in each finished node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self._values
        node = super().compose_node(parent, index)
        assert node is not None
        if alias and node not in self._sizes:
            raise ComposerError(None, None, "an alias refers to the value that contains it", node.start_mark)
        self._values += self._sizes[node] if alias else 1
        self._sizes.setdefault(node, self._values - before)
        if self._values > MOST_VALUES:
            raise ComposerError(None, None, f"more than {MOST_VALUES} values", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise ComposerError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_finite(self, node: yaml.ScalarNode) -> float:
        number = self.construct_yaml_float(node)
        if not isfinite(number):
            raise ConstructorError(None, None, f"{node.value} is not a finite number", node.start_mark)
        return number


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_finite)


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML safely; raises a UserError that begins with `where` if it is malformed."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a malformed number
        said, mark = str(error), getattr(error, "problem_mark", None)
        if isinstance(error, MarkedYAMLError) and mark is not None:
            if "\n" in text:
                where = f"{where}: line {mark.line + 1}, column {mark.column + 1}"
            hint = "quote values that hold ${...}" if "${" in text.split("\n")[mark.line] else None
            said = "; ".join(filter(None, (error.context, error.problem, hint)))
        raise UserError(f"{where}: not valid YAML: {' '.join(said.split())}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a recipe's mapping as written; raises UserError if the file is unreadable or not a mapping."""
    mapping = parse_yaml(read_text(path), str(path))
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    return mapping


def set_dotted(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets `mapping[a][b][c]` for the key "a.b.c"; raises UserError if a parent is not a mapping."""
    *parents, last = dotted.split(".")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise UserError(f"--{dotted}: {parent} is not a mapping in the recipe")
    mapping[last] = value
