"""Labels in words: "some comment" with label 1 becomes "some comment\\nToxic: yes", which a language model can learn."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from bridle.data.rows import absent_column, row_numbers
from bridle.errors import UserError

TEMPLATE = "{text}\nToxic:{label}"
NAMES = {0: " no", 1: " yes"}

_TEMPLATE = re.compile(r"[^{}]*\{text\}([^{}]+)\{label\}")


@dataclass
class VerbalisedLabel:
    """How a row's text and its label are written as one text, to learn from and to score with.

    The label comes last, so that its likelihood given the text classifies the text. Training keeps the
    start of rows longer than its `max_length`, which would cut off the label: let `max_chars` prevent that.

    Attributes:
        column: the column that holds the label.
        template: "{text}", then the words that introduce the label, then "{label}" at the end.
        names: what each value of the column is called, the leading space included; two of them, the
            negative class first.
        max_chars: keep only so many characters of the text, to a whole word; None keeps all.

    Raises:
        UserError: for a template of another form, names that are not two and different, or a bound below 1.
    """

    column: str = "label"
    template: str = TEMPLATE
    names: dict[Any, str] = field(default_factory=lambda: dict(NAMES))
    max_chars: int | None = None

    def __post_init__(self) -> None:
        if not _TEMPLATE.fullmatch(self.template):
            raise UserError(f'template: {self.template!r} must read "...{{text}}...{{label}}", the label at the end')
        if len(self.names) != 2 or len(set(self.names.values())) != 2 or not all(self.names.values()):
            raise UserError(f"names: {self.names} must name two labels differently, as in {NAMES}")
        if self.max_chars is not None and self.max_chars < 1:
            raise UserError(f"max_chars: must be at least 1, not {self.max_chars}")

    @property
    def introduction(self) -> str:
        """The words between the text and its label: "\\nToxic:"."""
        match = _TEMPLATE.fullmatch(self.template)
        assert match is not None  # checked when this was made
        return match[1]

    def prompt(self, text: str) -> str:
        """The text as far as its label, which is to follow."""
        before, _ = self.template.removesuffix("{label}").split("{text}")
        return before + _cut(text, self.max_chars) + self.introduction

    def written(self, dataset: Dataset, name: str) -> Dataset:
        """The rows with their label in words behind the column `text`; a row without a text stays blank.

        Raises:
            UserError: naming `name` and the row, if there is no such column or a label has no name.
        """
        targets = self.targets(dataset, name)
        names = list(self.names.values())
        texts = [
            self.prompt(text) + names[target] if isinstance(text, str) and text.strip() else text
            for text, target in zip(_column(dataset, "text", name), targets, strict=True)
        ]
        return dataset.remove_columns("text").add_column("text", texts)

    def targets(self, dataset: Dataset, name: str) -> list[int]:
        """The label of each row, 1 for the positive class and 0 for the negative. Raises as `written`."""
        target_of = {value: target for target, value in enumerate(self.names)}
        values = _column(dataset, self.column, name)
        for number, value in zip(row_numbers(dataset), values, strict=True):
            if value not in target_of:
                known = " and ".join(map(repr, target_of))
                raise UserError(f"{name} row {number}: label {value!r} has no name; names are for {known}")
        return [target_of[value] for value in values]


def _column(dataset: Dataset, column: str, name: str) -> Sequence[Any]:
    if column not in dataset.column_names:
        raise absent_column(name, column, dataset.column_names)
    return dataset[column][:]


def _cut(text: str, max_chars: int | None) -> str:
    if max_chars is None or len(text) <= max_chars:
        return text
    start, *_ = text[: max_chars + 1].rsplit(maxsplit=1)
    return start[:max_chars]
