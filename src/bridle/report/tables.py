"""The tables of a report, as plain text in cells, without markup."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, groupby

from bridle.evaluation.judge_examination import LEAST_ACCURACY
from bridle.evaluation.statistics import Estimate
from bridle.evaluation.win_rate import WinRates
from bridle.report.data import Critic, FigureComparison, RegulariserRound, Report
from bridle.report.measures import (
    MISSING,
    PERCENT,
    PLAIN,
    RATIO,
    Cell,
    Measure,
    Unit,
    best,
    in_words,
    main_violations,
    measures,
    overview_tasks,
    significant,
    to_cell,
)

DIFFERENCES = {"perplexity": ("Log perplexity, nats per token", RATIO)}
"""Name and unit of a group's differences, if they are not those of its figures."""

DIFFERENCES_IN_WORDS = (
    "A difference is the method’s figure minus the best one’s, paired by prompt (or text, or question). p is adjusted "
    "by Holm’s method for the number of methods compared on one figure, but not for the number of figures; intervals "
    "are not adjusted. The best method was chosen on the same data, and p does not account for that. The tests "
    "resample prompts, not training runs, so neither p nor the interval says what another training run would give. "
    "“Differs” means p below 0.05 or, where there is no p, an interval that excludes 0; “no difference shown” does not "
    "mean that there is none."
)

ROUND_COLUMNS = {
    "Rollouts": ("drawn", "compliance, %", "clipped, %", "missing", "truncated"),
    "λ": ("value", "target, %"),
    "KL(q‖p)": ("nats", "left out, %"),
    "R": ("fit", "Brier", "skill", "ECE"),
}

CRITIC_COLUMNS = {
    "Error": ("mean absolute", "correlation"),
    "Skill": ("on-policy", "after violations", "whole texts"),
    "Guidance": ("KL closed, %", "violation, %"),
}


@dataclass(frozen=True)
class Table:
    """A table with a row for each method or round, as `of` says; a group is a heading and the columns it spans.

    `untested`, also the first of the notes, says which columns have a best value but no test of differences from it.
    """

    caption: str
    groups: list[tuple[str, int]]
    columns: list[str]
    rows: dict[str, list[Cell]]
    notes: list[str] = field(default_factory=list)
    of: str = "Method"
    untested: str = ""

    @property
    def headings(self) -> list[tuple[str, str]]:
        """The group and the name of each column."""
        groups = chain.from_iterable([group] * span for group, span in self.groups)
        return list(zip(groups, self.columns, strict=True))


@dataclass(frozen=True)
class Difference:
    """The difference method − best with Holm's p-value; without one, a verdict by the interval ends in "(interval)"."""

    method: str
    reference: str
    cell: Cell
    p_value: Cell
    verdict: str
    test: str


def overview(report: Report) -> Table | None:
    """Violation rate, tasks and perplexity of each method; None if nothing was measured."""
    single = single_tasks(report)
    columns = [measure for measure in measures(report, "violation", "tasks", "perplexity") if measure not in single]
    return _table(report, "Mean over seeds, ± standard deviation, 95% interval", columns)


def brief(report: Report) -> Table | None:
    """The overview with the figures that matter most in front, for a narrow place that leaves out the last columns."""
    measured = measures(report, "violation", "perplexity", "tasks", "classification")
    first: list[Measure] = []
    if report.main is not None:
        violation, *by_oracle = main_violations(report.main)
        tasks = [measure for measure in measured if measure.group == "tasks"]
        first = [violation, Measure("perplexity", report.main.held_out or ""), *tasks, *by_oracle]
    single = single_tasks(report)
    ordered = [measure for measure in dict.fromkeys([*first, *measured]) if measure in measured]
    return _table(report, "Main figures", [measure for measure in ordered if measure not in single])


