"""The oracle C on a whole output text: `Score`, `Constraint` and their and / or / not.

C(x, y) is 1 where a text complies and 0 where it violates, or a probability in between (Meng et al.,
Findings of EMNLP 2024). A text that cannot be scored is missing; it never becomes a number.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from reprlib import repr as short_repr
from typing import Annotated, Any, ClassVar

from pydantic import Field

from bridle.constraints.options import checked
from bridle.errors import UserError
from bridle.variables import NO_VARIABLES, Variables


@dataclass(frozen=True)
class Score:
    """What a constraint says of one text.

    Attributes:
        value: degree or probability in [0, 1] that the text complies; None where it is missing.
        complies: the value as a verdict; None where it is missing.
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
        """Degree or probability that the text violates, 1 − `value`; None where it is missing."""
        return None if self.value is None else 1.0 - self.value


class Constraint(ABC):
    """A policy on whole texts. A subclass defines `_score`; callers use `score`.

    `a & b`, `a | b` and `~a` are constraints too: see `AllOf`, `AnyOf` and `Not`.

    Attributes:
        name: how errors, tables and rollouts call it.
        type_name: how a specification calls its kind.
        variables: of the environment, whose values are among its options and are told nowhere.
        waits: whether scoring is mostly waiting for another machine, so that other work can be done meanwhile. It
            must then be possible in a thread.
    """

    name: str = "constraint"
    type_name: ClassVar[str] = "constraint"
    variables: Variables = NO_VARIABLES
    waits: bool = False

    def score(self, texts: Sequence[str]) -> list[Score]:
        """Scores whole texts.

        Returns:
            One score for each text, in the same order.

        Raises:
            UserError: there is not one score for each text, or one is not a number in [0, 1]; it names
                this constraint and the text's index.
        """
        if isinstance(texts, str):
            raise TypeError("score takes a list of texts, not one text")
        texts = list(texts)
        if not texts:
            return []
        raw = self._score(texts)
        raw = raw.tolist() if hasattr(raw, "tolist") else raw  # tensors and arrays
        if not isinstance(raw, list | tuple) or len(raw) != len(texts):
            given = f"{len(raw)} scores" if isinstance(raw, list | tuple) else f"a {type(raw).__name__}"
            wanted = f"a list of {len(texts)}, one for each text"
            raise UserError(f"constraint '{self.name}': gave {given}; it must give {wanted}")
        return [self._checked(score, index) for index, score in enumerate(raw)]

    def load(self) -> None:  # noqa: B027 (most have nothing to load)
        """Loads what scoring needs, so that a mistake shows before long work; `score` does so by itself.

        Raises:
            UserError: it cannot be loaded.
        """

    def describe(self) -> dict[str, Any]:
        """Returns what decides the scores, as JSON values that `build_constraint` takes back."""
        described: dict[str, Any] = self.variables.hidden(self._settings() | {"name": self.name})
        return described

    def identity(self) -> dict[str, Any]:
        """Returns what decides the scores, as JSON values, for a cache: no names, and files by their content."""
        return self._settings()

    @abstractmethod
    def _score(self, texts: list[str]) -> Sequence[Score | float | None]:
        """Returns for each text a `Score`, a number in [0, 1] (1 complies), or None where it is missing."""

    def _settings(self) -> dict[str, Any]:
        return {"type": self.type_name}

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
    """Returns a number of any library as a float, and NaN for what is no number."""
    try:
        return nan if isinstance(raw, str | bytes) else float(raw)
    except (TypeError, ValueError, OverflowError):
        return nan


Parts = Annotated[list[Constraint], Field(min_length=1)]


class _Combination(Constraint):
    """Constraints joined by one operator. What a part cannot score is missing, for the part's reason."""

    def __init__(self, parts: list[Constraint], name: str):
        self.parts, self.name = parts, name
        self.waits = any(part.waits for part in parts)

    def load(self) -> None:
        for part in self.parts:
            part.load()

    def identity(self) -> dict[str, Any]:
        return {self.type_name: [part.identity() for part in self.parts]}

    def _settings(self) -> dict[str, Any]:
        return {self.type_name: [part.describe() for part in self.parts]}

    def _score(self, texts: list[str]) -> list[Score]:
        by_part = [part.score(texts) for part in self.parts]
        return [self._joined(scores) for scores in zip(*by_part, strict=True)]

    def _joined(self, scores: Sequence[Score]) -> Score:
        for score in scores:
            if score.is_missing:
                return score
        return self._join([float(s.value or 0) for s in scores], [bool(s.complies) for s in scores])

    @abstractmethod
    def _join(self, values: list[float], complies: list[bool]) -> Score:
        """Returns the joint score of one text, of which no part is missing."""


class AllOf(_Combination):
    """Complies where every part does; its value is the smallest of theirs."""

    type_name = "all"

    @checked
    def __init__(self, parts: Parts, name: str | None = None):
        super().__init__(parts, name or f"({' & '.join(part.name for part in parts)})")

    def _join(self, values: list[float], complies: list[bool]) -> Score:
        return Score(min(values), all(complies))


class AnyOf(_Combination):
    """Complies where at least one part does; its value is the largest of theirs."""

    type_name = "any"

    @checked
    def __init__(self, parts: Parts, name: str | None = None):
        super().__init__(parts, name or f"({' | '.join(part.name for part in parts)})")

    def _join(self, values: list[float], complies: list[bool]) -> Score:
        return Score(max(values), any(complies))


class Not(_Combination):
    """Complies where its part does not; its value is 1 − the part's."""

    type_name = "not"

    @checked
    def __init__(self, part: Constraint, name: str | None = None):
        super().__init__([part], name or f"~{part.name}")

    def _settings(self) -> dict[str, Any]:
        return {"not": self.parts[0].describe()}

    def _join(self, values: list[float], complies: list[bool]) -> Score:
        return Score(1.0 - values[0], not complies[0])
