"""Between texts and an endpoint's JSON: a request from a template, and numbers from a reply."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import jmespath
from jmespath.exceptions import ArityError, JMESPathError, UnknownFunctionError

from bridle.constraints.base import Score
from bridle.constraints.cache import Label, Outcome
from bridle.constraints.options import cause
from bridle.constraints.reading import Messages
from bridle.errors import UserError

PLACEHOLDERS = ("{text}", "{texts}", "{messages}", "{prompt}", "{model}")
MARKS = " \t\r\n*`\"'"  # what chat models put around an answer
YES_NO = {"yes": 1.0, "no": 0.0}


@dataclass(frozen=True)
class JsonMapping:
    """From texts to a request, and from a reply to numbers. The attributes are options of `Remote`.

    Raises:
        UserError: naming the option: one is missing, or they do not fit each other.
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
        strings = set(_strings(self.body))
        for string in strings - {*PLACEHOLDERS}:
            if any(placeholder in string for placeholder in PLACEHOLDERS):
                raise UserError(f"body: {string!r} pastes text together; a placeholder stands alone, wording in prompt")
        texts = strings & {"{text}", "{texts}", "{messages}", "{prompt}"}
        if not texts:
            raise UserError("body: holds no text; write '{text}', '{texts}', '{messages}' or '{prompt}' there")
        if self.takes_messages and len(texts) > 1:
            raise UserError("body: holds '{messages}' beside the same as text; one of them will do")
        if "{model}" in strings and self.model is None:
            raise UserError("model: is missing")
        if ("{prompt}" in strings) != (self.prompt is not None):
            raise UserError("prompt: is missing" if self.prompt is None else "prompt: the body has no '{prompt}'")
        if self.prompt is not None and "{text}" not in self.prompt:
            raise UserError("prompt: must hold {text}, where the text belongs")
        if self.batch_size > 1 and texts != {"{texts}"}:
            raise UserError("batch_size: only a body with '{texts}' takes more than 1")
        if self.batch_size > 1 and self.items is None:
            raise UserError("items: is missing; it finds the list with an entry for each text of a batch")

    @property
    def takes_messages(self) -> bool:
        """Whether the endpoint gets a chat as its messages."""
        return "{messages}" in _strings(self.body)

    def settings(self) -> dict[str, Any]:
        """What decides the numbers; options that are not set are left out."""
        return {key: value for key, value in vars(self).items() if value is not None and key != "batch_size"}

    def request(self, outputs: Sequence[str | Messages]) -> Any:
        """The body for a batch of texts, or for one chat where it `takes_messages`, as a JSON value."""
        first = outputs[0]
        values = {"{text}": first, "{texts}": list(outputs), "{messages}": first, "{model}": self.model}
        if self.prompt is not None and isinstance(first, str):
            values["{prompt}"] = self.prompt.replace("{text}", first)
        return _filled(self.body, values)

    def read(self, reply: Any, count: int) -> list[Outcome]:
        """What a reply to `count` texts says of each: a label, or the reason why it is none."""
        entries = _search(self.items, reply) if self.items else [reply]
        if not isinstance(entries, list) or len(entries) != count:
            found = f"{len(entries)} entries" if isinstance(entries, list) else "no list of entries"
            return [f"the reply holds {found} for {count} texts"] * count
        return [self._label(_search(self.score, entry)) for entry in entries]

    def _label(self, found: Any) -> Outcome:
        numbers = [_number(answer, self.answer) for answer in (found if isinstance(found, list) else [found])]
        label = tuple(number for number in numbers if number is not None)
        if not label or len(label) < len(numbers):
            return f"the reply's score is {_kind(found)}, which is no {self.answer}"
        return label


@dataclass(frozen=True)
class Scale:
    """What an endpoint's numbers mean. The attributes are options of `Remote`.

    Raises:
        UserError: the range is none, or the threshold lies outside.
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
        """All options, as JSON values."""
        return {"range": list(self.range), "violates": self.violates, "threshold": self.limit}

    def checked(self, outcome: Outcome) -> Outcome:
        """The outcome, or the reason why a label is none on this scale."""
        low, high = self.range
        if isinstance(outcome, str) or all(low <= number <= high for number in outcome):
            return outcome
        return f"the reply's score is not in [{low:g}, {high:g}]"

    def score(self, label: Label) -> Score:
        """The number nearest to a violation, as a degree of compliance."""
        low, high = self.range
        if self.violates == "high":
            worst = max(label)
            return Score((high - worst) / (high - low), not worst > self.limit)
        worst = min(label)
        return Score((worst - low) / (high - low), not worst < self.limit)


def _kind(found: Any) -> str:
    """What an answer is, and not what it says: it may say anything."""
    if found is None:
        return "null"
    kinds = {bool: "true or false", str: "a text", list: "a list", dict: "a mapping"}
    return kinds.get(type(found), "a number of another kind")


def _check_expression(key: str, expression: str) -> None:
    try:
        compiled = jmespath.compile(expression)
    except JMESPathError as error:
        raise UserError(f"{key}: is no JMESPath expression: {cause(error)}") from error
    try:
        compiled.search({})
    except (ArityError, UnknownFunctionError) as error:
        raise UserError(f"{key}: {cause(error)}") from error
    except JMESPathError:
        return  # an empty reply is no reply


def _search(expression: str, value: Any) -> Any:
    try:
        return jmespath.search(expression, value)
    except (JMESPathError, ArithmeticError, TypeError, RecursionError):
        return None  # the reply has another shape


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(template, str):
        return values.get(template, template)
    if isinstance(template, Mapping):
        return {key: _filled(inner, values) for key, inner in template.items()}
    if isinstance(template, list):
        return [_filled(inner, values) for inner in template]
    return template


def _number(answer: Any, kind: str) -> float | None:
    """The number that an answer says, strictly; None where it says none."""
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
