"""Win rates: pairwise comparisons of methods on the same prompts, by the verdicts of a judge.

Every pair of completions is judged in both orders, since judges have a position bias. On a prompt a method scores the
mean over both orders of 1, 0.5 or 0 for a win, tie or loss, so a judge that prefers a position gives 0.5 to both. A
pair with a missing verdict in either order is excluded, because the other order alone is biased.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, permutations, zip_longest
from pathlib import Path

from bridle.data.readers import ROW
from bridle.data.rows import column_of
from bridle.data.source import DataSource
from bridle.errors import RunStopped, UserError
from bridle.evaluation.judges import Comparison, Judge, Verdict
from bridle.evaluation.statistics import Estimate, Result, estimate_mean, estimate_proportion, with_width
from bridle.utils.files import append_text, writing
from bridle.utils.progress import Progress

MOST_MISSING = 0.1  # share of missing verdicts that stops the run
ASKED_AT_ONCE = 64  # comparisons between two writes to the file that keeps the verdicts

IDENTICAL = Verdict("tie", "the completions are equal")

_POINTS: dict[str | None, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}


@dataclass(frozen=True)
class Match:
    """The result of one method, or kind of text, against another.

    Attributes:
        rate: mean score over the prompts; its interval resamples prompts. `missing` counts excluded pairs of
            completions.
        wins: pairs of completions with a score above 0.5.
        contradictions: ties in which the judge preferred the same position in both orders.
        identical: ties of equal completions, which the judge does not see.
    """

    rate: Estimate
    wins: int
    ties: int
    losses: int
    contradictions: int
    identical: int

    def reversed(self) -> "Match":
        """The match from the other method's side."""
        ends = self.rate.value, self.rate.high, self.rate.low
        value, low, high = (None if end is None else 1.0 - end for end in ends)
        rate = replace(self.rate, value=value, low=low, high=high)
        return replace(self, rate=rate, wins=self.losses, losses=self.wins)


@dataclass(frozen=True)
class WinRates(Result):
    """All methods against each other.

    Attributes:
        pairs: number of completions of each method, and of pairs of completions in each match.
        matrix: `matrix[row][column]` is the match of method `row` against method `column`.
        mean_length: of each method's completions in words, since judges tend to favour length.
        position_bias: share of the verdicts other than ties for the first text; 0.5 without bias, since each pair is
            shown in both orders. Wilson's interval treats verdicts as independent and is too wide where they cancel.
        asked: number of requested verdicts.
        reasons: number of missing verdicts by reason, the most frequent first.
    """

    judge: str
    pairs: int
    matrix: dict[str, dict[str, Match]]
    mean_length: dict[str, Estimate]
    position_bias: Estimate
    asked: int
    missing: int
    reasons: dict[str, int]

    def __str__(self) -> str:
        table = [["", *self.matrix, "mean words"]]
        for method, matches in self.matrix.items():
            rates = [_percent(matches[column].rate) if column in matches else "–" for column in self.matrix]
            table.append([method, *rates, f"{self.mean_length[method].value:.1f}"])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"Win rate of row over column in %, a tie half a win; judge {self.judge}, {self.pairs} pairs each"]
        for row in table:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for one, other in combinations(self.matrix, 2):
            match = self.matrix[one][other]
            lines.append(
                f"{one} against {other}: {match.wins} won, {match.ties} tied ({match.identical} identical, "
                f"{match.contradictions} by a change of order), {match.losses} lost, {match.rate.missing} left out"
            )
        lines.append(f"position bias: {self.position_bias} for the text shown first; 0.5 is none")
        lines.append(f"verdicts missing: {self.missing} of {self.asked}{most_frequent(self.reasons)}")
        return "\n".join(lines)