def transfer(report: Report) -> Table | None:
    """The transfer ratio of each method; None without an independent constraint."""
    columns = measures(report, "transfer")
    if not columns or report.main is None:
        return None
    oracle = report.main.trained_on
    table = _table(report, f"What independent constraints confirm of the drop under {oracle}", columns)
    words = (
        "The share of its reference’s violations that a method avoids under the independent constraint, over that "
        f"under {oracle}, the training oracle. 1: the drop is confirmed in full; 0: not at all. A dash: no "
        f"significant drop under {oracle}. Intervals resample prompts."
    )
    references: dict[str, list[str]] = {}
    for name, method in report.methods.items():
        if method.reference and method.figures.transfer:
            references.setdefault(method.reference, []).append(name)
    said = "; ".join(f"{reference} for {', '.join(names)}" for reference, names in references.items())
    return table and replace(table, notes=[words, f"Reference: {said}."])


def classification(report: Report) -> Table | None:
    """Classification and the violation rate of generation; None without classification."""
    columns = measures(report, "classification")
    if columns and report.main:
        columns += main_violations(report.main)
    return _table(report, "Classification, with the violation rate of generation", columns)


def single_tasks(report: Report) -> list[Measure]:
    """The tasks that the overview shows only as part of a group."""
    return [measure for measure in measures(report, "tasks") if measure.on not in overview_tasks(report)]


def further(report: Report) -> dict[str, Table]:
    """Further tables by name: single tasks, properties of the text, cost."""
    found = {
        "single_tasks": _table(report, "Single tasks", single_tasks(report)),
        "text": _table(report, "Properties of the generated text", measures(report, "text")),
        "cost": _table(report, "Training cost", measures(report, "cost")),
    }
    return {name: table for name, table in found.items() if table}


def rounds(report: Report) -> list[Table]:
    """The rounds of a training run, a table for each regulariser; none for a comparison."""
    curves = [] if report.methods else report.curves
    return [
        Table(
            f"Regulariser {name}",
            [(heading, len(columns)) for heading, columns in ROUND_COLUMNS.items()],
            [column for columns in ROUND_COLUMNS.values() for column in columns],
            {str(one.number): _round(one.regularisers[name]) for one in curve.rounds if name in one.regularisers},
            of="Round",
        )
        for curve in curves
        for name in dict.fromkeys(name for one in curve.rounds for name in one.regularisers)
    ]


def _round(found: RegulariserRound) -> list[Cell]:
    rate = Estimate(found.compliance, found.compliance_low, found.compliance_high, found.scored)
    return [
        _plain(found.rollouts, ","),
        to_cell(rate, PERCENT),
        _percent(found.clipped),
        _plain(found.rollouts_missing, ","),
        _plain(found.truncated, ",g"),
        _plain(found.weight, ".3g"),
        _percent(found.target),
        _plain(found.kl, ".3g"),
        _percent(found.kl_unreached),
        Cell(found.fit or MISSING),
        _plain(found.r_brier, ".3f"),
        _plain(found.r_skill, ".2f"),
        _plain(found.r_ece, ".3f"),
    ]


def critics(report: Report) -> Table | None:
    """R against the truth, a row for each R; None where it was not measured."""
    found = report.critics
    if found is None:
        return None
    rate, kl = PERCENT.write(found.policy.p), found.policy.kl_q_p
    policy = f"The policy violates in {rate}% of its texts; KL(q‖p) is {kl:.3f} nats a text."
    groups = [(heading, len(columns)) for heading, columns in CRITIC_COLUMNS.items()]
    columns = [column for columns in CRITIC_COLUMNS.values() for column in columns]
    rows = {name: _critic(one) for name, one in found.variants.items()}
    return Table("R against the truth", groups, columns, rows, [policy], of="R")


def _critic(found: Critic) -> list[Cell]:
    return [
        _plain(found.mae, ".3f"),
        _plain(found.correlation, ".2f"),
        *(Cell() if pair is None else _with_error(*pair) for pair in (found.skill, found.skill_violating)),
        _plain(found.skill_texts, ".3f"),
        _percent(found.kl_closed),
        _percent(found.guided),
    ]


