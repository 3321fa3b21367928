"""The examination of a judge: how often it is right about pairs of completions whose answer is known.

Of each row of human text, the human continuation is better than four others: that of another row, its own words in
random order, the first half of its words, and its first third repeated to its length.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from pydantic import PositiveInt

from bridle.data import DataSource
from bridle.data.rows import filled_rows, format_fields
from bridle.errors import UserError
from bridle.evaluation.judges import Comparison, Example, Judge
from bridle.evaluation.statistics import Estimate, Result
from bridle.evaluation.win_rate import Game, ask, match_of, most_frequent, position_bias_of, reasons_of

HUMAN, KINDS = "human", ("another", "shuffled", "truncated", "repeated")
FEWEST_WORDS = 4  # of a human continuation
LEAST_ACCURACY = 0.6  # of a judge whose win rates mean something; 0.5 is chance


@dataclass(frozen=True)
class Continuations:
    """The continuations of one row of a file (from 1): the human one, and a worse one of each of `KINDS`."""

    row: int
    prompt: str
    texts: dict[str, str]

    def shown(self, first: str, second: str) -> Comparison:
        """The comparison of two of them, in this order."""
        return Comparison(self.prompt, self.texts[first], self.texts[second])


@dataclass
class HumanText(DataSource):
    """Held-out rows of human text, `text` or `prompt` and `completion`, of which pairs with a known answer are made.

    They are taken in a fixed random order; of rows with the same prompt or continuation, the first alone.

    Attributes:
        pairs: of each kind, one of each row; fewer if there are fewer rows.
        prompt_words: words of a text that are its prompt.
        completion_words: words at which a continuation is cut.

    Raises:
        UserError: as `DataSource`.
    """

    pairs: PositiveInt = 100
    prompt_words: PositiveInt = 8
    completion_words: PositiveInt = 24

    def examples_and_continuations(self, examples: int = 0) -> tuple[list[Example], list[Continuations]]:
        """Examples to show to a judge, and what other rows hold to examine it on.

        The examples take turns in kind and in the place of the human continuation.

        Raises:
            UserError: as `DataSource.read`; the rows are chats, or too few of them are long enough.
        """
        rows = self._human()
        own = examples + 1 if examples else 0  # the continuation of another row is one of these, too
        if len(rows) < own + 2:
            raise UserError(
                f"{self.place}: {len(rows)} different rows have a prompt and {FEWEST_WORDS} words after it, but "
                f"{own + 2} are needed to examine a judge that sees {examples} examples; give more or longer rows"
            )
        rng = Random(0)
        shown: list[Example] = []
        for number, found in enumerate(_continuations(rows[:own], rng)):
            kind = KINDS[number % len(KINDS)]
            in_both: tuple[Example, Example] = (found.shown(HUMAN, kind), "first"), (found.shown(kind, HUMAN), "second")
            shown.append(in_both[number % 2])
        return shown[:examples], list(_continuations(rows[own : own + self.pairs], rng))

    def _human(self) -> list[tuple[int, str, str]]:
        """The number, prompt and human continuation of each row that is long enough, in random order."""
        dataset = self.read()
        found: list[tuple[int, str, str]] = []
        known: set[tuple[int, str]] = set()
        for row, values in filled_rows(dataset, format_fields(dataset.column_names, self.place), self.place):
            prompt, completion = self._split(values, f"{self.place} row {row}")
            words = completion.split()[: self.completion_words]
            human = completion[: len(completion) - len(completion.lstrip())] + " ".join(words)
            is_new = not known & {(0, prompt), (1, human)}
            if is_new and len(words) >= FEWEST_WORDS and len(set(words)) > 1:
                known |= {(0, prompt), (1, human)}
                found.append((row, prompt, human))
        Random(0).shuffle(found)
        return found

    def _split(self, values: dict[str, Any], place: str) -> tuple[str, str]:
        if "text" in values:
            words = list(re.finditer(r"\S+", values["text"]))[: self.prompt_words]
            return values["text"][: words[-1].end()], values["text"][words[-1].end() :]
        prompt, completion = values.get("prompt"), values.get("completion")
        if not (isinstance(prompt, str) and isinstance(completion, str)):
            raise UserError(f"{place}: holds a chat; a judge is examined on text, or prompt and completion in text")
        return prompt, completion


def _continuations(rows: Sequence[tuple[int, str, str]], rng: Random) -> Iterator[Continuations]:
    for (row, prompt, human), (_, _, another) in zip(rows, [*rows[1:], *rows[:1]], strict=True):
        space, words = human[: len(human) - len(human.lstrip())], human.split()
        shuffled = words
        while shuffled == words:
            shuffled = rng.sample(words, len(words))
        half, third = words[: len(words) // 2], words[: max(len(words) // 3, 1)]
        repeated = islice(cycle(third), len(words))
        worse = (another, *(space + " ".join(some) for some in (shuffled, half, repeated)))
        yield Continuations(row, prompt, {HUMAN: human} | dict(zip(KINDS, worse, strict=True)))


@dataclass(frozen=True)
class JudgeExamination(Result):
    """How often a judge prefers the human continuation, in pairs that are shown in both orders.

    Attributes:
        accuracy: over the pairs of all kinds. A pair scores the mean over both orders of 1, 0.5 or 0 where the judge is
            right, calls a tie or is wrong; `missing` counts pairs without a verdict in both. The interval resamples
            rows.
        by_kind: the accuracy on the pairs of each kind.
        position_bias, asked, missing, reasons: as in `WinRates`.
    """

    judge: str
    accuracy: Estimate
    by_kind: dict[str, Estimate]
    position_bias: Estimate
    asked: int
    missing: int
    reasons: dict[str, int]

    @property
    def passed(self) -> bool:
        """Whether the accuracy is 60% or more, over all pairs and in all kinds but one.

        A judge that prefers the longer text is always right about truncated ones, and at chance about the others. One
        by likelihood prefers what repeats itself: show how often texts do beside its win rates.
        """
        enough = [kind.value is not None and kind.value >= LEAST_ACCURACY for kind in self.by_kind.values()]
        return (self.accuracy.value or 0.0) >= LEAST_ACCURACY and enough.count(False) <= 1

    def __str__(self) -> str:
        lines = [f"Judge {self.judge} on pairs whose better text is known: accuracy {self.accuracy}; 0.5 is chance"]
        lines += [f"  human against {kind}: {found}" for kind, found in self.by_kind.items()]
        lines.append(f"position bias: {self.position_bias} for the text shown first; 0.5 is none")
        lines.append(f"verdicts missing: {self.missing} of {self.asked}{most_frequent(self.reasons)}")
        if not self.passed:
            lines.append(
                f"It does not pass, with less than {LEAST_ACCURACY:.0%} of all pairs or of two kinds: win rates by it "
                "are not meaningful"
            )
        return "\n".join(lines)


def examine_judge(
    judge: Judge, rows: Sequence[Continuations], *, seed: int = 0, keep: Path | None = None
) -> JudgeExamination:
    """Examines a judge on the human continuation of each row against each of the others, in both orders.

    Args:
        seed: of the intervals.
        keep: as in `win_rates`; the methods are then "human" and the kinds.

    Raises:
        RunStopped: more than a tenth of the verdicts are certain to be missing.
    """

    def game(one: Continuations, first: str, second: str) -> Game:
        return Game(one.row - 1, first, second, one.shown(first, second))

    pairs = [(game(one, HUMAN, kind), game(one, kind, HUMAN)) for one in rows for kind in KINDS]
    verdicts = ask(judge, [order for pair in pairs for order in pair], keep, "examining")

    def accuracy(of: Sequence[tuple[Game, Game]]) -> Estimate:
        in_order, swapped = ([verdicts[pair[place]] for pair in of] for place in (0, 1))
        return match_of(in_order, swapped, [pair[0].texts.prompt for pair in of], seed).rate

    reasons = reasons_of(verdicts.values())
    return JudgeExamination(
        judge=judge.name,
        accuracy=accuracy(pairs),
        by_kind={kind: accuracy([pair for pair in pairs if pair[0].second == kind]) for kind in KINDS},
        position_bias=position_bias_of(verdicts.values()),
        asked=len(verdicts),
        missing=sum(reasons.values()),
        reasons=reasons,
    )
