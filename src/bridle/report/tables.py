"""The tables of a report, as data: cells hold text as it is to be read, never markup."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

from bridle.evaluation.statistics import Estimate
from bridle.evaluation.win_rate import WinRates
from bridle.report.data import Figure, FigureComparison, Group, Main, Method, RegulariserRound, Report

MISSING = "–"
LEVEL = 0.05  # of significance, after Holm's correction
OVERVIEW_TASKS = ("mmlu", "commonsense")


@dataclass(frozen=True)
class Unit:
    """How a figure is written: times `factor`, with so many digits after the point, and more where it is below 10."""

    symbol: str = ""
    factor: float = 1.0
    digits: int = 1
    more: int = 0

    def beside(self, value: float) -> "Unit":
        """The same with the digits of this value, for it, its interval and its spread."""
        return replace(self, digits=self.digits + self.more, more=0) if abs(value * self.factor) < 10 else self

    def write(self, value: float | None, *, signed: bool = False) -> str:
        """The number without its symbol; a missing one is a dash."""
        if value is None:
            return MISSING
        written = format(value * self.factor, f"{'+' if signed else ''},.{self.digits}f")
        return written.replace("-", "−")


PERCENT, PLAIN, RATIO, COUNT = Unit("%", 100.0), Unit(), Unit(digits=3), Unit(digits=0)

GROUPS: dict[Group, tuple[str, Unit, str]] = {
    "violation": ("Violation rate", PERCENT, "↓"),
    "tasks": ("Accuracy", PERCENT, "↑"),
    "perplexity": ("Perplexity", Unit(more=1), "↓"),
    "classification": ("Classification", RATIO, "↑"),
    "text": ("Generated text", RATIO, ""),
    "cost": ("Cost", COUNT, ""),
}
"""By group of figures: its name, how it is written, and the arrow of the better direction."""

DIFFERENCES = {"perplexity": ("Log perplexity, nats per token", RATIO)}
"""By group whose differences are not in the unit of its figures: the differences' name, and how they are written."""

DIFFERENCES_IN_WORDS = (
    "A difference is the method’s figure minus the best one’s, paired by prompt (or text, or question). p is adjusted "
    "by Holm’s method for the number of methods compared on one figure, but not for the number of figures; intervals "
    "are not adjusted. The best method was chosen on the same data, and p does not account for that. The tests "
    "resample prompts, not training runs, so neither p nor the interval says what another training run would give. "
    "“Differs” means p below 0.05 or, where there is no p, an interval that excludes 0; “no difference shown” does not "
    "mean that there is none."
)

UNITS = {"mean_length": PLAIN, "output_perplexity": PLAIN}
ARROWS = {"brier": "↓", "expected_calibration_error": "↓", "output_perplexity": "↓", "positive_share": ""}
NAMES = {"mmlu": "MMLU", "roc_auc": "ROC-AUC", "mean_length": "mean words", "distinct_2": "distinct-2"}
OWN: tuple[Group, ...] = ("text", "classification", "cost")  # groups whose figures Bridle names; others a recipe does


@dataclass(frozen=True)
class Measure:
    """A figure that every method may have: one column of a table.

    Attributes:
        group: of `Figures`.
        on: the prompt set, held-out set, task or name within the group.
        within: the constraint or name below it, in the groups that have two levels.
    """

    group: Group
    on: str
    within: str | None = None

    @property
    def label(self) -> str:
        """The column's heading, as "toxigen · non-toxic ↓"."""
        *names, last = filter(None, (self.on, self.within))
        last = in_words(last) if self.group in OWN else spelt(last)
        return f"{' · '.join([*names, last])} {self.arrow}".rstrip()

    @property
    def title(self) -> str:
        """The heading over the column's group, as "Violation rate, %"."""
        name, symbol = GROUPS[self.group][0], self.unit.symbol
        return f"{name}, {symbol}" if symbol else name

    @property
    def unit(self) -> Unit:
        """How its values are written."""
        return UNITS.get(self.within or self.on) or GROUPS[self.group][1]

    @property
    def arrow(self) -> str:
        """↓ or ↑, the better direction; empty where there is none."""
        return ARROWS.get(self.within or self.on, GROUPS[self.group][2])

    def of(self, method: Method) -> Figure | None:
        """The method's figure; None where it was not measured."""
        found = getattr(method.figures, self.group).get(self.on)
        return found.get(self.within) if isinstance(found, Mapping) else found

    def is_of(self, comparison: FigureComparison) -> bool:
        """Whether the comparison is about this figure."""
        return self == Measure(comparison.figure, comparison.on, comparison.constraint)


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Attributes:
        text: the value.
        spread: its standard deviation over seeds, as "± 0.4".
        interval: its 95% interval, as "4.1 to 7.6".
        n: how many observations the interval is made from; None without an interval.
        missing: how many observations are missing from it.
        mark: "best", or "alike" where no significant difference from the best was found.
    """

    text: str = MISSING
    spread: str = ""
    interval: str = ""
    n: int | None = None
    missing: int = 0
    mark: str = ""

    @property
    def counts(self) -> str:
        """How many observations there are and how many are missing, as "n = 1,000, 4 missing"."""
        there = "" if self.n is None else f"n = {self.n:,}"
        return ", ".join(filter(None, (there, f"{self.missing:,} missing" if self.missing else "")))

    @property
    def below(self) -> str:
        """Interval and counts, as "4.1 to 7.6, n = 1,000"."""
        return ", ".join(filter(None, (self.interval, self.counts)))


@dataclass(frozen=True)
class Table:
    """A table with a row for each method, or round.

    Attributes:
        caption: what it shows.
        groups: over the columns, each a heading and how many columns it spans.
        columns: a heading each.
        rows: by method, or round, its cells, one a column.
        notes: sentences below it.
        of: what its rows are.
    """

    caption: str
    groups: list[tuple[str, int]]
    columns: list[str]
    rows: dict[str, list[Cell]]
    notes: list[str] = field(default_factory=list)
    of: str = "Method"


@dataclass(frozen=True)
class Difference:
    """How a method differs from the best: `cell` holds method − best, the p-value is Holm's.

    The verdict ends in "(interval)" where there is no p-value, and the interval had to decide.
    """

    method: str
    reference: str
    cell: Cell
    p_value: str
    verdict: str
    test: str


def in_words(key: str) -> str:
    """A figure's key in the results as people write it."""
    return NAMES.get(key, key.replace("_", " "))