def _with_error(value: float, error: float) -> Cell:
    return Cell(f"{_plain(value, '.2f').text} ± {error:.2f}", estimate=_alone(value))


def _plain(value: float | None, form: str) -> Cell:
    return Cell() if value is None else Cell(format(value, form).replace("-", "−"), estimate=_alone(value))


def _percent(share: float | None) -> Cell:
    return Cell() if share is None else Cell(PERCENT.write(share), estimate=PERCENT.scaled(_alone(share)))


def _alone(value: float) -> Estimate:
    return Estimate(value, None, None, n=1)


def win_matrix(report: Report) -> Table | None:
    """Win rates of row over column, with mean lengths; marked if the judge failed its examination. None without one."""
    found = report.win_rate
    if found is None:
        return None
    rows = {row: [*_matches(found, row), to_cell(found.mean_length.get(row), PLAIN)] for row in found.matrix}
    groups = [("wins against, %", len(rows)), ("Length", 1)]
    marked = "" if report.win_rates_mean_something else " (not meaningful: the judge failed its examination)"
    caption, columns = f"Win rate of the row over the column{marked}", [*rows, "mean words"]
    return Table(caption, groups, columns, rows, [*_judging(found), *_judge_examined(report)])


def differences(report: Report) -> dict[str, list[Difference]]:
    """Differences from the best method, by figure and unit."""
    found: dict[str, list[Difference]] = {}
    for one in report.comparisons:
        measure = Measure(one.figure, one.on, one.constraint)
        title, unit = DIFFERENCES.get(one.figure, (measure.title, measure.unit))
        found.setdefault(f"{title}: {measure.label}", []).append(_difference(one, unit))
    return found


def every(report: Report) -> dict[str, Table]:
    """All tables by name: those of methods, their differences from the best, and the rounds of a training run."""
    found = {
        "overview": overview(report),
        "transfer": transfer(report),
        "win_rates": win_matrix(report),
        "classification": classification(report),
        **further(report),
        "differences": _all_differences(report),
        "rounds": _all_rounds(report),
        "critics": critics(report),
    }
    return {name: table for name, table in found.items() if table is not None}


def _all_differences(report: Report) -> Table | None:
    rows = {
        f"{one.method}, {heading}": [Cell(one.reference), one.cell, one.p_value, Cell(one.verdict), Cell(one.test)]
        for heading, found in differences(report).items()
        for one in found
    }
    columns = ["minus the best", "difference", "adjusted p", "verdict", "test"]
    caption, notes = "How each method differs from the best", [DIFFERENCES_IN_WORDS]
    return Table(caption, [("Difference", len(columns))], columns, rows, notes, of="Method, figure") if rows else None


def _all_rounds(report: Report) -> Table | None:
    tables = rounds(report)
    rows = {f"{one.caption}, round {number}": cells for one in tables for number, cells in one.rows.items()}
    return replace(tables[0], caption="Rounds", rows=rows, of="Regulariser, round") if tables else None


def _table(report: Report, caption: str, columns: list[Measure]) -> Table | None:
    if not columns:
        return None
    groups = [(title, len(list(spanned))) for title, spanned in groupby(measure.title for measure in columns)]
    marks = [_marks(report, measure) for measure in columns]
    rows = {
        name: [to_cell(m.of(method), m.unit, of.get(name, "")) for m, of in zip(columns, marks, strict=True)]
        for name, method in report.methods.items()
    }
    sets = dict.fromkeys(measure.on for measure in columns if measure.group in ("violation", "text"))
    untested = _untested(report, [measure for measure, of in zip(columns, marks, strict=True) if of])
    notes = [untested] if untested else []
    notes += [f"{name}: {report.prompt_sets[name]}." for name in sets if name in report.prompt_sets]
    notes += _examined(report, dict.fromkeys(one.within for one in columns if one.group == "violation"))
    return Table(caption, groups, [measure.label for measure in columns], rows, notes, untested=untested)


