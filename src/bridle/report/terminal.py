"""The tables of a comparison as plain text, for a terminal or a log."""

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bridle.errors import plain
from bridle.report import tables as made
from bridle.report.data import Report
from bridle.report.findings import failures, findings
from bridle.report.tables import Cell, Difference, Table

WIDEST = 200  # columns
MARKS = {"best": "*", "alike": "~"}


def tables(report: Report) -> str:
    """Formats the paper's tables, the differences from the best, the summary and the failures."""
    console = Console(width=WIDEST, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for table in (
            made.overview(report),
            made.transfer(report),
            made.win_matrix(report) if report.win_rates_mean_something else None,
            made.classification(report),
        ):
            if table is not None:
                console.print(_plain(table.caption), _drawn(table), *map(_plain, _notes(table)), "", sep="\n")
        for name, differences in made.differences(report, without=made.single_tasks(report)).items():
            console.print(_differences(name, differences), "")
        if report.comparisons:
            console.print(_plain(made.DIFFERENCES_IN_WORDS), end="\n\n")
        for sentence in findings(report):
            console.print(_plain(sentence))
        for run in failures(report):
            console.print(_plain("{method}, seed {seed}: {status}: {reason}".format(**run)))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _plain(text: str) -> Text:
    return Text(plain(text))


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(**_STYLE)
    for heading in ["", *_headings(table)]:
        drawn.add_column(_plain(heading), justify="right" if heading else "left")
    for method, cells in table.rows.items():
        drawn.add_row(_plain(method), *(_plain(_text(cell)) for cell in cells))
    return drawn


_STYLE: dict[str, Any] = {
    "box": box.SIMPLE,
    "title_justify": "left",
    "title_style": "",
}


def _headings(table: Table) -> list[str]:
    above = [heading for heading, span in table.groups for _ in range(span)] or [""] * len(table.columns)
    return [f"{group}\n{column}" if group else column for group, column in zip(above, table.columns, strict=True)]


def _notes(table: Table) -> Iterator[str]:
    marks = {cell.mark for cells in table.rows.values() for cell in cells}
    if "best" in marks:
        yield "* best; ~ no difference from it shown"
    yield from table.notes


def _text(cell: Cell) -> str:
    value = " ".join(part for part in (cell.text + MARKS.get(cell.mark, ""), cell.spread) if part)
    return "\n".join(filter(None, (value, cell.interval, cell.counts)))


def _differences(name: str, differences: list[Difference]) -> RichTable:
    drawn = RichTable(title=_plain(name), **_STYLE)
    for heading in ("", f"minus the best,\n{differences[0].reference}", "95% interval, n", "adjusted p", ""):
        drawn.add_column(_plain(heading), justify="right" if heading else "left")
    for one in differences:
        drawn.add_row(*map(_plain, (one.method, one.cell.text, one.cell.below, one.p_value, one.verdict)))
    return drawn
