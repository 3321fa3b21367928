"""Labels in words: a comment labelled 1 becomes "comment\\nToxic: yes", which a language model learns and scores."""

import re
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from bridle.data.readers import ROW
from bridle.data.rows import column_of, is_filled, warn_of_blank
from bridle.data.source import DataSource
from bridle.errors import UserError

TEMPLATE = "{text}\nToxic:{label}"
NAMES = {0: " no", 1: " yes"}

_TEMPLATE = re.compile(r"(?P<before>[^{}]*)\{text\}(?P<introduction>[^{}]+)\{label\}")


@dataclass
class VerbalisedLabel:
    """How a row's text and label become one text, to train on and to classify with.

    The label comes last, so that its likelihood given the text classifies the text. Training cuts the end of a row
    longer than `max_length`, and the label with it; `max_chars` prevents that.

    Attributes:
        column: the column that holds the label.
        template: "{text}", then the words that introduce the label, then "{label}", at the end.
        names: of the two values of the column, with leading spaces, the negative class first.
        max_chars: keep at most this many characters of the text, whole words only; None keeps all.

    Raises:
        UserError: for a template of another form, names that are not two and different, or a bound below 1.
    """

    column: str = "label"
    template: str = TEMPLATE
    names: dict[Any, str] = field(default_factory=lambda: dict(NAMES))
    max_chars: int | None = None

    def __post_init__(self) -> None:
        match = _TEMPLATE.fullmatch(self.template)
        if match is None:
            raise UserError(f'template: {self.template!r} must read "...{{text}}...{{label}}", with the label last')
        if len(self.names) != 2 or _one_begins_the_other(*self.names.values()):
            raise UserError(f"names: {self.names} must tell two labels apart from their first letters, as {NAMES} do")
        if self.max_chars is not None and self.max_chars < 1:
            raise UserError(f"max_chars: must be at least 1, not {self.max_chars}")
        self._before, self.introduction = match["before"], match["introduction"]

    def prompt(self, text: str) -> str:
        """The text and the words that introduce its label."""
        return self._before + _cut(text, self.max_chars) + self.introduction

    def without(self, text: str) -> str:
        """A model's output, up to where it introduces a label."""
        return text.partition(self.introduction)[0]

    def written(self, dataset: Dataset, name: str) -> Dataset:
        """The rows with the label in words at the end of the column `text`; blank rows are unchanged.

        Raises:
            UserError: beginning with `name`: a column is missing, or a label has no name.
        """
        words = list(self.names.values())
        labelled = [
            text if target is None else self.prompt(text) + words[target]
            for text, target in zip(column_of(dataset, "text", name), self.targets(dataset, name), strict=True)
        ]
        return dataset.remove_columns("text").add_column("text", labelled)

    def targets(self, dataset: Dataset, name: str) -> list[int | None]:
        """The class of each row: 0 (negative) or 1, and None of a blank one. Raises as `written`."""
        named, found = list(self.names), []
        rows = dataset[ROW][:] if ROW in dataset.column_names else range(1, len(dataset) + 1)
        columns = column_of(dataset, "text", name), column_of(dataset, self.column, name)
        for row, text, value in zip(rows, *columns, strict=True):
            is_text = isinstance(text, str) and is_filled(text)
            if is_text and value not in named:
                known = " and ".join(map(repr, named))
                raise UserError(f"{name} row {row}: the label {value!r} has no name; there are names for {known}")
            found.append(named.index(value) if is_text else None)
        return found


def labelled_texts(source: DataSource, label: VerbalisedLabel) -> tuple[list[str], list[int]]:
    """The texts of a source's rows, without a label, and their classes; blank rows are left out with a warning.

    Raises:
        UserError: as `DataSource.read` and `VerbalisedLabel.written`; no row holds a text.
    """
    dataset = source.read()
    texts, targets = column_of(dataset, "text", source.place), label.targets(dataset, source.place)
    kept = [(text, target) for text, target in zip(texts, targets, strict=True) if target is not None]
    if not kept:
        raise UserError(f"{source.place}: none of its {len(dataset)} rows holds a text")
    warn_of_blank(source.place, dataset, [index for index, target in enumerate(targets) if target is None], ["text"])
    return [text for text, _ in kept], [target for _, target in kept]


def _one_begins_the_other(first: str, second: str) -> bool:
    return first.startswith(second) or second.startswith(first)


def _cut(text: str, max_chars: int | None) -> str:
    """The longest prefix of at most `max_chars` characters that ends with a word, or within a longer word."""
    if max_chars is None:
        return text
    whole_words = re.match(rf".{{1,{max_chars}}}(?!\S)", text, re.DOTALL)
    return whole_words[0] if whole_words else text[:max_chars]
