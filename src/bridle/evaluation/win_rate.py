"""Win rates: which of several methods completes the same prompts better, by a judge's verdicts.

Every pair of completions is judged in both orders, since judges favour a place. A method scores on a
prompt the mean of 1, 0.5 or 0 for each order it wins, ties or loses, so a judge that only looks at the
place scores 0.5 for both. A prompt with a missing verdict in either order is left out of that pair,
because the order that is left would carry the judge's bias.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, permutations, zip_longest
from pathlib import Path
from typing import Any

from bridle.data.readers import ROW
from bridle.data.rows import absent_column
from bridle.data.source import DataSource
from bridle.errors import RunStopped, UserError
from bridle.evaluation.judges import Comparison, Judge, Verdict
from bridle.evaluation.statistics import Estimate, estimate_mean, estimate_rate, wilson_interval
from bridle.utils.files import append_text
from bridle.utils.progress import Progress

MOST_MISSING = 0.1  # share of missing verdicts above which the rest is not worth asking for
ASKED_AT_ONCE = 64  # comparisons between two writes to the file that keeps the verdicts

IDENTICAL = Verdict("tie", "the completions are equal")

_POINTS = {"first": 1.0, "tie": 0.5, "second": 0.0}


@dataclass(frozen=True)
class Match:
    """One method against another.

    Attributes:
        rate: mean score over the prompts, a tie half a win; its interval resamples prompts. `missing`
            counts the pairs of completions left out.
        wins: pairs of completions in which the method scored above 0.5.
        ties: in which it scored 0.5.
        losses: in which it scored below 0.5.
        contradictions: ties in which the judge preferred the same place in both orders.
        identical: ties of equal completions, which the judge was not asked about.
    """

    rate: Estimate
    wins: int
    ties: int
    losses: int
    contradictions: int
    identical: int

    def reversed(self) -> "Match":
        """The same match as the other method sees it."""
        value, low, high = (
            None if end is None else 1.0 - end for end in (self.rate.value, self.rate.high, self.rate.low)
        )
        rate = replace(self.rate, value=value, low=low, high=high)
        return replace(self, rate=rate, wins=self.losses, losses=self.wins)


@dataclass(frozen=True)
class WinRates:
    """All methods against each other.

    Attributes:
        judge: the judge's name.
        pairs: completions of each method, and so pairs of completions in each match.
        matrix: `matrix[row][column]` is the match of method `row` against method `column`.
        mean_length: of each method's completions, in words: judges tend to favour length.
        position_bias: share of the verdicts other than ties that name the text shown first. Without bias
            it is 0.5 whichever method is better, since each pair is shown in both orders. Wilson's
            interval takes verdicts for independent; those that offset each other so make it too wide.
        asked: verdicts the judge was asked for.
        missing: how many of them are missing.
        reasons: why, and how many for each reason, the most frequent first.
    """

    judge: str
    pairs: int
    matrix: dict[str, dict[str, Match]]
    mean_length: dict[str, Estimate]
    position_bias: Estimate
    asked: int
    missing: int
    reasons: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"Win rate of row over column in %, a tie half a win; judge {self.judge}, {self.pairs} pairs each",
                *_aligned(self._table()),
                *self._ties(),
                f"position bias: {self.position_bias} for the text shown first; 0.5 is none",
                f"verdicts missing: {self.missing} of {self.asked}{_listed(self.reasons)}",
            ]
        )

    def _table(self) -> list[list[str]]:
        header = ["", *self.matrix, "mean words"]
        rows = [
            [_percent(matches[column].rate) if column in matches else "–" for column in self.matrix]
            for matches in self.matrix.values()
        ]
        lengths = [f"{length.value:.1f}" for length in self.mean_length.values()]
        return [header] + [[*cells] for cells in zip(self.matrix, *zip(*rows, strict=True), lengths, strict=True)]

    def _ties(self) -> Iterator[str]:
        for one, other in combinations(self.matrix, 2):
            match = self.matrix[one][other]
            yield (
                f"{one} against {other}: {match.wins} won, {match.ties} tied ({match.identical} identical, "
                f"{match.contradictions} by a change of order), {match.losses} lost, {match.rate.missing} left out"
            )


def win_rates(
    prompts: Sequence[str],
    completions: Mapping[str, Sequence[str]],
    judge: Judge,
    *,
    seed: int = 0,
    keep: Path | None = None,
) -> WinRates:
    """Has every pair of methods judged on every prompt, in both orders.

    Equal completions are a tie without asking. A prompt that is there several times, as with several
    samples a prompt, is one unit of the bootstrap.

    Args:
        prompts: [n] texts.
        completions: for each method its [n] completions, in the order of the prompts.
        judge: gives the verdicts.
        seed: of the bootstrap.
        keep: the verdicts are added to this file as they come, as JSON lines: judge, row (1-based), the
            methods shown first and second, the winner and, where that is null, the reason.

    Raises:
        UserError: fewer than two methods, no prompts, or a method with another number of completions.
        RunStopped: more than a tenth of the verdicts are certain to be missing.
    """
    _check(prompts, completions)
    games = list(_games(prompts, completions))
    asked = [game for game in games if game.texts.first != game.texts.second]
    verdicts = _ask(judge, asked, keep)
    by_order: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for game in games:
        by_order[game.first, game.second].append(verdicts.get(game, IDENTICAL))
    reasons = _reasons(verdicts.values())
    return WinRates(
        judge=judge.name,
        pairs=len(prompts),
        matrix=_matrix(by_order, prompts, seed),
        mean_length={method: _mean_length(prompts, texts, seed) for method, texts in completions.items()},
        position_bias=_position_bias(verdicts.values()),
        asked=len(asked),
        missing=sum(reasons.values()),
        reasons=reasons,
    )


def read_completions(path: str | Path) -> tuple[list[str], list[str]]:
    """Prompts and completions of a file as `bridle generate --output` writes it; empty texts are kept.

    Raises:
        UserError: the file cannot be read, lacks the column prompt or completion, or a row holds no text.
    """
    rows = DataSource(str(path)).read()
    columns = []
    for column in ("prompt", "completion"):
        if column not in rows.column_names:
            raise absent_column(str(path), column, rows.column_names)
        columns.append(rows[column][:])
        for number, text in zip(rows[ROW][:], columns[-1], strict=True):
            if not isinstance(text, str):
                raise UserError(f"{path} row {number}: column {column!r} holds {type(text).__name__}, not text")
    return columns[0], columns[1]


def read_methods(files: Mapping[str, str | Path]) -> tuple[list[str], dict[str, list[str]]]:
    """The files of several methods, ready for `win_rates`: prompts, and completions by method.

    Raises:
        UserError: as `read_completions`, or naming the file and row whose prompt is not the first file's.
    """
    prompts: list[str] = []
    completions = {}
    for method, path in files.items():
        own, completions[method] = read_completions(path)
        prompts = prompts or own
        _check_same(prompts, own, next(iter(files.values())), path)
    return prompts, completions


@dataclass(frozen=True)
class _Game:
    """One comparison: which methods' completions of which row it shows."""

    row: int
    first: str
    second: str
    texts: Comparison


