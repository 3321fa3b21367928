"""Validation of a constraint's options, with errors of one line."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from reprlib import repr as short_repr
from typing import Annotated, Any, ParamSpec

from pydantic import Field, ValidationError, validate_call

from bridle.errors import UserError
from bridle.utils.settings import CHECKED_STRICTLY

P = ParamSpec("P")

Probability = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """Decorates a constructor: validates its arguments against the annotations and parses numbers written as text.

    Raises (the constructor):
        UserError: an argument is missing or wrong; it names the constraint's type and the key.
    """
    validated = validate_call(config=CHECKED_STRICTLY)(init)

    @wraps(init)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            validated(*args, **kwargs)
        except ValidationError as error:
            constraint: Any = args[0]
            mistake = error.errors()[0]
            key = mistake["loc"][0]
            if isinstance(key, int):  # a positional argument
                key = list(signature(init).parameters)[key]
            given = "" if mistake["type"] == "missing_argument" else f" (given: {short_repr(mistake['input'])})"
            what = mistake["msg"][:1].lower() + mistake["msg"][1:]
            raise UserError(f"constraint '{constraint.type_name}', key '{key}': {what}{given}") from None

    return wrapper


def cause(error: BaseException) -> str:
    """Returns the type of an error of foreign code and the first line of its message."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}".removesuffix(": ")