def spelt(name: str) -> str:
    """A name out of a recipe as tables, plots and sentences spell it: as it is, except for what is an abbreviation."""
    return NAMES.get(name, name)


def main_violation(main: Main) -> Measure:
    """The violation rate that a report leads with."""
    return Measure("violation", main.prompt_set, main.constraint)


def overview(report: Report) -> Table | None:
    """Violation rate, MMLU, commonsense and perplexity of each method; None where nothing was measured."""
    single = single_tasks(report)
    columns = [measure for measure in measures(report, "violation", "tasks", "perplexity") if measure not in single]
    return _table(report, "Mean over seeds, ± standard deviation, 95% interval", columns)


def overview_tasks(report: Report) -> tuple[str, ...]:
    """The tasks and groups that the recipe named, or the usual two."""
    return tuple(report.settings.get("tasks") or OVERVIEW_TASKS)


def classification(report: Report) -> Table | None:
    """Classification beside the violation rate of generation; None without classification."""
    columns = measures(report, "classification")
    if columns and report.main:
        columns.append(main_violation(report.main))
    return _table(report, "Classification, with the violation rate of generation", columns)


def single_tasks(report: Report) -> list[Measure]:
    """The tasks that the overview has in a group only."""
    return [measure for measure in measures(report, "tasks") if measure.on not in overview_tasks(report)]


def further(report: Report) -> list[Table]:
    """What the other tables leave out: single tasks, properties of the text, cost."""
    tables = (
        _table(report, "Single tasks", single_tasks(report)),
        _table(report, "Properties of the generated text", measures(report, "text")),
        _table(report, "What training cost", measures(report, "cost")),
    )
    return [table for table in tables if table]


def rounds(report: Report) -> list[Table]:
    """What each round of a training run measured, a table for each regulariser; none for a comparison."""
    curves = [] if report.methods else report.curves
    return [
        Table(
            f"Regulariser {name}",
            [("Rollouts", 5), ("KL(q‖p)", 2), ("R", 3)],
            [
                "drawn",
                "compliance, %",
                "clipped, %",
                "missing",
                "truncated",
                "nats",
                "left out, %",
                "fit",
                "Brier",
                "ECE",
            ],
            {str(one.number): _of_round(one.regularisers[name]) for one in curve.rounds if name in one.regularisers},
            of="Round",
        )
        for curve in curves
        for name in dict.fromkeys(name for one in curve.rounds for name in one.regularisers)
    ]


def _of_round(found: RegulariserRound) -> list[Cell]:
    rate = Estimate(found.compliance, found.compliance_low, found.compliance_high, found.scored)
    return [
        _plain(found.rollouts, ","),
        to_cell(rate, PERCENT),
        _percent(found.clipped),
        _plain(found.rollouts_missing, ","),
        _plain(found.truncated, ",g"),
        _plain(found.kl, ".3g"),
        _percent(found.kl_unreached),
        Cell(found.fit or MISSING),
        _plain(found.r_brier, ".3f"),
        _plain(found.r_ece, ".3f"),
    ]


def _percent(share: float | None) -> Cell:
    return Cell() if share is None else Cell(PERCENT.write(share))


def _plain(value: float | None, form: str) -> Cell:
    return Cell() if value is None else Cell(format(value, form))


def win_matrix(report: Report) -> Table | None:
    """Win rate of row over column, and each method's mean length; None without a judge."""
    found = report.win_rate
    if found is None:
        return None
    rows = {row: [*_matches(found, row), to_cell(found.mean_length.get(row), PLAIN)] for row in found.matrix}
    groups = [("wins against, %", len(rows)), ("Length", 1)]
    return Table("Win rate of the row over the column", groups, [*rows, "mean words"], rows, _judging(found))