def _games(prompts: Sequence[str], completions: Mapping[str, Sequence[str]]) -> Iterator[_Game]:
    # Row by row, so that verdicts kept from a run that stopped are spread evenly over the methods.
    for row, prompt in enumerate(prompts):
        for first, second in permutations(completions, 2):
            yield _Game(row, first, second, Comparison(prompt, completions[first][row], completions[second][row]))


def _ask(judge: Judge, games: Sequence[_Game], keep: Path | None) -> dict[_Game, Verdict]:
    verdicts: dict[_Game, Verdict] = {}
    with Progress(f"judging ({judge.name})", len(games), unit="verdicts") as progress:
        for start in range(0, len(games), ASKED_AT_ONCE):
            batch = games[start : start + ASKED_AT_ONCE]
            found = dict(zip(batch, judge.compare([game.texts for game in batch]), strict=True))
            if keep is not None:
                _append(keep, judge, found)
            verdicts |= found
            progress.update(len(batch))
            _check_missing(judge, verdicts.values(), len(games), keep)
    return verdicts


def _append(keep: Path, judge: Judge, verdicts: Mapping[_Game, Verdict]) -> None:
    rows = (
        {"judge": judge.name, "row": game.row + 1, "first": game.first, "second": game.second} | asdict(verdict)
        for game, verdict in verdicts.items()
    )
    try:
        keep.parent.mkdir(parents=True, exist_ok=True)
        append_text(keep, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"{keep}: cannot be written ({error.strerror}); verdicts are kept there") from error


def _check_missing(judge: Judge, verdicts: Iterable[Verdict], asked: int, keep: Path | None) -> None:
    reasons = _reasons(verdicts)
    missing = sum(reasons.values())
    if missing > MOST_MISSING * asked:
        where = f"the verdicts so far are in {keep}" if keep else "the verdicts were not kept in a file"
        raise RunStopped(
            f"judge {judge.name}: {missing} of {asked} verdicts are missing{_listed(reasons)}; {where}; "
            "mend the judge and ask again"
        )


