"""How the options of a constraint are checked, and how their mistakes are told in one line."""

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
    """Checks a constructor's arguments against its annotations, and reads numbers written as text.

    Raises (the constructor that it decorates):
        UserError: an argument is missing or wrong; it names the constraint's type and the key.
    """
    validated = validate_call(config=CHECKED_STRICTLY)(init)

    @wraps(init)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            validated(*args, **kwargs)
        except ValidationError as error:
            raise UserError(_first_mistake(args[0], init, error)) from None

    return wrapper


def cause(error: BaseException) -> str:
    """Returns an error of somebody else's code as its type and the first line of its message."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}".removesuffix(": ")


def _first_mistake(constraint: Any, init: Callable, error: ValidationError) -> str:
    mistake = error.errors()[0]
    key = mistake["loc"][0]
    if isinstance(key, int):  # given by position
        key = list(signature(init).parameters)[key]
    what = mistake["msg"][:1].lower() + mistake["msg"][1:]
    message = f"constraint '{constraint.type_name}', key '{key}': {what}"
    if mistake["type"] == "missing_argument":
        return message
    return f"{message} (given: {short_repr(mistake['input'])})"
