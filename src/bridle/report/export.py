"""Every table of a report as LaTeX, Markdown and CSV, for a paper, a page and a program."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from bridle.errors import UserError
from bridle.report.data import Report
from bridle.report.measures import MISSING, Cell
from bridle.report.tables import Table, every
from bridle.utils.files import check_output, write_text

NOT_A_VALUE = (MISSING, "·")  # a missing value, and the diagonal of a matrix

LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "−": "$-$",
    "±": r"$\pm$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "·": r"$\cdot$",
    "λ": r"$\lambda$",
    "‖": r"$\Vert$",
    "–": "--",
    "’": "'",
    "“": "``",
    "”": "''",
    "\N{NO-BREAK SPACE}": "~",
}
"""Characters that LaTeX does not print as they are."""


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Writes every table of the report to a folder: NAME.tex, NAME.md and NAME.csv.

    LaTeX needs the package booktabs. CSV has the figures unrounded, in the unit of their heading, with the ends of
    intervals, the standard deviation over seeds and the numbers of observations in columns of their own; a missing
    value is empty.

    Raises:
        UserError: the report has no table, or a file cannot be written.
    """
    tables = every(report)
    if not tables:
        raise UserError(f"{folder}: there is no table to write: nothing was measured, and no round was completed")
    check_output(folder / "tables")
    written = []
    for name, table in tables.items():
        for suffix, write in (("tex", latex), ("md", markdown), ("csv", comma_separated)):
            written.append(folder / f"{name}.{suffix}")
            write_text(written[-1], write(table))
    return written


# ---------------------------------------------------------------------- LaTeX


def latex(table: Table) -> str:
    """The table as a LaTeX float, with its notes below; the best is bold, and ns is not shown to differ from it."""
    rules, above, place = [], [], 2
    for title, span in table.groups:
        above.append(rf"\multicolumn{{{span}}}{{c}}{{{_latex(title)}}}")
        rules.append(rf"\cmidrule(lr){{{place}-{place + span - 1}}}")
        place += span
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{_latex(table.caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        rf"& {' & '.join(above)} \\",
        " ".join(rules),
        rf"{_latex(table.of)} & {' & '.join(map(_latex, table.columns))} \\",
        r"\midrule",
        *(rf"{_latex(name)} & {' & '.join(map(_latex_cell, cells))} \\" for name, cells in table.rows.items()),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par{{\footnotesize {_latex(note)}}}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(cell: Cell) -> str:
    value = _latex(cell.text)
    value = {"best": rf"\textbf{{{value}}}", "alike": rf"{value}$^{{\mathrm{{ns}}}}$"}.get(cell.mark, value)
    if cell.spread:
        value += f" {_latex(cell.spread)}"
    below = [rf"{{\scriptsize {_latex(part)}}}" for part in (cell.interval, cell.counts) if part]
    stacked = r" \\ ".join([value, *below])
    return rf"\shortstack[r]{{{stacked}}}" if below else value


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in _line(text))


# ---------------------------------------------------------------------- Markdown


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, with caption and notes; the best is bold, and ns as in LaTeX."""
    head = [table.of, *_headings(table)]
    lines = [
        f"**{_markdown(table.caption)}**",
        "",
        _row(map(_markdown, head)),
        _row(["---", *["---:"] * len(table.columns)]),
        *(_row([_markdown(name), *map(_markdown_cell, cells)]) for name, cells in table.rows.items()),
        *(f"\n{_markdown(note)}" for note in table.notes),
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Iterator[str] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: Cell) -> str:
    value = _markdown(cell.text)
    value = {"best": f"**{value}**", "alike": f"{value}<sup>ns</sup>"}.get(cell.mark, value)
    return " ".join(filter(None, (value, cell.spread, cell.below and f"({cell.below})")))


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", _line(text))


# ---------------------------------------------------------------------- CSV


def comma_separated(table: Table) -> str:
    """The table as CSV, a column for each number; without rounding, marks and notes."""
    columns = [_numbers([cells[place] for cells in table.rows.values()]) for place in range(len(table.columns))]
    headings = [
        f"{heading}{', ' * bool(what)}{what}"
        for heading, column in zip(_headings(table), columns, strict=True)
        for what in column
    ]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow([table.of, *map(_line, headings)])
    for place, name in enumerate(table.rows):
        rows.writerow([_line(name), *(values[place] for column in columns for values in column.values())])
    return file.getvalue()


def _numbers(cells: list[Cell]) -> dict[str, list[str]]:
    """The columns of a table's column, by what they hold: the value, and what any of its cells has."""
    estimates = [cell.estimate for cell in cells]
    found = {"": [_value(cell) for cell in cells]}
    for name, field in {"low": "low", "high": "high", "standard deviation": "spread"}.items():
        found[name] = [_number(getattr(one, field, None)) for one in estimates]
    found["n"] = ["" if cell.n is None else str(cell.n) for cell in cells]
    found["missing"] = [str(cell.missing or "") for cell in cells]
    return {name: values for name, values in found.items() if any(values) or not name}


def _value(cell: Cell) -> str:
    if cell.estimate is not None:
        return _number(cell.estimate.value)
    return "" if cell.text in NOT_A_VALUE else _line(cell.text)


def _number(value: float | None) -> str:
    return "" if value is None else format(value, ".10g")


def _headings(table: Table) -> list[str]:
    return [": ".join(heading) for heading in table.headings]


def _line(text: str) -> str:
    """The text on one line."""
    return "".join(
        character if character.isprintable() or character == "\N{NO-BREAK SPACE}" else " " for character in text
    )