def win_rates(
    prompts: Sequence[str],
    completions: Mapping[str, Sequence[str]],
    judge: Judge,
    *,
    seed: int = 0,
    keep: Path | None = None,
) -> WinRates:
    """Judges every pair of methods on every prompt, in both orders.

    Equal completions are a tie. The bootstrap resamples distinct prompts, so the samples of a prompt stay together.

    Args:
        prompts: [n] texts.
        completions: [n] completions by method, in the order of the prompts.
        keep: file to which the verdicts are appended as they arrive, as JSON lines: judge, row (1-based), the methods
            shown first and second, the winner and, where that is null, the reason.

    Raises:
        UserError: fewer than two methods, no prompts, or a method with another number of completions.
        RunStopped: more than a tenth of the verdicts are certain to be missing.
    """
    _check(prompts, completions)
    # Row by row, so that the verdicts of a run that stops are spread evenly over the methods.
    games = [
        Game(row, first, second, Comparison(prompt, completions[first][row], completions[second][row]))
        for row, prompt in enumerate(prompts)
        for first, second in permutations(completions, 2)
    ]
    asked = [game for game in games if game.texts.first != game.texts.second]
    verdicts = ask(judge, asked, keep)
    by_order: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for game in games:
        by_order[game.first, game.second].append(verdicts.get(game, IDENTICAL))
    matrix: dict[str, dict[str, Match]] = {method: {} for method in completions}
    for one, other in combinations(completions, 2):
        match = match_of(by_order[one, other], by_order[other, one], prompts, seed)
        matrix[one][other], matrix[other][one] = match, match.reversed()
    lengths = {method: [len(text.split()) for text in texts] for method, texts in completions.items()}
    reasons = reasons_of(verdicts.values())
    return WinRates(
        judge=judge.name,
        pairs=len(prompts),
        matrix=matrix,
        mean_length={name: estimate_mean(_by_prompt(prompts, values), seed=seed) for name, values in lengths.items()},
        position_bias=position_bias_of(verdicts.values()),
        asked=len(asked),
        missing=sum(reasons.values()),
        reasons=reasons,
    )


def read_completions(path: str | Path) -> tuple[list[str], list[str]]:
    """Prompts and completions of a file of `bridle generate --output`, empty texts included.

    Raises:
        UserError: the file cannot be read, lacks the column prompt or completion, or a row has no text there.
    """
    rows = DataSource(str(path)).read()
    columns = []
    for column in ("prompt", "completion"):
        columns.append(column_of(rows, column, str(path)))
        for number, text in zip(rows[ROW][:], columns[-1], strict=True):
            if not isinstance(text, str):
                raise UserError(f"{path} row {number}: column {column!r} holds {type(text).__name__}, not text")
    return columns[0], columns[1]


def read_methods(files: Mapping[str, str | Path]) -> tuple[list[str], dict[str, list[str]]]:
    """Prompts, and completions by method, of the files of several methods, for `win_rates`.

    Raises:
        UserError: as `read_completions`, or naming the file and row whose prompt differs from the first file's.
    """
    prompts: list[str] = []
    completions = {}
    for method, path in files.items():
        own, completions[method] = read_completions(path)
        prompts = prompts or own
        for number, (expected, found) in enumerate(zip_longest(prompts, own), start=1):
            if expected != found:
                first = next(iter(files.values()))
                raise UserError(
                    f"{path} row {number}: its prompt is not that of {first}; complete the same prompts in one order"
                )
    return prompts, completions


@dataclass(frozen=True)
class Game:
    """A comparison of two methods, or kinds of text, on one row (from 0), in one order."""

    row: int
    first: str
    second: str
    texts: Comparison


def ask(judge: Judge, games: Sequence[Game], keep: Path | None, doing: str = "judging") -> dict[Game, Verdict]:
    """The verdict of every game, shown as `doing`; `keep` and errors as in `win_rates`."""
    verdicts: dict[Game, Verdict] = {}
    with Progress(f"{doing} ({judge.name})", len(games), unit="verdicts") as progress:
        for start in range(0, len(games), ASKED_AT_ONCE):
            batch = games[start : start + ASKED_AT_ONCE]
            found = dict(zip(batch, judge.compare([game.texts for game in batch]), strict=True))
            if keep is not None:
                _append(keep, judge, found)
            verdicts |= found
            progress.update(len(batch))
            _check_missing(judge, verdicts.values(), len(games), keep)
    return verdicts


