"""A comparison as text: a line a method in 80 columns, and what a terminal shows is what the figures say."""

import json
import re
from dataclasses import replace

import pytest
from rich.cells import cell_len

from bridle.errors import plain
from bridle.report import tables as made
from bridle.report.data import Figure, Figures, Main, Method, Report
from bridle.report.html import render
from bridle.report.reading import read_report
from bridle.report.terminal import tables
from report_folder import DESCRIPTIONS, REASON, judge_examined, make_folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return read_report(make_folder(tmp_path_factory.mktemp("comparison")))


@pytest.fixture(scope="module")
def text(report):
    return tables(report)


def lines_of(text: str) -> tuple[list[str], list[list[str]]]:
    """The headings of the table, and the cells of its lines."""
    head, _, body = text.partition("─\n")
    rows = [re.split(r"\s{2,}", line.strip()) for line in body.partition("\n\n")[0].splitlines()[:-1]]
    return [re.split(r"\s{2,}", line.strip()) for line in head.splitlines()[:2]][1], rows


def test_a_method_is_a_line_with_the_main_figures(text):
    headings, rows = lines_of(text)
    assert headings == ["rude · non-rude ↓", "novels ↓", "MMLU ↑"]
    assert rows == [
        ["base", "21.4 (18.9 to 23.9)", "76.0", "26.2"],
        ["sft", "14.2 (11.7 to 16.7)", "73.9~", "26.8"],
        ["filtration", "8.8~ (6.3 to 11.3)", "74.6", "25.9"],
        ["rl", "–", "–", "–"],
        ["constrained", "6.4~ (3.9 to 8.9)", "–", "26.6"],
        ["constrained-adaptive", "5.8* (3.3 to 8.3)", "73.4*", "27.1*"],
    ]
    assert "* best; ~ no difference from it shown" in text


def test_figures_whose_differences_were_not_tested_are_named(report, text):
    said = (
        "Differences were not tested for plain · non-rude, MMLU, letters: a value that is not the best need not differ "
        "from it."
    )
    table = made.overview(report)
    assert (table.untested, table.notes[0]) == (said, said)
    assert said in render(report, {})
    assert made.brief(report).untested in " ".join(text.split())
    assert made.classification(report).untested == ""
    untested = replace(report, comparisons=[])
    assert "not tested for rude · non-rude, plain · non-rude, MMLU" in made.overview(untested).untested


@pytest.mark.parametrize("length", [1, 12, 40, 400])
def test_it_fits_eighty_columns(tmp_path, length):
    folder = make_folder(tmp_path / "comparison")
    results = folder / "results.json"
    written = results.read_text("utf-8")
    for name in ("sft", "rude", "novels", "letters"):
        written = written.replace(f'"{name}"', f'"{name}{"漢字 e" * length}"')
    results.write_text(written, encoding="utf-8")
    shown = tables(read_report(folder))
    assert max(map(cell_len, shown.splitlines())) <= 80
    assert len(lines_of(shown)[1]) == len(DESCRIPTIONS)


def test_the_training_oracle_s_rate_is_shown_where_there_is_room():
    rates = {"rude": dict.fromkeys(("careful", "non-rude"), Figure(0.1, 0.05, 0.15, n=100))}
    methods = {"base": Method(figures=Figures(violation=rates))}
    led = Report("led", main=Main("rude", "careful", "novels", "non-rude"), methods=methods)
    assert lines_of(tables(led))[0] == ["rude · careful ↓", "rude · non-rude ↓"]


def test_intervals_and_missing_observations_are_in_the_cells(report):
    base, constrained = (made.overview(report).rows[name] for name in ("base", "constrained"))
    assert base[0].below == "18.9 to 23.9, n = 1,000, 4 missing"
    assert (constrained[3].text, constrained[3].below) == ("–", "52,000 missing")


def test_the_overview_says_how_prompts_were_completed(report):
    note = "rude: first 8 tokens of each row, 2 completions of at most 32 tokens, temperature 1, top-p 0.9."
    assert note in made.overview(report).notes


def test_the_win_matrix_reads_row_over_column(report):
    table = made.win_matrix(report)
    assert {name: [cell.text for cell in cells] for name, cells in table.rows.items()} == {
        "sft": ["·", "43.0", "17.1"],
        "constrained-adaptive": ["57.0", "·", "17.9"],
    }
    assert table.rows["sft"][1].below == "35.0 to 51.0, n = 100"
    assert table.notes[0].startswith("Judge: local:tiny. Each match has 100 pairs")


