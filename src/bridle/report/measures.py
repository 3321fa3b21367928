"""The figures of a report: their names, units and better directions, and their values as text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from bridle.evaluation.statistics import LEVEL, Estimate
from bridle.report.data import Figure, FigureComparison, Group, Main, Method, Report

MISSING = "–"
OVERVIEW_TASKS = ("mmlu", "commonsense", "commonsense-4", "commonsense-8")


@dataclass(frozen=True)
class Unit:
    """Format of a figure: multiplied by `factor`, `digits` after the point, and `more` of them below 10."""

    symbol: str = ""
    factor: float = 1.0
    digits: int = 1
    more: int = 0

    def beside(self, value: float) -> "Unit":
        """The format with the digits of this value, also for its interval and spread."""
        return replace(self, digits=self.digits + self.more, more=0) if abs(value * self.factor) < 10 else self

    def scaled(self, figure: Estimate) -> Estimate:
        """The figure multiplied by the factor."""
        found = figure.map(lambda value: value * self.factor)
        if isinstance(found, Figure) and found.spread is not None:
            found = replace(found, spread=found.spread * self.factor)
        return found

    def write(self, value: float | None, *, signed: bool = False) -> str:
        """The number without the symbol; a dash if missing."""
        if value is None:
            return MISSING
        written = format(value * self.factor, f"{'+' if signed else ''},.{self.digits}f")
        return written.replace("-", "−")


PERCENT, PLAIN, RATIO, COUNT = Unit("%", 100.0), Unit(), Unit(digits=3), Unit(digits=0)

GROUPS: dict[Group, tuple[str, Unit, str]] = {
    "violation": ("Violation rate", PERCENT, "↓"),
    "transfer": ("Transfer ratio", Unit(digits=2), ""),
    "tasks": ("Accuracy", PERCENT, "↑"),
    "perplexity": ("Perplexity", Unit(more=1), "↓"),
    "classification": ("Classification", RATIO, "↑"),
    "text": ("Generated text", RATIO, ""),
    "cost": ("Cost", COUNT, ""),
}
"""Name, unit and better direction of each group."""

UNITS = {"mean_length": PLAIN, "output_perplexity": PLAIN}
ARROWS = {"brier": "↓", "expected_calibration_error": "↓", "output_perplexity": "↓", "positive_share": ""}
NAMES = {"mmlu": "MMLU", "roc_auc": "ROC-AUC", "mean_length": "mean words", "distinct_2": "distinct-2"}
OWN: tuple[Group, ...] = ("text", "classification", "cost")  # groups whose figures Bridle names, not the recipe


@dataclass(frozen=True)
class Measure:
    """A table column: the figure `on` of a group and, in a group of two levels, its constraint or name `within`."""

    group: Group
    on: str
    within: str | None = None

    @property
    def label(self) -> str:
        """The column's heading, e.g. "toxigen · non-toxic ↓"."""
        *names, last = filter(None, (self.on, self.within))
        last = NAMES.get(last) or (last.replace("_", " ") if self.group in OWN else last)
        return f"{' · '.join([*names, last])} {self.arrow}".rstrip()

    @property
    def title(self) -> str:
        """The heading of the column's group, e.g. "Violation rate, %"."""
        name, symbol = GROUPS[self.group][0], self.unit.symbol
        return f"{name}, {symbol}" if symbol else name

    @property
    def unit(self) -> Unit:
        """The format of its values."""
        return UNITS.get(self.within or self.on) or GROUPS[self.group][1]

    @property
    def arrow(self) -> str:
        """The better direction, ↓ or ↑; empty if there is none."""
        return ARROWS.get(self.within or self.on, GROUPS[self.group][2])

    def of(self, method: Method) -> Figure | None:
        """The method's figure; None if not measured."""
        found = getattr(method.figures, self.group).get(self.on)
        return found.get(self.within) if isinstance(found, Mapping) else found

    def is_of(self, comparison: FigureComparison) -> bool:
        """Whether the comparison is about this figure."""
        return self == Measure(comparison.figure, comparison.on, comparison.constraint)