def _untested(report: Report, marked: Iterable[Measure]) -> str:
    """Which of the measures with a best value have no test of differences from it; empty if all have one."""
    tested = {Measure(one.figure, one.on, one.constraint) for one in report.comparisons if significant(one) is not None}
    names = [measure.label.rstrip(" ↓↑") for measure in marked if measure not in tested]
    if not names:
        return ""
    return f"Differences were not tested for {', '.join(names)}: a value that is not the best need not differ from it."


def _examined(report: Report, constraints: Iterable[str | None]) -> Iterable[str]:
    """How well each constraint agrees with human labels."""
    for name in constraints:
        for rows, auc in report.examined.get(name or "", {}).items():
            cell = to_cell(auc, RATIO)
            interval = f" (95% interval {cell.below})" if cell.interval else ""
            yield f"{name}: AUC {cell.text}{interval} on {rows}, by human labels."


def _marks(report: Report, measure: Measure) -> dict[str, str]:
    """Marks methods whose figure reads as the best one's, and those not significantly different from it."""
    top = best(report, measure)
    if top is None:
        return {}
    written = {name: to_cell(measure.of(method), measure.unit).text for name, method in report.methods.items()}
    equal = [name for name, text in written.items() if text == written.get(top)]
    if {*written.values()} <= {written.get(top), MISSING}:
        return {}  # nothing differs
    alike = (one.method for one in report.comparisons if measure.is_of(one) and significant(one) is False)
    return dict.fromkeys(alike, "alike") | dict.fromkeys(equal, "best")


def _matches(found: WinRates, row: str) -> list[Cell]:
    rates = {column: match.rate for column, match in found.matrix[row].items()}
    return [Cell("·") if column == row else to_cell(rates.get(column), PERCENT) for column in found.matrix]


def _judging(found: WinRates) -> list[str]:
    bias = to_cell(replace(found.position_bias, missing=0), PERCENT)  # a further note counts the missing
    interval = f" (95% interval {bias.below})" if bias.interval else ""
    decided = f"Of the verdicts other than ties, {bias.text}% name the text shown first{interval}; 50% is no bias."
    missing = [f"{found.missing} of {found.asked} verdicts are missing"]
    missing += [f"{count} × {reason}" for reason, count in found.reasons.items()]
    return [
        f"Judge: {found.judge}. Each match has {found.pairs} pairs of completions, judged in both orders; a tie counts "
        "as half a win.",
        "All verdicts are ties or missing." if bias.text == MISSING else decided,
        f"{'; '.join(missing)}.",
    ]


def _judge_examined(report: Report) -> Iterator[str]:
    """How often the judge is right where the answer is known."""
    found = report.judge_examined
    if found is None:
        yield "The judge was not examined."
        return
    kinds = ", ".join(f"{kind} {to_cell(accuracy, PERCENT).text}%" for kind, accuracy in found.by_kind.items())
    yield (
        f"The judge was examined on human continuations against worse ones: accuracy {in_words(found.accuracy)} "
        f"({kinds}); chance is 50%, and {LEAST_ACCURACY:.0%} is needed over all and in all kinds but one."
    )


def _difference(comparison: FigureComparison, unit: Unit) -> Difference:
    p = comparison.adjusted_p_value
    return Difference(
        method=comparison.method,
        reference=comparison.reference,
        cell=to_cell(comparison.difference, unit, signed=True),
        p_value=Cell() if p is None else Cell("< 0.001" if p < 0.001 else f"{p:.3f}", estimate=_alone(p)),
        verdict=_verdict(comparison),
        test=comparison.test,
    )


def _verdict(comparison: FigureComparison) -> str:
    differs = significant(comparison)
    if differs is None:
        return "not tested"
    verdict = "differs" if differs else "no difference shown"
    return verdict if comparison.adjusted_p_value is not None else f"{verdict} (interval)"
