"""Constraints that need no model: a text complies when nothing in it matches."""

import re
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from bridle.constraints.base import TextConstraint
from bridle.constraints.options import Text, cause, checked
from bridle.constraints.reading import Reads
from bridle.errors import UserError


class Regex(TextConstraint):
    """A text complies when `pattern` (Python's `re` syntax) is found nowhere in it.

    Flags are written in the pattern, e.g. `(?i)` for either case. What a text is, `reads` says: see `Constraint`.

    Raises:
        UserError: the pattern cannot be compiled.
    """

    type_name = "regex"

    @checked
    def __init__(self, pattern: Text, name: str | None = None, reads: Reads = "completion"):
        self.pattern, self.name, self.reads = pattern, name or f"regex:{pattern}", reads
        try:
            self._regex = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"constraint 'regex': cannot read {pattern!r}: {cause(error)}") from error

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"pattern": self.pattern}

    def _score(self, texts: list[str]) -> list[float]:
        return [float(self._regex.search(text) is None) for text in texts]


class WordList(TextConstraint):
    """A text complies when it holds none of the words or phrases.

    Whole words only, in either case and any Unicode form: "grumble" is not found in "grumblefish", while
    "STRASSE" is found as "straße". Any white space may stand between the words of a phrase. A word ends where
    letters, digits, marks and underscores end, so in a script without spaces a `Regex` serves better.

    Args:
        words: the words, from any iterable but a single string.
        file: instead of `words`, a UTF-8 file with one word or phrase a line. What follows a '#' at the start
            of a line or after white space is a comment.
        name: how errors and tables call it; "words" or the file's name if not given.
        reads: see `Constraint`.

    Raises:
        UserError: `words` and `file` are both given or neither, the file is unreadable, or there is no word.
    """

    type_name = "words"

    @checked
    def __init__(
        self,
        words: list[str] | None = None,
        file: str | Path | None = None,
        name: str | None = None,
        reads: Reads = "completion",
    ):
        if (words is None) == (file is None):
            raise UserError("constraint 'words': needs exactly one of the keys 'words' and 'file'")
        self.file = None if file is None else str(file)
        self.name, self.reads = name or (Path(file).name if file is not None else "words"), reads
        self.words = [word for word in (_read_words(file) if words is None else words) if word.strip()]
        if not self.words:
            raise UserError(f"constraint 'words': {self.file or 'the list'} holds no word; give at least one")
        self._regex = _whole_words(self.words)

    def files(self) -> list[Path]:  # noqa: D102
        return [Path(self.file)] if self.file is not None else []

    def identity(self) -> dict[str, Any]:  # noqa: D102
        return super()._settings() | {"words": self.words}

    def _settings(self) -> dict[str, Any]:
        source = {"words": self.words} if self.file is None else {"file": self.file}
        return super()._settings() | source

    def _score(self, texts: list[str]) -> list[float]:
        return [float(self._regex.search(_fold(text)) is None) for text in texts]


def _read_words(file: str | Path | None) -> list[str]:
    try:
        lines = Path(str(file)).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no possible path
        raise UserError(f"constraint 'words': cannot read the file {file}: {cause(error)}") from error
    return [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines]


def _whole_words(words: list[str]) -> re.Pattern[str]:
    phrases = (r"\s+".join(map(re.escape, _fold(word).split())) for word in words)
    letter = rf"[\w{_marks()}]"
    return re.compile(rf"(?<!{letter})(?:{'|'.join(phrases)})(?!{letter})")


def _fold(text: str) -> str:
    """Returns the text with one form for every character, whatever its case, width or composition."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


@cache
def _marks() -> str:
    """Combining marks: a part of the word in Unicode, but not of `re`'s \\w."""
    return "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c).startswith("M"))
