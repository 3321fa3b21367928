"""A constraint that is the user's Python function."""

import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir
from hashlib import blake2b
from inspect import Parameter, getsourcefile, signature
from pathlib import Path
from traceback import extract_tb
from typing import Any, cast

from pydantic import PositiveFloat, PositiveInt

from bridle.constraints.base import Constraint
from bridle.constraints.deadline import BATCH, batches, scored
from bridle.constraints.options import Text, cause, checked
from bridle.constraints.reading import Given, Messages, Reads, as_lines, turns_of
from bridle.errors import UserError


class PythonFunction(Constraint):
    """Calls a function on a list of texts.

    The function returns one number in [0, 1] (1 complies; at least 0.5 counts as complying), bool, or None (missing)
    for each text. It runs on one batch at a time, in a thread, on a copy of the list; a change of the current directory
    is undone.

    A function of one argument gets what `reads` names: texts, or lists of messages for "chat". A function of two gets
    the prompts (texts, or lists of messages for "chat") and the completions.

    Args:
        function: `module:function`, imported at the first use from `sys.path` or the current directory; or, from
            Python, the function itself.
        name: "python:FUNCTION" by default.
        reads: see `Constraint`.
        batch_size: texts in one call.
        timeout: seconds for a call, whose texts are missing after that. Its thread cannot be stopped.

    Raises:
        UserError: from `load` and `score`: the function cannot be imported, is not callable, or fails; it names the
            file and line that failed.
    """

    type_name = "python"

    @checked
    def __init__(
        self,
        function: Text | Callable,
        name: str | None = None,
        reads: Reads = "completion",
        batch_size: PositiveInt = BATCH,
        timeout: PositiveFloat = 60.0,
    ):
        self._call = function if callable(function) else None
        self.function = function if isinstance(function, str) else _name_of(function)
        self.name, self.reads = name or f"python:{self.function}", reads
        self.batch_size, self.timeout = batch_size, timeout

    @property
    def is_known(self) -> bool:
        """Whether name and module say which function it is: not a closure, a lambda or an object with a state."""
        if self._call is None:
            return True
        name = getattr(self._call, "__qualname__", "<object>")
        return "<" not in name and getattr(self._call, "__self__", None) is None and bool(self.files())

    def load(self) -> None:
        """Imports the function.

        Raises:
            UserError: it cannot be imported, or takes prompts although `reads` is "completion".
        """
        if self._call is None:
            self._call = _import(self.function)
        if self.reads == "completion" and _takes_prompts(self._call):
            raise UserError(
                f"constraint '{self.name}': {self.function} takes prompts and completions; "
                "add reads: prompt+completion (texts) or reads: chat (messages)"
            )

    def identity(self) -> dict[str, Any]:
        """Returns the settings with a hash of the function's module, without what that imports."""
        module = [blake2b(file.read_bytes()).hexdigest() for file in self.files()]
        return self._settings() | {"module": module[0] if module else None}

    def files(self) -> list[Path]:
        """Returns the function's module, without what that imports."""
        self.load()
        source = getattr(sys.modules.get(self.function.partition(":")[0]), "__file__", None)
        return [Path(source)] if source else []

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"function": self.function}

    def _judge(self, prompts: list[Given], completions: list[str]) -> Any:
        self.load()
        assert self._call is not None
        if not _takes_prompts(self._call):
            return super()._judge(prompts, completions)
        return self._called([self._prompt(prompt) for prompt in prompts], completions)

    def _prompt(self, prompt: Given) -> str | Messages:
        if self.reads == "chat":
            return turns_of(prompt)
        return as_lines(prompt) if isinstance(prompt, list) else prompt or ""

    def _score(self, outputs: list[Any]) -> Any:
        return self._called(outputs)

    def _called(self, *columns: list[Any]) -> list[Any]:
        """Returns the scores of all outputs; `columns` are the function's arguments."""
        parts = batches([*zip(*columns, strict=True)], self.batch_size)
        return [*scored(self.name, parts, self._call_once, self.timeout)]

    def _call_once(self, rows: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
        assert self._call is not None
        try:
            with chdir(os.getcwd()):  # restores it
                raw = self._call(*map(list, zip(*rows, strict=True)))
        except (Exception, SystemExit) as error:
            raise UserError(
                f"constraint '{self.name}': {self.function} failed on {len(rows)} texts: "
                f"{cause(error)}{_place(error, self._call)}"
            ) from error
        return self._listed(raw, len(rows))


def _name_of(function: Callable) -> str:
    """Returns `module:function`, with the class of a callable object as its function."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _place(error: BaseException, function: Callable) -> str:
    """Returns the line of an error in the function's own file, not in the libraries that it calls."""
    code = function if hasattr(function, "__code__") else type(function).__call__
    try:
        file = getsourcefile(code)
    except TypeError:  # not written in Python
        return ""
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({file}, line {lines[-1]})" if lines else ""


def _takes_prompts(function: Callable) -> bool:
    """Whether the function requires two arguments."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return False
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is Parameter.empty for p in parameters) == 2


def _import(function: str) -> Callable:
    if ":" not in function:
        raise UserError(f"constraint 'python': '{function}' is not of the form module:function")
    if "" not in sys.path:
        sys.path.append("")  # the current directory stays on it: the function may import more when called
    try:
        with chdir(os.getcwd()):
            found = pkgutil.resolve_name(function)
    except (Exception, SystemExit) as error:  # an import may raise anything
        raise UserError(f"constraint 'python': cannot import {function}: {cause(error)}") from error
    if not callable(found):
        raise UserError(f"constraint 'python': {function} is a {type(found).__name__}, not a function")
    return cast(Callable, found)
