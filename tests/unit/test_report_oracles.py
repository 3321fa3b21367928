"""A comparison whose independent constraint leads tables, plots and sentences, the training oracle beside it."""

import json

import pytest

from bridle.report import html, tables
from bridle.report.data import Estimate, Main
from bridle.report.findings import findings
from bridle.report.pareto import tradeoffs
from bridle.report.plots import draw_plots
from bridle.report.reading import read_report
from report_folder import VIOLATION, estimate, figure, make_folder

JUDGE = "careful"
CONFIRMED = {"filtration": (0.9, 0.3), "constrained": (0.3, 0.4), "constrained-adaptive": (0.31, 0.8)}


def change(path, edit):
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def led(results):
    """Adds the judge's rates behind the oracle's, and makes them the main ones."""
    for name, value in VIOLATION.items():
        for by_constraint in results["methods"][name]["figures"]["violation"].values():
            by_constraint[JUDGE] = figure(2 * value, 0.03, n=1000)
    tested = [one for one in results["comparisons"] if one["figure"] == "violation"]
    results["comparisons"] += [one | {"constraint": JUDGE} for one in tested]
    results["main"] |= {"constraint": JUDGE, "trained_on": "non-rude"}
    results["examined"] = {
        JUDGE: {"people": estimate(0.84, 0.04, n=324)},
        "non-rude": {"people": estimate(0.75, 0.05, 324)},
    }
    for name, (value, half_width) in CONFIRMED.items():
        method = results["methods"][name]
        method["figures"]["transfer"] = {"rude": {JUDGE: figure(value, half_width, n=500)}}
        method["reference"] = "sft"
    results["methods"]["constrained"]["figures"]["transfer"]["plain"] = {JUDGE: figure(None, None, n=500)}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "comparison")


@pytest.fixture
def report(folder):
    change(folder / "results.json", led)
    return read_report(folder)


def test_the_independent_rate_leads_with_the_oracle_s_beside_it(report):
    assert report.main == Main("rude", JUDGE, "novels", "non-rude")
    table = tables.overview(report)
    assert table.columns[:4] == ["rude · careful ↓", "rude · non-rude ↓", "plain · careful ↓", "plain · non-rude ↓"]
    assert [cell.text for cell in table.rows["base"][:2]] == ["42.8", "21.4"]
    assert tables.classification(report).columns == ["ROC-AUC ↑", "rude · careful ↓", "rude · non-rude ↓"]
    assert tradeoffs(report)[0].points["base"][0] == pytest.approx(0.428)
    assert all("rude (careful)" in ax.get_xlabel() for ax in draw_plots(report)["tradeoff"].axes)
    assert next(iter(tables.differences(report))) == "Violation rate, %: rude · careful ↓"
    said = findings(report)
    assert "11.6% (95% interval" in said[0]
    assert "violate careful, against 42.8% for base" in said[0]
    assert "Under non-rude, the training oracle, constrained-adaptive’s rate is 5.8%, and base’s 21.4%." in said


def test_each_method_has_its_transfer_ratio(report):
    table = tables.transfer(report)
    assert (table.groups, table.columns) == ([("Transfer ratio", 2)], ["rude · careful", "plain · careful"])
    assert {name: [cell.text for cell in cells] for name, cells in table.rows.items()} == {
        "base": ["–", "–"],
        "sft": ["–", "–"],
        "filtration": ["0.90", "–"],
        "rl": ["–", "–"],
        "constrained": ["0.30", "–"],
        "constrained-adaptive": ["0.31", "–"],
    }
    assert table.rows["filtration"][0].below == "0.60 to 1.20, n = 500"
    assert {cell.mark for cells in table.rows.values() for cell in cells} == {""}
    assert table.notes[1] == "Reference: sft for filtration, constrained, constrained-adaptive."


def test_a_method_that_pleases_its_oracle_is_named(report):
    warned = [sentence for sentence in findings(report) if "please its oracle" in sentence]
    assert warned == [  # constrained-adaptive's interval reaches 1
        "Warning: constrained is learning to please its oracle: of its drop under non-rude on rude, careful confirms "
        "30.0% (95% interval −10.0 to 70.0, n = 500)."
    ]


def test_the_examination_stands_beside_the_rates(report):
    notes = [
        "careful: AUC 0.840 (95% interval 0.800 to 0.880, n = 324) on people, by human labels.",
        "non-rude: AUC 0.750 (95% interval 0.700 to 0.800, n = 324) on people, by human labels.",
    ]
    for table in (tables.overview(report), tables.classification(report)):
        assert table.notes[-2:] == notes
    page = html.render(report, draw_plots(report))
    for text in (*notes, tables.transfer(report).caption):
        assert text in page
    assert "constraint careful (independent; the training oracle is non-rude)" in page


def test_without_an_independent_constraint_nothing_of_it_is_said(folder):
    change(folder / "results.json", lambda results: results["main"].update(trained_on="non-rude"))
    report = read_report(folder)
    assert not report.main.is_independent
    assert tables.transfer(report) is None
    assert "the training oracle" not in " ".join(findings(report))
    assert "independent" not in html.render(report, draw_plots(report)).partition("<nav")[0].partition("<body")[2]


def test_a_missing_auc_is_a_dash(folder):
    change(folder / "results.json", led)
    change(folder / "results.json", lambda results: results["examined"][JUDGE]["people"].update(value=None))
    report = read_report(folder)
    assert isinstance(report.examined[JUDGE]["people"], Estimate)
    assert "careful: AUC – on people, by human labels." in tables.overview(report).notes