def _append(keep: Path, judge: Judge, verdicts: Mapping[Game, Verdict]) -> None:
    rows = (
        {"judge": judge.name, "row": game.row + 1, "first": game.first, "second": game.second} | asdict(verdict)
        for game, verdict in verdicts.items()
    )
    with writing(keep):
        keep.parent.mkdir(parents=True, exist_ok=True)
        append_text(keep, "".join(json.dumps(row) + "\n" for row in rows))


def _check_missing(judge: Judge, verdicts: Iterable[Verdict], asked: int, keep: Path | None) -> None:
    reasons = reasons_of(verdicts)
    missing = sum(reasons.values())
    if missing > MOST_MISSING * asked:
        where = f"the verdicts so far are in {keep}" if keep else "the verdicts were not kept in a file"
        raise RunStopped(
            f"judge {judge.name}: {missing} of {asked} verdicts are missing{most_frequent(reasons)}; {where}; "
            "fix the judge and ask again"
        )


def reasons_of(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """The number of missing verdicts by reason, the most frequent first."""
    return dict(Counter(verdict.reason for verdict in verdicts if verdict.is_missing).most_common())


def position_bias_of(verdicts: Collection[Verdict]) -> Estimate:
    """`WinRates.position_bias` of verdicts in both orders."""
    decided = [verdict.winner == "first" for verdict in verdicts if verdict.winner in ("first", "second")]
    return estimate_proportion(decided, missing=sum(verdict.is_missing for verdict in verdicts))


def match_of(one: Sequence[Verdict], other: Sequence[Verdict], prompts: Sequence[str], seed: int) -> Match:
    """The match of a method from the verdicts by row in which it is shown first, and those in which it is second."""
    both = list(zip(one, other, strict=True))
    scores = [
        None if shown.is_missing or swapped.is_missing else (_POINTS[shown.winner] + 1 - _POINTS[swapped.winner]) / 2
        for shown, swapped in both
    ]
    found = [score for score in scores if score is not None]
    clusters = _by_prompt(prompts, scores)
    return Match(
        rate=with_width(estimate_mean(clusters, missing=scores.count(None), seed=seed), len(clusters)),
        wins=sum(score > 0.5 for score in found),
        ties=sum(score == 0.5 for score in found),
        losses=sum(score < 0.5 for score in found),
        contradictions=sum(shown.winner == swapped.winner in ("first", "second") for shown, swapped in both),
        identical=both.count((IDENTICAL, IDENTICAL)),
    )


def _by_prompt(prompts: Sequence[str], values: Sequence[float | None]) -> list[list[float]]:
    """The values that are not missing, by prompt."""
    clusters: dict[str, list[float]] = defaultdict(list)
    for prompt, value in zip(prompts, values, strict=True):
        if value is not None:
            clusters[prompt].append(value)
    return list(clusters.values())


def _check(prompts: Sequence[str], completions: Mapping[str, Sequence[str]]) -> None:
    if len(completions) < 2 or not prompts:
        raise UserError(
            f"win rates need two methods and a prompt at least; found {len(completions)} and {len(prompts)}"
        )
    for method, texts in completions.items():
        if len(texts) != len(prompts):
            raise UserError(f"{method} has {len(texts)} completions for {len(prompts)} prompts; give one for each")


def _percent(rate: Estimate) -> str:
    if rate.value is None or rate.low is None or rate.high is None:
        return "missing"
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def most_frequent(reasons: Mapping[str, int]) -> str:
    """The three most frequent reasons, in brackets."""
    most = [f"{count}: {reason}" for reason, count in list(reasons.items())[:3]]
    return f" ({'; '.join(most)})" if most else ""
