"""The oracle C on a whole output: `Score`, `Constraint` and their and / or / not.

C(x, y) is 1 if a text complies and 0 if it violates, or a probability in between (Meng et al., Findings of EMNLP
2024). A text that cannot be scored is missing; it never becomes a number.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from json import dumps
from math import nan
from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated, Any, ClassVar, get_args

from pydantic import Field

from bridle.constraints.options import checked
from bridle.constraints.reading import Given, Messages, Reads, as_lines, conversation
from bridle.errors import UserError
from bridle.utils.variables import NO_VARIABLES, Variables


@dataclass(frozen=True)
class Score:
    """A constraint's score of one text.

    Attributes:
        value: degree or probability in [0, 1] that the text complies; None if it is missing.
        complies: the verdict; None if it is missing.
        reason: why it is missing.

    Raises:
        ValueError: only one of `value` and `complies` is None.
    """

    value: float | None
    complies: bool | None
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != (self.complies is None):
            raise ValueError("a score has both a value and a verdict, or neither")

    @classmethod
    def of(cls, value: float, threshold: float = 0.5) -> "Score":
        """Returns the score of a text that complies if and only if `value` ≥ `threshold`."""
        return cls(float(value), bool(value >= threshold))

    @classmethod
    def missing(cls, reason: str) -> "Score":
        """Returns the score of a text that could not be scored."""
        return cls(None, None, reason)

    @property
    def is_missing(self) -> bool:
        """Whether the text could not be scored."""
        return self.value is None

    @property
    def violation(self) -> float | None:
        """Degree or probability that the text violates, 1 − `value`; None if it is missing."""
        return None if self.value is None else 1.0 - self.value


class Constraint:
    """A policy on whole outputs. A subclass defines `_score` on what it `reads`; callers use `score`.

    `a & b`, `a | b` and `~a` are constraints too: see `AllOf`, `AnyOf` and `Not`.

    Attributes:
        name: its name in errors, tables and rollouts.
        type_name: its type in a specification.
        variables: environment variables whose values are among its options and are never shown.
        reads: the input of `_score` for each output: the "completion"; "prompt+completion", joined to one text; or the
            "chat", a list of messages that ends with the completion (see `conversation`). A chat prompt is joined as
            lines "role: content". An output without a prompt is its completion alone.
        waits: whether scoring mostly waits for another host, so that other work can run meanwhile. Scoring must then
            work in a thread.
        takes_messages: whether `_score` takes a chat as messages, rather than as lines of text.
        parts: the constraints whose scores it uses.
    """

    name: str = "constraint"
    type_name: ClassVar[str] = "constraint"
    variables: Variables = NO_VARIABLES
    reads: Reads = "completion"
    waits: bool = False
    takes_messages: bool = True
    parts: Sequence["Constraint"] = ()

    def score(self, prompts: Sequence[Given] | None, completions: Sequence[str]) -> list[Score]:
        """Scores whole outputs.

        Args:
            prompts: of each completion: text, the messages before it, or None; None if no completion has one.
            completions: the texts to judge.

        Returns:
            One score for each completion, in the same order.

        Raises:
            UserError: there is not one score for each completion, or one is not a number in [0, 1]; it names
                this constraint and the completion's index.
        """
        if isinstance(prompts, str) or isinstance(completions, str):
            raise TypeError("score takes a list of texts (and one of prompts), not one text")
        completions = list(completions)
        prompts = [None] * len(completions) if prompts is None else list(prompts)
        if len(prompts) != len(completions):
            raise ValueError(f"score: there are {len(prompts)} prompts for {len(completions)} completions")
        if not completions:
            return []
        raw = self._listed(self._judge(prompts, completions), len(completions))
        return [self._checked(score, index) for index, score in enumerate(raw)]

    def load(self) -> None:
        """Loads what `score` needs, which otherwise does it at its first call, so that mistakes show early.

        Raises:
            UserError: it cannot be loaded.
        """
        for part in self.parts:
            part.load()

    def files(self) -> list[Path]:
        """Returns the local files and folders that decide the scores."""
        return [file for part in self.parts for file in part.files()]

    def cut_texts(self) -> int:
        """Returns how many texts so far were too long and scored in part only."""
        return sum(part.cut_texts() for part in self.parts)

    def describe(self) -> dict[str, Any]:
        """Returns the options that decide the scores, as JSON values that `build_constraint` accepts."""
        described: dict[str, Any] = self.variables.hidden(self._settings() | {"name": self.name})
        return described

    def identity(self) -> dict[str, Any]:
        """Returns a cache key as JSON values: what decides the scores, without names, and files by their content."""
        return self._settings()

    def key(self, prompt: Given, completion: str) -> str:
        """Returns a text that two outputs share only if this constraint reads the same of both."""
        return completion if self.reads == "completion" else dumps([prompt, completion], sort_keys=True)

    def _judge(self, prompts: list[Given], completions: list[str]) -> Any:
        """Returns what `_score` returns, for outputs with their prompts."""
        return self._score([self._read(*output) for output in zip(prompts, completions, strict=True)])

    def _score(self, outputs: list[Any]) -> Sequence[Score | float | None]:
        """Returns for each output a `Score`, a number in [0, 1] (1 complies), or None if it is missing."""
        raise NotImplementedError(f"{type(self).__name__} defines no _score")

    def _read(self, prompt: Given, completion: str) -> str | Messages:
        """Returns what `reads` names of one output."""
        if self.reads == "completion":
            return completion
        if self.reads != "chat" and not isinstance(prompt, list):
            return (prompt or "") + completion
        messages = conversation(prompt, completion)
        return messages if self.reads == "chat" and self.takes_messages else self._as_text(messages)

    def _as_text(self, messages: Messages) -> str:
        return as_lines(messages)

    def _settings(self) -> dict[str, Any]:
        reads = {} if self.reads == "completion" else {"reads": self.reads}
        return {"type": self.type_name} | reads

    def _listed(self, raw: Any, count: int) -> Sequence[Any]:
        """Returns the scores of `count` texts, which may be a tensor or array, as a list or tuple."""
        raw = raw.tolist() if hasattr(raw, "tolist") else raw
        if not isinstance(raw, list | tuple) or len(raw) != count:
            given = f"{len(raw)} scores" if isinstance(raw, list | tuple) else f"a {type(raw).__name__}"
            raise UserError(
                f"constraint '{self.name}': gave {given}; it must give a list of {count}, one for each text"
            )
        return raw

    def _checked(self, raw: object, index: int) -> Score:
        if raw is None:
            return Score.missing(f"constraint '{self.name}' gave no score")
        score = raw if isinstance(raw, Score) else Score.of(_as_float(raw))
        if score.value is None:
            return Score.missing(self.variables.hidden(score.reason))
        value = _as_float(score.value)
        if not 0 <= value <= 1:  # NaN too
            given = short_repr(score.value if isinstance(raw, Score) else raw)
            raise UserError(
                f"constraint '{self.name}', text {index}: the score is {given}, not a number in [0, 1]"
                " (or None where there is none)"
            )
        return replace(score, value=value, complies=bool(score.complies))

    def __and__(self, other: "Constraint") -> "Constraint":
        return AllOf([self, other]) if isinstance(other, Constraint) else NotImplemented

    def __or__(self, other: "Constraint") -> "Constraint":
        return AnyOf([self, other]) if isinstance(other, Constraint) else NotImplemented

    def __invert__(self) -> "Constraint":
        return Not(self)


def _as_float(raw: Any) -> float:
    """Returns a number of any library as a float, and NaN for anything else."""
    try:
        return nan if isinstance(raw, str | bytes) else float(raw)
    except (TypeError, ValueError, OverflowError):
        return nan


Parts = Annotated[list[Constraint], Field(min_length=1)]


class _Combination(Constraint, ABC):
    """Constraints joined by one operator. A score that a part misses is missing, for the part's reason."""

    sign: ClassVar[str]

    @checked
    def __init__(self, parts: Parts, name: str | None = None):
        self.parts, self.name = parts, name or f"({f' {self.sign} '.join(part.name for part in parts)})"
        self.waits = any(part.waits for part in parts)
        read = {part.reads for part in parts}
        self.reads = max(read, key=get_args(Reads).index)  # the widest

    def identity(self) -> dict[str, Any]:
        return {self.type_name: [part.identity() for part in self.parts]}

    def _settings(self) -> dict[str, Any]:
        return {self.type_name: [part.describe() for part in self.parts]}

    def _judge(self, prompts: list[Given], completions: list[str]) -> list[Score]:
        by_part = [part.score(prompts, completions) for part in self.parts]
        return [self._joined(scores) for scores in zip(*by_part, strict=True)]

    def _joined(self, scores: Sequence[Score]) -> Score:
        for score in scores:
            if score.is_missing:
                return score
        return self._join([float(s.value or 0) for s in scores], [bool(s.complies) for s in scores])

    @abstractmethod
    def _join(self, values: list[float], complies: list[bool]) -> Score:
        """Returns the joint score of one text that every part has scored."""


class AllOf(_Combination):
    """Complies if every part does; its value is the smallest of theirs."""

    type_name, sign = "all", "&"

    def _join(self, values: list[float], complies: list[bool]) -> Score:
        return Score(min(values), all(complies))


class AnyOf(_Combination):
    """Complies if at least one part does; its value is the largest of theirs."""

    type_name, sign = "any", "|"

    def _join(self, values: list[float], complies: list[bool]) -> Score:
        return Score(max(values), any(complies))


class Not(_Combination):
    """Complies if its part does not; its value is 1 − the part's."""

    type_name = "not"

    @checked
    def __init__(self, part: Constraint, name: str | None = None):
        super().__init__([part], name or f"~{part.name}")

    def _settings(self) -> dict[str, Any]:
        return {"not": self.parts[0].describe()}

    def _join(self, values: list[float], complies: list[bool]) -> Score:
        return Score(1.0 - values[0], not complies[0])
