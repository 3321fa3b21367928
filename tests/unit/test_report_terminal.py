"""The tables of a comparison as text: what a terminal shows is what the figures say."""

import json
import re
from dataclasses import replace

import pytest

from bridle.errors import plain
from bridle.report.data import Report, read_report
from bridle.report.html import render
from bridle.report.tables import DIFFERENCES_IN_WORDS, win_matrix
from bridle.report.terminal import tables
from report_folder import DESCRIPTIONS, REASON, judge_examined, make_folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return read_report(make_folder(tmp_path_factory.mktemp("comparison")))


@pytest.fixture(scope="module")
def text(report):
    return tables(report)


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of each line of the table under a title; what stands below a value is a line of its own."""
    body = re.search(rf"^{re.escape(title)}\n.*?─\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    assert body is not None, f"no table {title!r}"
    return [re.split(r"\s{2,}", line.strip()) for line in body[1].splitlines()]


def by_method(found: list[list[str]]) -> dict[str, str]:
    """The first value of each method."""
    return {line[0]: line[1] for line in found if line[0] in DESCRIPTIONS}


def test_the_overview_has_every_method_with_its_marks(text):
    found = rows(text, "Mean over seeds, ± standard deviation, 95% interval")
    assert by_method(found) == {
        "base": "21.4 ± 0.4",
        "sft": "14.2 ± 0.3",
        "filtration": "8.8~ ± 0.2",
        "rl": "–",
        "constrained": "6.4~ ± 0.1",
        "constrained-adaptive": "5.8* ± 0.1",
    }
    assert "* best; ~ no difference from it shown" in text


def test_the_overview_says_how_prompts_were_completed(text):
    note = "rude: first 8 tokens of each row, 2 completions of at most 32 tokens, temperature 1, top-p 0.9."
    assert note in " ".join(text.split())


def test_intervals_and_missing_observations_stand_below_their_value(text):
    found = rows(text, "Mean over seeds, ± standard deviation, 95% interval")
    assert found[1] == ["18.9 to 23.9", "5.9 to 8.3", "24.7 to 27.7", "75.1 to 76.9", "55.5 to 57.1"]
    assert found[2] == ["n = 1,000, 4 missing", "n = 1,000", "n = 2,000", "n = 52,000", "n = 48,000"]
    below = found[[line[0] for line in found].index("constrained") + 1]
    assert below[3] == "52,000 missing"  # a perplexity without a value is a dash, and says of how much


def test_the_win_matrix_reads_row_over_column(text):
    assert rows(text, "Win rate of the row over the column") == [
        ["sft", "·", "43.0", "17.1"],
        ["35.0 to 51.0", "16.6 to 17.6"],
        ["n = 100", "n = 100"],
        ["constrained-adaptive", "57.0", "·", "17.9"],
        ["49.0 to 65.0", "17.4 to 18.4"],
        ["n = 100", "n = 100"],
    ]
    assert "Judge: local:tiny. Each match has 100 pairs" in text


@pytest.mark.parametrize(("accuracy", "passes"), [(0.83, True), (0.53, False)])
def test_win_rates_of_a_judge_that_failed_its_examination_leave_the_summary(tmp_path, accuracy, passes):
    folder = make_folder(tmp_path / "examined")
    results = json.loads((folder / "results.json").read_text())
    results["judge_examined"] = judge_examined(accuracy, another=accuracy, shuffled=accuracy, truncated=0.51)
    (folder / "results.json").write_text(json.dumps(results))
    report = read_report(folder)
    table, text = win_matrix(report), " ".join(tables(report).split())
    shown = f"{100 * accuracy:.1f}% (95% interval {100 * accuracy - 4:.1f} to {100 * accuracy + 4:.1f}, n = 300)"
    assert shown in table.notes[-1], "beside the table"
    assert "truncated 51.0%" in table.notes[-1]
    assert ("(not meaningful: the judge failed its examination)" in table.caption) is not passes
    assert (table.notes[-1] in text) is passes
    assert ("Win rate of the row" in text) is passes
    assert (f"failed its examination: it is right about {shown} of the pairs" in text) is not passes
    page = render(report, {})
    assert table.caption in page
    assert table.notes[-1] in page


def test_classification_is_marked_by_its_intervals(text):
    found = rows(text, "Classification, with the violation rate of generation")
    assert by_method(found) == {
        "base": "–",
        "sft": "0.658 ± 0.013",
        "filtration": "0.712~ ± 0.014",
        "rl": "–",
        "constrained": "0.736~ ± 0.015",
        "constrained-adaptive": "0.742* ± 0.015",
    }


def test_differences_are_in_their_unit_with_verdicts(text):
    assert rows(text, "Violation rate, %: rude · non-rude ↓") == [
        ["base", "+15.6", "+12.5 to +18.7, n = 500", "< 0.001", "differs"],
        ["sft", "+8.4", "+5.3 to +11.5, n = 500", "< 0.001", "differs"],
        ["filtration", "+3.0", "−0.1 to +6.1, n = 500", "0.620", "no difference shown"],
        ["constrained", "+0.6", "−2.5 to +3.7, n = 500", "0.620", "no difference shown"],
    ]
    assert rows(text, "Log perplexity, nats per token: novels ↓")[1] == [
        "sft", "+0.007", "−0.003 to +0.017, n = 500", "0.620", "no difference shown"
    ]  # fmt: skip
    assert rows(text, "Classification: ROC-AUC ↑")[0] == [
        "sft", "−0.084", "−0.124 to −0.044, n = 500", "–", "differs (interval)"
    ]  # fmt: skip
    assert text.count("minus the best,") == 3


def test_what_the_tests_do_not_cover_is_said_once(text, report):
    assert " ".join(text.split()).count(DIFFERENCES_IN_WORDS) == 1
    assert "Holm’s method" not in tables(replace(report, comparisons=[]))


def test_prompts_without_a_score_are_counted_beside_a_difference(report):
    first = report.comparisons[0]
    lacking = replace(first, difference=replace(first.difference, missing=7))
    text = tables(replace(report, comparisons=[lacking]))
    assert rows(text, "Violation rate, %: rude · non-rude ↓")[0][2] == "+12.5 to +18.7, n = 500, 7 missing"


def test_findings_and_failures_end_the_text(text):
    assert text.splitlines()[-4:] == [
        "Figures are missing for rl: not every run is complete.",
        "Training gave 6 warnings (constrained-adaptive); the first: round 1, rude: violations rose.",
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