def differences(report: Report, without: Collection[Measure] = ()) -> dict[str, list[Difference]]:
    """Comparisons with the best method, by the name of the figure and the unit of its differences."""
    found: dict[str, list[Difference]] = {}
    for one in report.comparisons:
        measure = Measure(one.figure, one.on, one.constraint)
        if measure in without:
            continue
        title, unit = DIFFERENCES.get(one.figure, (measure.title, measure.unit))
        found.setdefault(f"{title}: {measure.label}", []).append(_difference(one, unit))
    return found


def best(report: Report, measure: Measure) -> str | None:
    """The method the others were compared with, else that of the best value; None where nothing is better."""
    values = {name: figure.value for name, method in report.methods.items() if (figure := measure.of(method))}
    known = {name: value for name, value in values.items() if value is not None}
    if not known or not measure.arrow:
        return None
    references = (one.reference for one in report.comparisons if measure.is_of(one))
    return next(references, (min if measure.arrow == "↓" else max)(known, key=known.__getitem__))


def significant(comparison: FigureComparison) -> bool | None:
    """Whether a method differs from the best: Holm's p is below 5% or, without a p-value, the interval excludes 0.

    None where there is neither.
    """
    if comparison.adjusted_p_value is not None:
        return comparison.adjusted_p_value < LEVEL
    low, high = comparison.difference.low, comparison.difference.high
    return None if low is None or high is None else not low <= 0 <= high


def to_cell(figure: Estimate | None, unit: Unit, mark: str = "", *, signed: bool = False) -> Cell:
    """A figure as text; one without a value is missing, never 0."""
    if figure is None or figure.value is None:
        return Cell(missing=figure.missing if figure else 0)
    unit = unit.beside(figure.value)
    spread = figure.spread if isinstance(figure, Figure) else None
    interval = _between(figure, unit, signed)
    return Cell(
        text=unit.write(figure.value, signed=signed),
        spread="" if spread is None else f"± {unit.write(spread)}",
        interval=interval,
        n=figure.n if interval else None,
        missing=figure.missing,
        mark=mark,
    )


def _between(figure: Estimate, unit: Unit, signed: bool = False) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{unit.write(figure.low, signed=signed)} to {unit.write(figure.high, signed=signed)}"


def measures(report: Report, *groups: Group) -> list[Measure]:
    """Every figure that any method has, group by group, in the order of first sight."""
    found = (measure for group in groups for method in report.methods.values() for measure in _of_group(method, group))
    return list(dict.fromkeys(found))


def _of_group(method: Method, group: Group) -> Iterable[Measure]:
    for on, figure in getattr(method.figures, group).items():
        names = figure if isinstance(figure, Mapping) else [None]
        yield from (Measure(group, on, within) for within in names)


def _table(report: Report, caption: str, columns: list[Measure]) -> Table | None:
    if not columns:
        return None
    groups = [(title, len(list(spanned))) for title, spanned in groupby(measure.title for measure in columns)]
    marks = [_marks(report, measure) for measure in columns]
    rows = {
        name: [to_cell(m.of(method), m.unit, of.get(name, "")) for m, of in zip(columns, marks, strict=True)]
        for name, method in report.methods.items()
    }
    return Table(caption, groups, [measure.label for measure in columns], rows)


def _marks(report: Report, measure: Measure) -> dict[str, str]:
    """The methods as good as the best, as far as a reader sees, and those not shown to differ from it."""
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
    bias = to_cell(replace(found.position_bias, missing=0), PERCENT)  # what is missing has a note of its own
    interval = f" (95% interval {bias.below})" if bias.interval else ""
    decided = f"Of the verdicts other than ties, {bias.text}% name the text shown first{interval}; 50% is no bias."
    return [
        f"Judge: {found.judge}. Each match has {found.pairs} pairs of completions, judged in both orders; a tie counts "
        "as half a win.",
        "All verdicts are ties or missing." if bias.text == MISSING else decided,
        f"{found.missing} of {found.asked} verdicts are missing"
        + "".join(f"; {count} × {reason}" for reason, count in found.reasons.items())
        + ".",
    ]


def _difference(comparison: FigureComparison, unit: Unit) -> Difference:
    return Difference(
        method=comparison.method,
        reference=comparison.reference,
        cell=to_cell(comparison.difference, unit, signed=True),
        p_value=_p_value(comparison.adjusted_p_value),
        verdict=_verdict(comparison),
        test=comparison.test,
    )


def _verdict(comparison: FigureComparison) -> str:
    differs = significant(comparison)
    if differs is None:
        return "not tested"
    verdict = "differs" if differs else "no difference shown"
    return verdict if comparison.adjusted_p_value is not None else f"{verdict} (interval)"


def _p_value(p: float | None) -> str:
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
