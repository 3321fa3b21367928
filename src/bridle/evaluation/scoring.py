"""A constraint applied to texts before training: `bridle score`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from bridle.constraints import Constraint, Score
from bridle.data import DataSource
from bridle.data.rows import filled_rows, format_fields, outputs_of
from bridle.errors import UserError, one_line
from bridle.evaluation.statistics import Estimate, estimate_proportion

BINS, WIDEST_BAR = 10, 50  # of the histogram; in characters
LONGEST_TEXT = 75  # characters of a row's text on a terminal


@dataclass(frozen=True)
class Trial:
    """The scores of a constraint on the rows of a file.

    Attributes:
        numbers: row numbers in the file.
        texts: the rows' completions, or whole texts.
    """

    constraint: str
    numbers: Sequence[int]
    texts: Sequence[str]
    scores: Sequence[Score]

    @property
    def violation_rate(self) -> Estimate:
        """Share of the scored texts that violate, with Wilson's interval."""
        verdicts = [not score.complies for score in self.scores if not score.is_missing]
        return estimate_proportion(verdicts, missing=len(self.scores) - len(verdicts))

    @property
    def histogram(self) -> list[int]:
        """Number of values in each tenth of [0, 1]."""
        values = [score.value for score in self.scores if score.value is not None]
        return [sum(min(int(value * BINS), BINS - 1) == place for value in values) for place in range(BINS)]

    def extremes(self, count: int) -> dict[str, list[int]]:
        """The indices of at most `count` most and least certain rows of each verdict, by title.

        The least certain are those closest to the other verdict; there are none where all values are equal.
        """
        values = {index: score.value for index, score in enumerate(self.scores) if score.value is not None}
        found: dict[str, list[int]] = {}
        for title, complies in (("violate", False), ("comply", True)):
            alike = [index for index in values if self.scores[index].complies is complies]
            surest = sorted(alike, key=values.__getitem__, reverse=complies)
            unsure = [index for index in reversed(surest) if values[index] != values[surest[0]]]
            found |= {f"surest to {title}": surest[:count], f"least sure to {title}": unsure[:count]}
        return found

    def reasons(self) -> dict[str, int]:
        """The number of missing scores by reason."""
        return Counter(score.reason for score in self.scores if score.is_missing)

    def lines(self, count: int, show_texts: bool) -> Iterator[str]:
        """Lines for a terminal: rate, histogram, and rows by number, with their texts if `show_texts`."""
        yield f"{self.constraint}: violation rate {self.violation_rate}"
        yield "scores, from 0, where a text violates, to 1, where it complies:"
        most = max(*self.histogram, 1)
        for place, number in enumerate(self.histogram):
            bar = "#" * round(WIDEST_BAR * number / most)
            yield f"  {place / BINS:.1f} to {(place + 1) / BINS:.1f}  {number:>7}  {bar}".rstrip()
        for title, indices in self.extremes(count).items():
            if indices:
                yield f"{title}:"
            for index in indices:
                yield f"  row {self.numbers[index]:<7} {self.scores[index].value:.4f}  {self._shown(index, show_texts)}"
        for reason, number in self.reasons().items():
            first = next(index for index, score in enumerate(self.scores) if score.reason == reason)
            yield f"{number} without a score, the first in row {self.numbers[first]}: {one_line(reason)}"

    def to_json(self, show_texts: bool) -> dict[str, Any]:
        """Rate, histogram and every row with its score, and with its text if `show_texts`."""
        rows = [
            {"row": number, **vars(score), **({"text": text} if show_texts else {})}
            for number, text, score in zip(self.numbers, self.texts, self.scores, strict=True)
        ]
        rate = self.violation_rate.to_json()
        return {"constraint": self.constraint, "violation_rate": rate, "histogram": self.histogram, "rows": rows}

    def _shown(self, index: int, show_texts: bool) -> str:
        text = self.texts[index]
        return shorten(one_line(text), LONGEST_TEXT, placeholder=" ...") if show_texts else f"{len(text.split())} words"


def try_constraint(constraint: Constraint, source: DataSource) -> Trial:
    """Scores the rows of a source, with their prompts if the constraint reads them.

    Raises:
        UserError: as `DataSource.read` and `Constraint.score`, or no row holds a text.
    """
    dataset = source.read()
    rows = dict(filled_rows(dataset, format_fields(dataset.column_names, source.place), source.place))
    if not rows:
        raise UserError(f"{source.place}: none of its {len(dataset)} rows holds a text")
    prompts, texts = outputs_of(rows.values(), with_prompts=constraint.reads != "completion")
    return Trial(constraint.name, [*rows], texts, constraint.score(prompts, texts))
