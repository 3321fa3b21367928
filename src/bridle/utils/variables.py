"""Environment variables in recipes: which of them a recipe may read, and how files keep their names.

A recipe may be a stranger's, so it reads no variable that its key `env` does not list, but for those that say where
things lie (`PATHS`), at the beginning of a path. What is written anywhere shows the variable's name and not its value.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridle.errors import UserError

PATHS = re.compile("BRIDLE_[A-Z0-9_]+|HOME|HF_HOME")
"""Variables that any recipe may begin a path with."""

SHORTEST_HIDDEN = 8  # characters: what is shorter is no secret, and may well stand elsewhere

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_REFERENCE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Variables:
    """The variables that a recipe reads, by name alone: their values stay in the environment.

    Attributes:
        names: of the variables.
    """

    names: frozenset[str] = frozenset()

    def hidden(self, value: Any) -> Any:
        """A JSON value, or a path, with `${NAME}` in the place of a variable's value of 8 characters or more."""
        values = {os.environ.get(name, ""): name for name in sorted(self.names)}
        longest_first = sorted((text for text in values if len(text) >= SHORTEST_HIDDEN), key=len, reverse=True)
        if not longest_first:
            return value
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        return _mapped(value, lambda text: pattern.sub(lambda match: f"${{{values[match[0]]}}}", text))

    def expanded(self, value: Any) -> Any:
        """A value that `hidden` gave, as it was."""
        return filled(value, {name: os.environ[name] for name in self.names if name in os.environ})


NO_VARIABLES = Variables()


def expanded(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], Variables]:
    """A recipe with values in the place of `${NAME}` and `${NAME:-default}`, and which variables it reads.

    Raises:
        UserError: `env` is no list of names; a variable is not listed there, or has neither value nor default.
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
    return _mapped(values, lambda text: _REFERENCE.sub(variable, text)), Variables(frozenset(names))


def filled(value: Any, values: Mapping[str, str]) -> Any:
    """A JSON value with the given values in the place of their `${NAME}`; other references stay."""
    return _mapped(value, lambda text: _REFERENCE.sub(lambda match: values.get(match[1], match[0]), text))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string changed, but for a mapping's keys."""
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(inner, change) for inner in value]
    return change(str(value)) if isinstance(value, str | Path) else value
