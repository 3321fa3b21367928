"""A constraint that is any Python function of the user's own."""

import pkgutil
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

from bridle.constraints.base import Constraint
from bridle.constraints.options import Text, cause, checked
from bridle.errors import UserError


class PythonFunction(Constraint):
    """Calls `module:function` on a list of texts.

    The function returns one number in [0, 1] (1 complies, at least 0.5 counts as complying), bool, or None
    (missing) for each text. At the first use its module is imported from `sys.path` or the current directory.

    Raises:
        UserError: from `load` and `score`: it cannot be imported, is not callable, or fails on the texts.
    """

    type_name = "python"

    @checked
    def __init__(self, function: Text, name: str | None = None):
        self.function, self.name = function, name or f"python:{function}"
        self._call: Callable | None = None

    def load(self) -> None:
        """Imports the function."""
        if self._call is None:
            self._call = _import(self.function)

    def identity(self) -> dict[str, Any]:
        """As the function's module is written; what that imports is not looked at."""
        self.load()
        source = getattr(sys.modules[self.function.partition(":")[0]], "__file__", None)
        return self._settings() | {"module": blake2b(Path(source).read_bytes()).hexdigest() if source else None}

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"function": self.function}

    def _score(self, texts: list[str]) -> Any:
        self.load()
        assert self._call is not None
        try:
            return self._call(texts)
        except Exception as error:
            raise UserError(
                f"constraint '{self.name}': {self.function} failed on {len(texts)} texts: {cause(error)}"
            ) from error


def _import(function: str) -> Callable:
    if ":" not in function:
        raise UserError(f"constraint 'python': '{function}' is not of the form module:function")
    if "" not in sys.path:
        sys.path.append("")  # the current directory; for good, since the function may import more when called
    try:
        found = pkgutil.resolve_name(function)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise UserError(f"constraint 'python': cannot import {function}: {cause(error)}") from error
    if not callable(found):
        raise UserError(f"constraint 'python': {function} is a {type(found).__name__}, not a function")
    return cast(Callable, found)
