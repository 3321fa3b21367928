"""What the pages of the reference are generated from: dataclasses, the command line, the modules of a room.

A page says where: `<!-- fields: module.Dataclass -->`, `<!-- commands -->`, `<!-- modules: room -->`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import griffe
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from bridle.cli.keys import entries

SOURCE = Path(__file__).parents[1] / "src"
MARK = re.compile(r"^<!-- (fields|commands|modules)(?:: ([\w.]+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replaces the marks of a page by what they stand for."""
    makers = {"fields": fields_table, "commands": commands, "modules": modules}
    return MARK.sub(lambda mark: makers[mark[1]](*filter(None, [mark[2]])), markdown)


def fields_table(name: str) -> str:
    """The fields of a dataclass, its bases' first, as a table: name, type, default, meaning.

    Raises:
        KeyError: a field is not told under `Attributes` of its class.
    """
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field, meaning in _fields(_package()[name.removeprefix("bridle.")]):
        lines.append(f"| `{field.name}` | `{field.annotation}` | {_default(field)} | {' '.join(meaning.split())} |")
    return "\n".join(lines)


def commands() -> str:
    """What `bridle COMMAND --help` prints, command by command."""
    from bridle.cli import app

    group = get_command(app)
    assert isinstance(group, TyperGroup)
    parts = []
    for name, command in group.commands.items():
        context = command.context_class(command, info_name=f"bridle {name}", terminal_width=100)
        parts.append(f"## bridle {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def modules(room: str) -> str:
    """A directive of mkdocstrings for every module of a room."""
    found = sorted(name for name, module in _package()[room].modules.items() if not name.startswith("_"))
    names = [f"bridle.{room}.{name}" for name in found] or [f"bridle.{room}"]
    return "\n".join(f"::: {name}\n    options: {{skip_local_inventory: true}}\n" for name in names)


@cache
def _package() -> griffe.Module:
    package = griffe.load("bridle", search_paths=[SOURCE], docstring_parser="google")
    assert isinstance(package, griffe.Module)
    return package


def _fields(cls: griffe.Class) -> Iterator[tuple[griffe.Attribute, str]]:
    for base in cls.resolved_bases:  # those of other packages have pages of their own
        yield from _fields(base)
    told = entries(cls.docstring.value if cls.docstring else "", "Attributes")
    for attribute in filter(lambda member: member.is_attribute, cls.members.values()):
        hidden = attribute.name.startswith("_") or "ClassVar" in str(attribute.annotation)
        if attribute.annotation is not None and not hidden and "property" not in attribute.labels:
            yield attribute, told[attribute.name]


def _default(attribute: griffe.Attribute) -> str:
    """The default as a recipe would have it."""
    cls = getattr(import_module(attribute.module.path), attribute.parent.name)
    field = next(field for field in fields(cls) if field.name == attribute.name)
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if is_dataclass(default):
        return "its own, below"
    if isinstance(default, str):
        return f"`{json.dumps(default)}`"  # in YAML a line break would be one
    return f"`{yaml.safe_dump(default, default_flow_style=True).partition(chr(10))[0]}`"
