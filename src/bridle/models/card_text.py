"""Values of a model card as text: names without folders, numbers, and Markdown in which every value is escaped."""

import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from bridle.constraints import Constraint
from bridle.constraints.spec import RETENTION
from bridle.models.gguf import hub_file, is_gguf

MISSING = "missing"
FILE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".txt", ".gguf"}  # "data/rows.jsonl" looks like a hub name


def public_name(path: Any) -> str:
    """A hub name, "hub/name:file.gguf" too, unchanged, the last part of a local path."""
    return hub_name(path) or PureWindowsPath(one_line(path)).name or "a local folder"


def setting_text(value: Any, key: str = "") -> str:
    """A setting or a constraint on one line: of files the names only, of a list of words the length only."""
    if isinstance(value, Constraint):
        value = value.describe()
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {setting_text(v, k)}" for k, v in value.items() if v is not None and k != "name")
    if key in ("model", "file"):
        return public_name(value)
    if key == "words":
        return f"{len(value)} listed"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(f"({setting_text(v)})" if isinstance(v, Mapping) else setting_text(v) for v in value)
    return one_line(value)


def with_names(options: Any) -> dict[str, Any]:
    """A regulariser's options as in a recipe: constraint and prompts by name."""
    constraint = RETENTION if options.constraint is None else options.constraint.name
    prompts, target = options.prompts and options.prompts.place, options.target and vars(options.target)
    return {**vars(options), "constraint": constraint, "prompts": prompts, "target": target}


def source_text(source: Any) -> str:
    """Where rows or prompts come from, without folders."""
    return ", ".join(path if hub_dataset(path) else public_name(path) for path in paths_of(source))


def paths_of(source: Any) -> list[str]:
    """The path, or paths, of a domain of the corpus or of prompts."""
    paths = source["path"] if isinstance(source, Mapping) else source
    return [str(path) for path in paths] if isinstance(paths, list) else [str(paths)]


def set_name(name: str) -> str:
    """The name of a prompt set or a held-out file, which may be "FILE,rows=90%:" from a command line."""
    path, comma, options = name.partition(",")
    return one_line(public_name(path) + comma + options)


def interval(value: Any, low: Any, high: Any) -> str:
    """A number with its 95% interval, if it has one."""
    bounds = f" [{number(low)}, {number(high)}]" if all(map(is_number, (value, low, high))) else ""
    return number(value) + bounds


def number(value: Any) -> str:
    """Three digits after the point below 10, one above; what is not finite is missing."""
    if not is_number(value):
        return MISSING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def hub_name(name: Any) -> str | None:
    """The name, if it can only be one on the hub."""
    repository, _ = hub_file(str(name))
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return None if Path(repository).suffix.lower() in FILE_SUFFIXES or Path(name).exists() else str(name)


def base_model_of(recipe: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The base model's repository, if it is on the hub, and the file's name, if it is a GGUF one."""
    name = str(recipe["model"])
    repository, file = hub_file(name)
    if file is None and is_gguf(name):
        file = public_name(name)
    return repository if hub_name(name) else None, file


def hub_dataset(path: str) -> str | None:
    """The repository of a hub data set, "name" or "name:config"; None for a local one."""
    return hub_name(path.partition(":")[0]) if re.fullmatch(r"[\w./-]+(:[\w.-]+)?", path) else None


def slug(text: Any) -> str:
    """Lower-case words with hyphens, as a tag on the hub."""
    return re.sub(r"[^a-z0-9.]+", "-", one_line(text).lower()).strip("-.")


def one_line(value: Any) -> str:
    """One line of printable text."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


# ---------------------------------------------------------------------- Markdown


def template(name: str) -> Any:
    """A template of this folder, which escapes each value that it shows."""
    environment = Environment(
        loader=FunctionLoader(lambda part: files("bridle.models").joinpath(f"{part}.md.jinja").read_text("utf-8")),
        autoescape=True,  # so that `Markup` marks what is escaped already
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def escaped(value: Any) -> Markup:
    """A value as plain text in Markdown: it can open no markup, no HTML and no further cell of a table."""
    return value if isinstance(value, Markup) else Markup(re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", one_line(value)))