def _reasons(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How often each reason was given, the most frequent first."""
    return dict(Counter(verdict.reason for verdict in verdicts if verdict.is_missing).most_common())


def _matrix(
    by_order: Mapping[tuple[str, str], Sequence[Verdict]], prompts: Sequence[str], seed: int
) -> dict[str, dict[str, Match]]:
    """All matches, from the verdicts row by row of each (method shown first, method shown second)."""
    matrix: dict[str, dict[str, Match]] = {one: {} for one, _ in by_order}
    for one, other in by_order:
        # The second of a pair mirrors the first, so that the two rates and intervals agree exactly.
        known = matrix[other].get(one)
        matrix[one][other] = (
            known.reversed() if known else _match(by_order[one, other], by_order[other, one], prompts, seed)
        )
    return matrix


def _match(one: Sequence[Verdict], other: Sequence[Verdict], prompts: Sequence[str], seed: int) -> Match:
    """The match of a method from its verdicts row by row: shown first, and shown second."""
    both = list(zip(one, other, strict=True))
    scores = [_score(*verdicts) for verdicts in both]
    found = [score for score in scores if score is not None]
    return Match(
        rate=_rate(scores, prompts, seed),
        wins=sum(score > 0.5 for score in found),
        ties=sum(score == 0.5 for score in found),
        losses=sum(score < 0.5 for score in found),
        contradictions=sum(shown.winner == swapped.winner in ("first", "second") for shown, swapped in both),
        identical=both.count((IDENTICAL, IDENTICAL)),
    )


def _score(shown_first: Verdict, shown_second: Verdict) -> float | None:
    if shown_first.winner is None or shown_second.winner is None:
        return None
    return (_POINTS[shown_first.winner] + 1.0 - _POINTS[shown_second.winner]) / 2


def _rate(scores: Sequence[float | None], prompts: Sequence[str], seed: int) -> Estimate:
    clusters = _by_prompt(prompts, scores)
    found = estimate_mean(clusters, missing=scores.count(None), seed=seed)
    if found.value is None or found.low is not None:
        return found
    # All prompts agree, so a bootstrap has no width: each prompt is one trial, as in `estimate_rate`.
    low, high = wilson_interval(round(found.value * len(clusters)), len(clusters)) or (None, None)
    return replace(found, low=low, high=high)


def _mean_length(prompts: Sequence[str], texts: Sequence[str], seed: int) -> Estimate:
    return estimate_mean(_by_prompt(prompts, [len(text.split()) for text in texts]), seed=seed)


def _by_prompt(prompts: Sequence[str], values: Sequence[float | None]) -> list[list[float]]:
    """The values that are there, grouped by equal prompts."""
    clusters: dict[str, list[float]] = defaultdict(list)
    for prompt, value in zip(prompts, values, strict=True):
        if value is not None:
            clusters[prompt].append(value)
    return list(clusters.values())


def _position_bias(verdicts: Collection[Verdict]) -> Estimate:
    decided = [[verdict.winner == "first"] for verdict in verdicts if verdict.winner in ("first", "second")]
    return estimate_rate(decided, missing=sum(verdict.is_missing for verdict in verdicts))


def _check(prompts: Sequence[str], completions: Mapping[str, Sequence[str]]) -> None:
    if len(completions) < 2 or not prompts:
        raise UserError(
            f"win rates need two methods and a prompt at least; found {len(completions)} and {len(prompts)}"
        )
    for method, texts in completions.items():
        if len(texts) != len(prompts):
            raise UserError(f"{method} has {len(texts)} completions for {len(prompts)} prompts; give one for each")


def _check_same(prompts: Sequence[str], own: Sequence[str], first: str | Path, path: str | Path) -> None:
    for number, (expected, found) in enumerate(zip_longest(prompts, own), start=1):
        if expected != found:
            raise UserError(
                f"{path} row {number}: its prompt is not that of {first}; complete the same prompts in one order"
            )


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _percent(rate: Estimate) -> str:
    if rate.value is None or rate.low is None or rate.high is None:
        return "missing"
    return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _listed(reasons: Mapping[str, int]) -> str:
    """The most frequent reasons, three at most, in brackets."""
    most = [f"{count}: {reason}" for reason, count in list(reasons.items())[:3]]
    return f" ({'; '.join(most)})" if most else ""