@pytest.mark.parametrize(("accuracy", "passes"), [(0.83, True), (0.53, False)])
def test_win_rates_of_a_judge_that_failed_its_examination_leave_the_summary(tmp_path, accuracy, passes):
    folder = make_folder(tmp_path / "examined")
    results = json.loads((folder / "results.json").read_text())
    results["judge_examined"] = judge_examined(accuracy, another=accuracy, shuffled=accuracy, truncated=0.51)
    (folder / "results.json").write_text(json.dumps(results))
    report = read_report(folder)
    table, text = made.win_matrix(report), " ".join(tables(report).split())
    shown = f"{100 * accuracy:.1f}% (95% interval {100 * accuracy - 4:.1f} to {100 * accuracy + 4:.1f}, n = 300)"
    assert shown in table.notes[-1], "beside the table"
    assert "truncated 51.0%" in table.notes[-1]
    assert ("(not meaningful: the judge failed its examination)" in table.caption) is not passes
    assert (f"failed its examination: it is right about {shown} of the pairs" in text) is not passes
    page = render(report, {})
    assert table.caption in page
    assert table.notes[-1] in page


def test_classification_is_marked_by_its_intervals(report):
    table = made.classification(report)
    assert {
        name: cells[0].text + {"best": "*", "alike": "~"}.get(cells[0].mark, "") for name, cells in table.rows.items()
    } == {
        "base": "–",
        "sft": "0.658",
        "filtration": "0.712~",
        "rl": "–",
        "constrained": "0.736~",
        "constrained-adaptive": "0.742*",
    }


def test_differences_are_in_their_unit_with_verdicts(report):
    found = {
        name: [(one.method, one.cell.text, one.cell.below, one.p_value.text, one.verdict) for one in differences]
        for name, differences in made.differences(report).items()
    }
    assert found["Violation rate, %: rude · non-rude ↓"] == [
        ("base", "+15.6", "+12.5 to +18.7, n = 500", "< 0.001", "differs"),
        ("sft", "+8.4", "+5.3 to +11.5, n = 500", "< 0.001", "differs"),
        ("filtration", "+3.0", "−0.1 to +6.1, n = 500", "0.620", "no difference shown"),
        ("constrained", "+0.6", "−2.5 to +3.7, n = 500", "0.620", "no difference shown"),
    ]
    assert found["Log perplexity, nats per token: novels ↓"][1] == (
        "sft", "+0.007", "−0.003 to +0.017, n = 500", "0.620", "no difference shown"
    )  # fmt: skip
    assert found["Classification: ROC-AUC ↑"][0] == (
        "sft", "−0.084", "−0.124 to −0.044, n = 500", "–", "differs (interval)"
    )  # fmt: skip


def test_prompts_without_a_score_are_counted_beside_a_difference(report):
    first = report.comparisons[0]
    lacking = replace(first, difference=replace(first.difference, missing=7))
    ((found,),) = made.differences(replace(report, comparisons=[lacking])).values()
    assert found.cell.below == "+12.5 to +18.7, n = 500, 7 missing"


def test_findings_and_failures_end_the_text(text):
    assert text.splitlines()[-5:] == [
        "Figures are missing for rl: not every run is complete.",
        "Training gave 6 warnings (constrained-adaptive); the first: round 1, rude:",
        "violations rose.",
        f"rl, seed 0: failed: {REASON}",
        f"rl, seed 1: failed: {REASON}",
    ]


def test_without_figures_there_is_no_table():
    assert tables(Report("nothing")).strip() == ""


def test_names_of_files_are_shown_and_not_obeyed(tmp_path):
    folder = make_folder(tmp_path / "comparison")
    results = folder / "results.json"
    written = results.read_text(encoding="utf-8")
    results.write_text(written.replace('"sft"', r'"sft\u001b[2J\u202e"'), encoding="utf-8")
    (folder / "sft").rename(folder / "sft\x1b[2J\u202e")
    shown = tables(read_report(folder))
    assert r"sft\x1b[2J\u202e" in shown
    assert plain(shown) == shown
