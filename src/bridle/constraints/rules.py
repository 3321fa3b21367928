"""Constraints without a model: a text complies if nothing in it matches, or if it is long enough."""

import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import regex
from pydantic import NonNegativeInt, PositiveFloat

from bridle.constraints.base import Constraint, Score
from bridle.constraints.deadline import TimedOut, batches
from bridle.constraints.options import Text, cause, checked
from bridle.constraints.reading import Reads
from bridle.errors import UserError, first_line
from bridle.utils.progress import Progress

SHORTEST = 1e-3  # seconds; a timeout of 0 would mean none


class _Unmatched(Constraint):
    """Searches texts for an expression, each batch within `timeout` seconds; texts not searched by then are missing."""

    takes_messages = False
    timeout: float
    _regex: regex.Pattern[str]

    def _score(self, texts: list[str]) -> list[Score]:
        with Progress(f"scoring ({self.name})", len(texts), "texts") as progress:
            return [score for batch in batches(texts) for score in self._searched(batch, progress)]

    def _searched(self, texts: Sequence[str], progress: Progress) -> Iterator[Score]:
        end = time.monotonic() + self.timeout
        for text in texts:
            try:
                found = self._regex.search(self._folded(text), timeout=max(end - time.monotonic(), SHORTEST))
                yield Score.of(found is None)
            except TimeoutError:
                yield Score.missing(str(TimedOut(self.timeout)))
            progress.update()

    def _folded(self, text: str) -> str:
        return text


class Regex(_Unmatched):
    """A text complies if `pattern` is found nowhere in it.

    The syntax is that of the package `regex`, a superset of `re`; flags stand in the pattern, e.g. `(?i)` to ignore
    case.

    Args:
        pattern: the expression.
        name: "regex:PATTERN" by default.
        reads: see `Constraint`.
        timeout: seconds for a batch of 64 texts; those not searched by then are missing.

    Raises:
        UserError: the pattern cannot be compiled.
    """

    type_name = "regex"

    @checked
    def __init__(
        self, pattern: Text, name: str | None = None, reads: Reads = "completion", timeout: PositiveFloat = 60.0
    ):
        self.pattern, self.name, self.reads, self.timeout = pattern, name or f"regex:{pattern}", reads, timeout
        try:
            self._regex = regex.compile(pattern)
        except (regex.error, OverflowError, RecursionError) as error:
            raise UserError(f"constraint 'regex': cannot read {pattern!r}: {cause(error)}") from error

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"pattern": self.pattern}


class WordList(_Unmatched):
    """A text complies if it holds none of the words or phrases.

    Matches whole words only, in either case and any Unicode form: not "grumble" in "grumblefish", but "STRASSE" in
    "straße". Any white space may separate the words of a phrase. A word ends where letters, digits, marks and
    underscores end; for a script without spaces use `Regex`.

    Args:
        words: any iterable but a single string.
        file: instead of `words`, a UTF-8 file with one word or phrase a line; a '#' at the start of a line or after
            white space begins a comment.
        name: the file's name or "words" by default.
        reads: see `Constraint`.
        timeout: as in `Regex`.

    Raises:
        UserError: not exactly one of `words` and `file` is given, the file is unreadable, or there is no word.
    """

    type_name = "words"

    @checked
    def __init__(
        self,
        words: list[str] | None = None,
        file: str | Path | None = None,
        name: str | None = None,
        reads: Reads = "completion",
        timeout: PositiveFloat = 60.0,
    ):
        if (words is None) == (file is None):
            raise UserError("constraint 'words': needs exactly one of the keys 'words' and 'file'")
        self.file, self.timeout = None if file is None else str(file), timeout
        self.name, self.reads = name or (Path(file).name if file is not None else "words"), reads
        self.words = [word for word in (_read_words(file) if words is None else words) if word.strip()]
        if not self.words:
            raise UserError(f"constraint 'words': {self.file or 'the list'} holds no word; give at least one")
        self._regex = _whole_words(self.words)

    def files(self) -> list[Path]:
        return [Path(self.file)] if self.file is not None else []

    def identity(self) -> dict[str, Any]:
        return super()._settings() | {"words": self.words}

    def _settings(self) -> dict[str, Any]:
        source = {"words": self.words} if self.file is None else {"file": self.file}
        return super()._settings() | source

    def _folded(self, text: str) -> str:
        return _fold(text)


class Length(Constraint):
    """A text complies if its number of words is within bounds, both included.

    Beside a classifier, `min_words` keeps an empty output from complying: without it, to end at once is the surest way
    to violate nothing. A word is a run of letters, digits, marks and underscores; for a script without spaces use
    `Regex`.

    Args:
        min_words: the fewest words.
        max_words: the most; None for no bound.
        name: "length" by default.
        reads: see `Constraint`.

    Raises:
        UserError: neither bound is given, or the most is less than the fewest.
    """

    type_name = "length"
    takes_messages = False

    @checked
    def __init__(
        self,
        min_words: NonNegativeInt = 0,
        max_words: NonNegativeInt | None = None,
        name: str | None = None,
        reads: Reads = "completion",
    ):
        if min_words == 0 and max_words is None:
            raise UserError("constraint 'length': needs 'min_words' (1 or more) or 'max_words'")
        if max_words is not None and max_words < min_words:
            raise UserError(f"constraint 'length': max_words {max_words} is less than min_words {min_words}")
        self.min_words, self.max_words, self.name, self.reads = min_words, max_words, name or "length", reads

    def _score(self, texts: list[str]) -> list[Score]:
        word = regex.compile(r"\w+")  # combining marks belong to a word, as in Unicode, unlike in `re`
        counts = (sum(1 for _ in word.finditer(text)) for text in texts)
        return [Score.of(self.min_words <= n and (self.max_words is None or n <= self.max_words)) for n in counts]

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"min_words": self.min_words, "max_words": self.max_words}


def _read_words(file: str | Path | None) -> list[str]:
    try:
        lines = Path(str(file)).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not a possible path
        raise UserError(f"constraint 'words': cannot read the file {file}: {first_line(error)}") from error
    return [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines]


def _whole_words(words: list[str]) -> regex.Pattern[str]:
    phrases = (r"\s+".join(map(re.escape, _fold(word).split())) for word in words)
    return regex.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)")


def _fold(text: str) -> str:
    """Normalises a text's case, width and composition."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
