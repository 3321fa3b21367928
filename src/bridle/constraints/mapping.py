"""Maps texts to an endpoint's JSON request, and its reply to numbers."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from types import NoneType
from typing import Any

import jmespath
from jmespath.exceptions import ArityError, JMESPathError, UnknownFunctionError

from bridle.constraints.base import Score
from bridle.constraints.cache import Label, Outcome
from bridle.constraints.options import cause
from bridle.constraints.reading import Messages
from bridle.errors import UserError
from bridle.utils.variables import map_strings

PLACEHOLDERS = ("{text}", "{texts}", "{messages}", "{prompt}", "{model}")
MARKS = " \t\r\n*`\"'"  # which chat models put around an answer
YES_NO = {"yes": 1.0, "no": 0.0}


@dataclass(frozen=True)
class JsonMapping:
    """Maps texts to a request and a reply to numbers. The attributes are options of `Remote`.

    Raises UserError, with the option's name, if one is missing or does not fit the others.
    """

    body: dict[str, Any]
    score: str
    items: str | None = None
    answer: str = "number"
    model: str | None = None
    prompt: str | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        _check_expression("score", self.score)
        if self.items is not None:
            _check_expression("items", self.items)
        try:
            json.dumps(self.body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"body: is not JSON ({error}); put dates and the like in quotes") from error
        strings = self._strings()
        for string in strings - {*PLACEHOLDERS}:
            if any(placeholder in string for placeholder in PLACEHOLDERS):
                raise UserError(f"body: {string!r} pastes text together; a placeholder stands alone, wording in prompt")
        texts = strings & {"{text}", "{texts}", "{messages}", "{prompt}"}
        mistakes = {
            "body: holds no text; write '{text}', '{texts}', '{messages}' or '{prompt}' there": not texts,
            "body: holds '{messages}' beside the same as text; use one of them": self.takes_messages and len(texts) > 1,
            "model: is missing": "{model}" in strings and self.model is None,
            "model: the body has no '{model}'": "{model}" not in strings and self.model is not None,
            "prompt: is missing": "{prompt}" in strings and self.prompt is None,
            "prompt: the body has no '{prompt}'": "{prompt}" not in strings and self.prompt is not None,
            "prompt: must hold {text}, where the text belongs": "{text}" not in (self.prompt or "{text}"),
            "batch_size: only a body with '{texts}' takes more than 1": self.batch_size > 1 and texts != {"{texts}"},
            "items: is missing; it finds the list with an entry for each text of a batch": (
                self.batch_size > 1 and self.items is None
            ),
        }
        for mistake, is_made in mistakes.items():
            if is_made:
                raise UserError(mistake)

    @property
    def takes_messages(self) -> bool:
        """Whether the request holds a chat's messages."""
        return "{messages}" in self._strings()

    def settings(self) -> dict[str, Any]:
        """Returns the options that are set and decide the numbers."""
        return {key: value for key, value in vars(self).items() if value is not None and key != "batch_size"}

    def request(self, outputs: Sequence[str | Messages]) -> Any:
        """Returns the JSON body for a batch of texts, or for one chat if it `takes_messages`."""
        first = outputs[0]
        values = {"{text}": first, "{texts}": list(outputs), "{messages}": first, "{model}": self.model}
        if self.prompt is not None and isinstance(first, str):
            values["{prompt}"] = self.prompt.replace("{text}", first)
        return map_strings(self.body, lambda string: values.get(string, string))

    def read(self, reply: Any, count: int) -> list[Outcome]:
        """Returns the label of each of `count` texts, or the reason why it is missing."""
        entries = _search(self.items, reply) if self.items else [reply]
        if not isinstance(entries, list) or len(entries) != count:
            found = f"{len(entries)} entries" if isinstance(entries, list) else "no list of entries"
            return [f"the reply holds {found} for {count} texts"] * count
        return [self._label(_search(self.score, entry)) for entry in entries]

    def _strings(self) -> set[str]:
        found: set[str] = set()
        map_strings(self.body, found.add)
        return found

    def _label(self, found: Any) -> Outcome:
        numbers = [_number(answer, self.answer) for answer in (found if isinstance(found, list) else [found])]
        label = tuple(number for number in numbers if number is not None)
        if not label or len(label) < len(numbers):
            return f"the reply's score is {_kind(found)}, which is no {self.answer}"
        return label


@dataclass(frozen=True)
class Scale:
    """The meaning of an endpoint's numbers. The attributes are options of `Remote`.

    Raises UserError if the range is empty or the threshold lies outside.
    """

    range: tuple[float, float] = (0.0, 1.0)
    violates: str = "high"
    threshold: float | None = None

    def __post_init__(self) -> None:
        low, high = self.range
        if not (isfinite(high - low) and low < high):
            raise UserError(f"range: must be two numbers, the smaller first, not {[low, high]}")
        if not low <= self.limit <= high:
            raise UserError(f"threshold: must lie in the range {[low, high]}, not {self.threshold}")

    @property
    def limit(self) -> float:
        """The threshold, or the middle of the range."""
        return sum(self.range) / 2 if self.threshold is None else self.threshold

    def settings(self) -> dict[str, Any]:
        """Returns all options as JSON values."""
        return {"range": list(self.range), "violates": self.violates, "threshold": self.limit}

    def checked(self, outcome: Outcome) -> Outcome:
        """Returns the outcome, or a reason for a label outside the range."""
        low, high = self.range
        if isinstance(outcome, str) or all(low <= number <= high for number in outcome):
            return outcome
        return f"the reply's score is not in [{low:g}, {high:g}]"

    def score(self, label: Label) -> Score:
        """Returns the degree of compliance of the number nearest to a violation."""
        low, high = self.range
        if self.violates == "high":
            return Score((high - max(label)) / (high - low), max(label) <= self.limit)
        return Score((min(label) - low) / (high - low), min(label) >= self.limit)


def _kind(found: Any) -> str:
    """Describes an answer's type without quoting it."""
    kinds = {NoneType: "null", bool: "true or false", str: "a text", list: "a list", dict: "a mapping"}
    return kinds.get(type(found), "a number of another kind")


def _check_expression(key: str, expression: str) -> None:
    try:
        compiled = jmespath.compile(expression)
    except JMESPathError as error:
        raise UserError(f"{key}: is not a JMESPath expression: {cause(error)}") from error
    try:
        compiled.search({})
    except (ArityError, UnknownFunctionError) as error:
        raise UserError(f"{key}: {cause(error)}") from error
    except JMESPathError:
        return  # an empty reply need not fit


def _search(expression: str, value: Any) -> Any:
    try:
        return jmespath.search(expression, value)
    except (JMESPathError, ArithmeticError, TypeError, RecursionError):
        return None  # the reply has another structure


def _number(answer: Any, kind: str) -> float | None:
    """Parses an answer strictly; None if it is not of its kind."""
    said = answer
    if isinstance(answer, str):
        said = answer.strip(MARKS).removesuffix(".").strip(MARKS).lower()
    if kind == "yes-no":
        return YES_NO.get(said) if isinstance(said, str) else None
    if kind == "boolean":
        return float(said) if isinstance(said, bool) else None
    if isinstance(said, str) and not re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?", said):
        return None
    if isinstance(said, bool) or not isinstance(said, str | int | float):
        return None
    try:
        number = float(said)
    except OverflowError:
        return None
    return number if isfinite(number) else None
