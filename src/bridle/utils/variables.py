"""Environment variables in recipes.

A recipe, which may be a stranger's, reads only the variables that its key `env` lists, and those in `PATHS` at the
beginning of a path. Files show a variable's name instead of its value.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridle.errors import UserError

PATHS = re.compile("BRIDLE_[A-Z0-9_]+|HOME|HF_HOME")
"""Variables that may begin a path in any recipe."""

SHORTEST_HIDDEN = 8  # characters: a shorter value is no secret, and may occur elsewhere

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_REFERENCE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Variables:
    """The names of the variables that a recipe reads; their values stay in the environment."""

    names: frozenset[str] = frozenset()

    def hidden(self, value: Any) -> Any:
        """Replaces the values of variables, from 8 characters, by `${NAME}` in a JSON value or a path."""
        values = {os.environ.get(name, ""): name for name in sorted(self.names)}
        longest_first = sorted((text for text in values if len(text) >= SHORTEST_HIDDEN), key=len, reverse=True)
        if not longest_first:
            return value
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        return map_strings(value, lambda text: pattern.sub(lambda match: f"${{{values[match[0]]}}}", text))

    def expanded(self, value: Any) -> Any:
        """Reverses `hidden`."""
        return filled(value, {name: os.environ[name] for name in self.names if name in os.environ})


NO_VARIABLES = Variables()


def expanded(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], Variables]:
    """Replaces `${NAME}` and `${NAME:-default}` in a recipe by values, and returns which variables it reads.

    Raises:
        UserError: `env` is not a list of names, or a variable is not listed there or has no value.
    """
    listed = recipe.get("env") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in listed):
        raise UserError(f"env: must be a list of names of environment variables, not {listed!r}")
    names = set()

    def variable(match: re.Match[str]) -> str:
        name = match[1]
        if name not in listed and not (PATHS.fullmatch(name) and match.start() == 0):
            raise UserError(
                f"{match[0]}: the recipe does not say that it reads {name}; if it should, list it as env: [{name}]"
            )
        names.add(name)
        found = os.environ.get(name, match[2])
        if found is None:
            raise UserError(f"the environment variable {name} is not set")
        return found

    values = {key: value for key, value in recipe.items() if key != "env"}
    return map_strings(values, lambda text: _REFERENCE.sub(variable, text)), Variables(frozenset(names))


def filled(value: Any, values: Mapping[str, str]) -> Any:
    """Replaces `${NAME}` in a JSON value by the given values; other references stay."""
    return map_strings(value, lambda text: _REFERENCE.sub(lambda match: values.get(match[1], match[0]), text))


def map_strings(value: Any, change: Callable[[str], Any]) -> Any:
    """Replaces every string in a JSON value except a mapping's keys."""
    if isinstance(value, Mapping):
        return {key: map_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(inner, change) for inner in value]
    return change(str(value)) if isinstance(value, str | Path) else value
