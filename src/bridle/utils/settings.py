"""Reading settings of people: YAML files, dotted overrides, and dataclasses built from them with every mistake told."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from bridle.errors import UserError, first_line

LONGEST_NAME = 200  # bytes of a name in a file's name, which may have 255 in all
MOST_VALUES = 100_000  # in a recipe, with its aliases written out

CHECKED_STRICTLY = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
"""How pydantic checks what people set."""


def build(cls: type, options: Any, where: str) -> Any:
    """An instance of a dataclass from a mapping, mappings within it included, with every mistake told by its key.

    Args:
        cls: the dataclass; its `__post_init__` may raise a `UserError` that begins with the field's name.
        options: the mapping, as YAML gives it.
        where: what stands before the keys in errors, e.g. "corpus.toxigen".

    Raises:
        UserError: an unknown key (with the nearest known one), a missing one, or a value of the wrong kind.
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
    try:
        return cls(**options)
    except UserError as error:
        raise UserError(f"{where}.{error}") from error


def validated(kind: Any, value: Any, where: str) -> Any:
    """`value` as a type hint wants it: "3" as 3, a mapping as the dataclass it describes.

    Raises:
        UserError: it cannot be one; of a fixed set of words it names the nearest.
    """
    options = (kind, *get_args(kind))
    if isinstance(value, bool) and bool not in options and Any not in options:
        raise UserError(f"{where}: needs a value, not {str(value).lower()}")  # pydantic would take true for 1
    inner: Any = next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)
    if inner is not None and not (value is None and NoneType in options):
        return value if isinstance(value, inner) else build(inner, value, where)
    if get_origin(kind) is Literal and isinstance(value, str):
        known_name(value, get_args(kind), where, "choice")
    try:
        return TypeAdapter(kind, config=CHECKED_STRICTLY).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where}: {error.errors()[0]['msg'].lower()}, not {value!r}") from error


def check_fields(instance: Any, names: Iterable[str] | None = None) -> None:
    """Reads a dataclass's fields as their type hints want them, as `validated`; for its `__post_init__`.

    Args:
        instance: of the dataclass, changed in place.
        names: the fields; all if not given.

    Raises:
        UserError: a value of the wrong kind; the message begins with the field's name.
    """
    hints = get_type_hints(type(instance), include_extras=True)
    for name in [f.name for f in fields(instance)] if names is None else names:
        setattr(instance, name, validated(hints[name], getattr(instance, name), name))


def check_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raises a UserError that names the first unknown key and the nearest known one."""
    for key in mapping:
        known_name(key, known, f"{where}.{key}" if where else str(key), "key")


def known_name(name: Any, known: Iterable[str], where: str, what: str) -> None:
    """Raises a UserError if `name` is none of the known ones: "corpus.wiki: there is no `what` ..."."""
    known = sorted(known)
    if name in known:
        return
    near = get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known[:12])}"
    raise UserError(f"{where}: there is no {what} '{name}'; {hint}")


def as_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """`value` if it is a mapping, an empty one for None.

    Raises:
        UserError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: must be a mapping of keys to values, not {value!r}")
    return value


def as_named(value: Any, where: str) -> Mapping[str, Any]:
    """`value` as a mapping whose keys are names: printable text on one line.

    Raises:
        UserError: it is something else.
    """
    mapping = as_mapping(value, where)
    for name in mapping:
        if not (isinstance(name, str) and name.strip() and name.isprintable()):
            raise UserError(f"{where}: {name!r} is no name; a name is printable text on one line, a number in quotes")
    return mapping


def check_file_name(name: str, where: str) -> None:
    """Raises a UserError if a name cannot be part of a file's name, as a domain's is of its rollouts'."""
    whole = name.isprintable() and not {"/", "\\"}.intersection(name) and 0 < len(name.encode()) <= LONGEST_NAME
    if not whole or not name.strip(". "):
        raise UserError(
            f"{where}: {name!r} names files and so must be printable, without slashes, of 1 to {LONGEST_NAME} bytes, "
            "and not dots alone"
        )


def different_keys(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> list[str]:
    """The dotted keys, the outermost where one is missing, whose values differ."""
    found = []
    for key in sorted({*one, *other}):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += different_keys(mine, theirs, f"{above}{key}.")
        elif mine != theirs:
            found.append(f"{above}{key}")
    return found


# ---------------------------------------------------------------------- YAML


_NOT_JSON = {f"tag:yaml.org,2002:{tag}" for tag in ("binary", "timestamp", "omap", "pairs", "set")}


class _Loader(yaml.SafeLoader):
    """Safe YAML that says what JSON can, with the scalars of YAML 1.2: 2e-5 is a number, and `on` and `no` are words.

    A mapping has each key once, and aliases, which are written out when a recipe is read, stay within `MOST_VALUES`.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_JSON | {"tag:yaml.org,2002:bool"}]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012 - PyYAML's own way
        tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag not in _NOT_JSON
    }

    def __init__(self, stream: str):
        super().__init__(stream)
        self._values = 0
        self._sizes: dict[yaml.Node, int] = {}  # of whole nodes, in values

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self._values
        node = super().compose_node(parent, index)
        assert node is not None
        if alias and node not in self._sizes:
            raise ComposerError(None, None, "an alias stands within what it stands for", node.start_mark)
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
                raise ComposerError(None, None, f"the key {key.value!r} stands here twice", key.start_mark)
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
    """Reads YAML safely; a UserError that begins with `where` if it is none."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers that are none, and nesting without end
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's mapping as it stands in the file.

    Raises:
        UserError: the file cannot be read, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no possible path
        raise UserError(f"{path}: cannot read the recipe: {first_line(error)}") from error
    mapping = parse_yaml(text, str(path))
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    return mapping


def set_dotted(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets `mapping[a][b][c]` for the key "a.b.c", making mappings on the way.

    Raises:
        UserError: something on the way is there and no mapping.
    """
    *parents, last = dotted.split(".")
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise UserError(f"--{dotted}: {parent} is not a mapping in the recipe")
    mapping[last] = value
