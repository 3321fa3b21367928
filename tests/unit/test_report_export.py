"""Tables as files: what LaTeX, Markdown and CSV say is what the report says, whatever the names."""

import csv
import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from bridle.errors import UserError
from bridle.report import tables
from bridle.report.data import Report
from bridle.report.export import comma_separated, latex, markdown, write_tables
from bridle.report.measures import Cell
from bridle.report.reading import read_report
from bridle.report.tables import Table
from report_folder import DESCRIPTIONS, VIOLATION, make_folder, make_run

NAMES = ["a & b", "50% $x$", "a_b^c~d", "back\\slash", "<b>|</b>", "*[a](b)*", "#1", "line\nbreak", "{", "`code`", "λ"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return read_report(make_folder(tmp_path_factory.mktemp("comparison")))


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_every_table_is_written_in_three_forms(report, tmp_path):
    written = write_tables(report, tmp_path / "new" / "tables")
    names = {"overview", "win_rates", "classification", "text", "cost", "differences"}
    assert {path.name for path in written} == {f"{name}.{form}" for name in names for form in ("tex", "md", "csv")}
    assert all(path.read_text("utf-8").strip() for path in written)


def test_a_training_run_has_its_rounds(tmp_path):
    run = read_report(make_run(tmp_path / "run"))
    assert [path.name for path in write_tables(run, tmp_path / "tables")] == ["rounds.tex", "rounds.md", "rounds.csv"]
    first, second, *retained = rows_of((tmp_path / "tables" / "rounds.csv").read_text("utf-8"))
    assert [row["Regulariser, round"] for row in (first, second)] == [
        "Regulariser rude, round 1", "Regulariser rude, round 2"
    ]  # fmt: skip
    compliance = "Rollouts: compliance, %"
    assert [float(first[f"{compliance}{end}"]) for end in ("", ", low", ", high")] == pytest.approx([76, 73.4, 78.2])
    assert (first["Rollouts: drawn"], first["R: fit"]) == ("1000", "fitted")
    assert [row["Rollouts: drawn"] for row in retained] == ["", ""], "missing, and not zero"


def test_csv_has_the_figures_unrounded(report):
    found = rows_of(comma_separated(tables.overview(report)))
    assert [row["Method"] for row in found] == list(DESCRIPTIONS)
    rate = "Violation rate, %: rude · non-rude ↓"
    for row in found:
        if row["Method"] == "rl":
            assert set(row.values()) == {"rl", ""}
            continue
        value = VIOLATION[row["Method"]]
        numbers = [float(row[f"{rate}{end}"]) for end in ("", ", low", ", high", ", standard deviation")]
        assert numbers == pytest.approx([100 * value, 100 * (value - 0.025), 100 * (value + 0.025), 2 * value])
        assert (row[f"{rate}, n"], row[f"{rate}, missing"]) == ("1000", "4")
    assert found[4]["Perplexity: novels ↓"] == ""


def test_csv_of_differences_has_signs_that_programs_read(report):
    found = rows_of(comma_separated(tables.every(report)["differences"]))
    auc = next(row for row in found if row["Method, figure"] == "sft, Classification: ROC-AUC ↑")
    assert float(auc["Difference: difference"]) == pytest.approx(-0.084)
    assert auc["Difference: minus the best"] == "constrained-adaptive"
    assert auc["Difference: adjusted p"] == ""
    rate = next(row for row in found if row["Method, figure"].startswith("base, Violation rate"))
    assert rate["Difference: adjusted p"] == "0.0008", "not rounded, as on the page"


def test_markdown_is_a_table_with_marks(report):
    text = markdown(tables.overview(report))
    base, *_, best = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert base.startswith("| base | 21.4 ± 0.4 (18.9 to 23.9, n = 1,000, 4 missing) |")
    assert best.startswith("| constrained-adaptive | **5.8** ± 0.1 (3.3 to 8.3, ")
    assert "8.8<sup>ns</sup> ± 0.2" in text


def test_latex_has_as_many_cells_in_every_row(report):
    for table in tables.every(report).values():
        text = latex(table)
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
        rows = [line for line in text.partition(r"\midrule")[2].splitlines() if line.endswith(r" \\")]
        assert len(rows) == len(table.rows)
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == len(table.columns)
    assert r"\textbf{5.8} $\pm$ 0.1" in latex(tables.overview(report))
    assert r"\multicolumn{2}{c}{Violation rate, \%}" in latex(tables.overview(report))
    assert r"\cmidrule(lr){2-3}" in latex(tables.overview(report))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_only_ever_text(name):
    table = Table(name, [(name, 1)], [name], {name: [Cell("1.0")]}, [name])
    visible = name.replace("\n", " ")
    (row,) = csv.reader(comma_separated(table).splitlines()[1:])
    assert row[0] == visible
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown(table))
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 6  # caption, two headings, two cells, note
    texts = ["".join(child.content for child in cell.children if child.type == "text") for cell in cells]
    assert (texts[0], texts[3], texts[5]) == (visible, visible, visible)
    assert not any(child.type in ("link_open", "html_inline", "code_inline") for c in cells for child in c.children)
    assert not re.search(r"(?<!\\)[%#_^~]", latex(table).partition("\n")[2].replace(r"\textasciitilde", ""))


def test_without_a_figure_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no table to write"):
        write_tables(Report("nothing"), tmp_path)


def test_a_folder_that_is_a_file_is_refused(report, tmp_path):
    (tmp_path / "tables").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_tables(replace(report, comparisons=[]), tmp_path / "tables")