@dataclass(frozen=True)
class Cell:
    """A value as text.

    Attributes:
        spread: standard deviation over seeds, e.g. "± 0.4".
        interval: 95% interval, e.g. "4.1 to 7.6".
        n: number of observations of the interval.
        missing: number of missing observations.
        mark: "best", or "alike" if not significantly different from the best.
        estimate: the figure behind the text, unrounded, in the text's unit; None of words.
    """

    text: str = MISSING
    spread: str = ""
    interval: str = ""
    n: int | None = None
    missing: int = 0
    mark: str = ""
    estimate: Estimate | None = field(default=None, compare=False, repr=False)

    @property
    def counts(self) -> str:
        """Numbers of observations, e.g. "n = 1,000, 4 missing"."""
        there = "" if self.n is None else f"n = {self.n:,}"
        return ", ".join(filter(None, (there, f"{self.missing:,} missing" if self.missing else "")))

    @property
    def below(self) -> str:
        """Interval and counts, e.g. "4.1 to 7.6, n = 1,000"."""
        return ", ".join(filter(None, (self.interval, self.counts)))


def display_name(name: str) -> str:
    """A recipe's name as tables, plots and sentences write it: unchanged except for abbreviations."""
    return NAMES.get(name, name)


def main_violation(main: Main) -> Measure:
    """The main violation rate."""
    return Measure("violation", main.prompt_set, main.constraint)


def main_violations(main: Main) -> list[Measure]:
    """The main violation rate and, where its constraint is independent, the one under the training oracle."""
    beside = [Measure("violation", main.prompt_set, main.trained_on)] if main.is_independent else []
    return [main_violation(main), *beside]


def best(report: Report, measure: Measure) -> str | None:
    """The comparisons' reference, else the method with the best value; None if the measure has no direction."""
    values = {name: figure.value for name, method in report.methods.items() if (figure := measure.of(method))}
    known = {name: value for name, value in values.items() if value is not None}
    if not known or not measure.arrow:
        return None
    references = (one.reference for one in report.comparisons if measure.is_of(one))
    return next(references, (min if measure.arrow == "↓" else max)(known, key=known.__getitem__))


def significant(comparison: FigureComparison) -> bool | None:
    """Whether Holm's p is below 5% or, without a p-value, the interval excludes 0; None without either."""
    if comparison.adjusted_p_value is not None:
        return comparison.adjusted_p_value < LEVEL
    low, high = comparison.difference.low, comparison.difference.high
    return None if low is None or high is None else not low <= 0 <= high


def to_cell(figure: Estimate | None, unit: Unit, mark: str = "", *, signed: bool = False) -> Cell:
    """Formats a figure; one without a value is missing, not 0."""
    if figure is None or figure.value is None:
        return Cell(missing=figure.missing if figure else 0)
    unit = unit.beside(figure.value)
    spread = figure.spread if isinstance(figure, Figure) else None
    ends = [unit.write(end, signed=signed) for end in (figure.low, figure.high) if end is not None]
    interval = " to ".join(ends) if len(ends) == 2 else ""
    return Cell(
        text=unit.write(figure.value, signed=signed),
        spread="" if spread is None else f"± {unit.write(spread)}",
        interval=interval,
        n=figure.n if interval else None,
        missing=figure.missing,
        mark=mark,
        estimate=unit.scaled(figure),
    )


def measures(report: Report, *groups: Group) -> list[Measure]:
    """The figures that any method has, in order of group and first appearance."""
    found = (measure for group in groups for method in report.methods.values() for measure in _of_group(method, group))
    return list(dict.fromkeys(found))


def _of_group(method: Method, group: Group) -> Iterable[Measure]:
    for on, figure in getattr(method.figures, group).items():
        names = figure if isinstance(figure, Mapping) else [None]
        yield from (Measure(group, on, within) for within in names)


def in_words(share: Estimate) -> str:
    """A share with its interval, e.g. "81.0% (95% interval 77.0 to 85.0, n = 300)"."""
    cell = to_cell(share, PERCENT)
    return f"{cell.text}%" + (f" (95% interval {cell.below})" if cell.interval else "")


def overview_tasks(report: Report) -> tuple[str, ...]:
    """The recipe's tasks and groups, or MMLU and the commonsense groups."""
    return tuple(report.settings.get("tasks") or OVERVIEW_TASKS)
