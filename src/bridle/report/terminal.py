"""The result of a comparison as plain text of 80 columns, for a terminal or a log."""

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from bridle.errors import plain
from bridle.report import tables as made
from bridle.report.data import Report
from bridle.report.findings import failures, findings
from bridle.report.measures import Cell
from bridle.report.recommendation import recommendation
from bridle.report.tables import Table

WIDTH = 80  # columns
LONGEST_NAME = 24  # of a method or a heading, in columns; a longer one is cut
MARKS = {"best": "*", "alike": "~"}


def tables(report: Report) -> str:
    """Formats the main figures, a line for each method, the summary and the failures."""
    console = Console(width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        if table := made.brief(report):
            console.print(_fitting(table, console))
            console.print("* best; ~ no difference from it shown. The report has all figures and intervals.\n")
            if table.untested:
                console.print(_plain(f"{table.untested}\n"))
        for sentence in filter(None, (recommendation(report), *findings(report))):
            console.print(_plain(sentence))
        for run in failures(report):
            console.print(_plain("{method}, seed {seed}: {status}: {reason}".format(**run)))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _plain(text: str) -> Text:
    return Text(plain(text))


def _fitting(table: Table, console: Console) -> RichTable:
    """As many of the columns, from the first on, as fit; at least one."""
    unlimited = console.options.update(width=1000)
    drawings = (_drawn(table, count) for count in range(len(table.columns), 1, -1))
    widths = ((drawn, Measurement.get(console, unlimited, drawn).maximum) for drawn in drawings)
    return next((drawn for drawn, width in widths if width <= WIDTH), _drawn(table, 1))


def _drawn(table: Table, count: int) -> RichTable:
    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for heading in ["", *map("\n".join, table.headings[:count])]:
        drawn.add_column(_cut(heading), justify="right" if heading else "left", vertical="bottom", no_wrap=True)
    for method, cells in table.rows.items():
        first, *others = cells[:count]
        drawn.add_row(_cut(method), _plain(_text(first, interval=True)), *(_plain(_text(cell)) for cell in others))
    return drawn


def _cut(names: str) -> Text:
    """Names on their lines, each cut to `LONGEST_NAME` columns."""
    lines = [_plain(name) for name in names.split("\n")]
    for line in lines:
        line.truncate(LONGEST_NAME, overflow="ellipsis")
    return Text("\n").join(lines)


def _text(cell: Cell, *, interval: bool = False) -> str:
    value = cell.text + MARKS.get(cell.mark, "")
    return f"{value} ({cell.interval})" if interval and cell.interval else value
