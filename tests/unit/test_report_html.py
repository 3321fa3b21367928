import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

import report_folder
from bridle.data import write_rollouts
from bridle.errors import UserError
from bridle.report import data, html, measures, reading, tables, texts
from bridle.report.data import Completion, Guidance, GuidedToken, Report, Score, Shift, evenly_spaced
from bridle.report.findings import findings
from bridle.report.html import write_report
from bridle.report.plots import draw_plots
from bridle.utils.files import write_json

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "</script><img src=x onerror=alert(1)>\"'<script>alert(1)</script>"


class Page(HTMLParser):
    """The elements of a page with their attributes, and its texts with the elements they are in."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, text):
        self.texts.append((text, list(self.open)))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def inlined(self, tag: str) -> str:
        return "".join(text for text, above in self.texts if above and above[-1][0] == tag)

    def covered(self, text: str) -> list[bool]:
        """For each place of the text whether it is covered there, from sight and from screen readers."""
        places = [above for found, above in self.texts if text in found]
        return [any("inert" in at and at.get("aria-hidden") == "true" for _, at in above) for above in places]


def rendered(report: Report) -> str:
    return html.render(report, draw_plots(report))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return report_folder.make_folder(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="module")
def report(folder):
    return reading.read_report(folder)


@pytest.fixture(scope="module")
def text(report):
    return rendered(report)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def sampled(score: Score | None, prompt_score: Score | None = None) -> Report:
    scores, prompt_scores = ({} if one is None else {"kind": one} for one in (score, prompt_score))
    one = Completion("sft", "0", "set", 0, 0, "the prompt", "the completion", scores, prompt_scores)
    return Report("tiny", completions=[one])


def guided(violates: bool | None) -> Report:
    tokens = [
        GuidedToken("the"),
        GuidedToken(" mill", 0.2, None, 0.3, [Shift(" gained", 0.1, 0.2)], [Shift(" lost", 0.2, 0.00001)]),
    ]
    return Report("tiny", guidance=Guidance("base", "rude", "non-rude", "the mill", 1, tokens, violates))


def test_it_writes_a_page_and_the_plots(folder):
    assert write_report(folder) == folder / "report.html"
    names = {"tradeoff", "other_tradeoffs", "training_curves", "reliability"}
    assert {path.name for path in (folder / "plots").iterdir()} == {
        f"{n}.{s}" for n in names for s in ("png", "svg", "pdf")
    }
    assert [path.name for path in folder.glob(".*")] == []


def empty_folder(path, **more):
    write_json(path / "results.json", {"format": 1, "recipe": "empty", "methods": {}, **more})
    return path


def test_the_page_goes_where_it_is_told(tmp_path):
    output = tmp_path / "new" / "page.html"
    assert write_report(empty_folder(tmp_path), output) == output
    assert Page(output.read_text("utf-8")).inlined("h1") == "empty"
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.page\.html: cannot be written"):
        write_report(empty_folder(tmp_path), tmp_path / "file" / "page.html")


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path):
    path = write_report(empty_folder(tmp_path, recipe="half \ud800 a letter"))
    assert Page(path.read_text("utf-8")).inlined("h1") == "half ? a letter"


def test_the_folder_of_a_training_run_has_a_page_too(tmp_path):
    run = Page(rendered(reading.read_report(report_folder.make_run(tmp_path / "my-run"))))
    assert run.inlined("h1") == "my-run"
    assert "All methods" not in run.inlined("h2")
    assert "rude: 76.0% of rollouts complied in round 1, 90.0% of rollouts complied in round 2." in run.inlined("p")


def test_a_training_run_shows_its_rounds_regulariser_by_regulariser(tmp_path):
    rude, plain = tables.rounds(reading.read_report(report_folder.make_run(tmp_path / "run")))
    assert (rude.caption, rude.of, list(rude.rows)) == ("Regulariser rude", "Round", ["1", "2"])
    assert rude.columns[:5] == ["drawn", "compliance, %", "clipped, %", "missing", "truncated"]
    assert [cell.text for cell in rude.rows["1"]] == [
        "1,000", "76.0", "12.5", "3", "–", "4", "–", "0.0021", "20.0", "fitted", "0.100", "0.45", "0.054"
    ]  # fmt: skip
    assert (rude.rows["1"][1].interval, rude.rows["1"][1].n) == ("73.4 to 78.2", 997)
    retained = [cell.text for cell in plain.rows["2"]]  # draws nothing
    assert retained == ["–"] * 5 + ["2", "–", "0.0362"] + ["–"] * 5


def test_a_training_run_shows_r_against_the_truth_if_it_was_measured(tmp_path):
    folder = report_folder.make_run(tmp_path / "run")
    assert tables.critics(reading.read_report(folder)) is None
    known = {"mae": 0.21, "correlation": 0.5, "skill": [0.2, 0.08], "skill_violating": [-0.5, 0.1], "guided": 0.047}
    blind = {"mae": 0.3, "correlation": None, "skill": None, "skill_violating": None, "skill_texts": 0, "kl_closed": 0}
    measured = {"the run's": known | {"skill_texts": 0.11, "kl_closed": 0.4}, "few": blind}
    write_json(folder / "critic.json", {"policy": {"p": 0.063, "q": 0.0, "kl_q_p": 0.07}, "variants": measured})
    report = reading.read_report(folder)
    table = tables.critics(report)
    assert {name: [cell.text for cell in cells] for name, cells in table.rows.items()} == {
        "the run's": ["0.210", "0.50", "0.20 ± 0.08", "−0.50 ± 0.10", "0.110", "40.0", "4.7"],
        "few": ["0.300", "–", "–", "–", "0.000", "0.0", "–"],
    }
    assert table.notes == ["The policy violates in 6.3% of its texts; KL(q‖p) is 0.070 nats a text."]
    assert "R against the truth" in Page(rendered(report)).inlined("h2")


def test_a_broken_critic_is_refused_by_its_key(tmp_path):
    folder = report_folder.make_run(tmp_path / "run")
    write_json(folder / "critic.json", {"policy": {"p": "much", "kl_q_p": 0.07}, "variants": {}})
    with pytest.raises(UserError, match=r"critic\.json: policy\.p: "):
        reading.read_report(folder)


def test_a_comparison_leaves_rounds_and_rollouts_to_its_runs(page, report):
    assert tables.rounds(report) == []
    assert "Rollouts" not in page.inlined("h2")


def test_plots_lead_to_tables_that_are_there(report, tmp_path):
    run = reading.read_report(report_folder.make_run(tmp_path / "run"))
    for shown, places in ((report, ["methods"]), (run, ["rounds", "rounds"])):
        written = rendered(shown)
        captions = "".join(re.findall(r"<figcaption>.*?</figcaption>", written, re.DOTALL))
        assert re.findall(r'href="#(\w+)"', captions) == places
        assert all(f'id="{place}"' in written for place in places)


@pytest.mark.parametrize(
    ("outcomes", "disagrees"),
    [
        ([{"a": True, "b": False}, {"a": True, "b": False}], False),
        ([{"a": True, "b": False}, {"a": True, "b": True}], True),
        ([{"a": True}, {"b": False}], False),
        ([{"a": True}, {"a": None}, {}], False),
    ],
)
def test_methods_disagree_where_one_violates_what_another_keeps(outcomes, disagrees):
    answers = [
        texts.Answer(
            "base", "text", [texts.verdict(name, data.Score(0.5, complies)) for name, complies in of.items()], ""
        )
        for of in outcomes
    ]
    assert texts.Sample("mild", 1, "prompt", [], "", answers).disagrees is disagrees


def test_a_training_run_shows_rollouts_covered_unless_they_comply(tmp_path):
    report = reading.read_report(report_folder.make_run(tmp_path / "run"))
    page = Page(rendered(replace(report, rollouts=[replace(report.rollouts[0], finished=False), *report.rollouts[1:]])))
    assert [text for text, above in page.texts if above and above[-1][0] == "h3"] == [
        "regulariser rude", "Round 1, rude", "Round 2, rude"
    ]  # fmt: skip
    assert page.covered("that the fog would lift") == [False, False]
    assert page.covered(report_folder.INSULT) == page.covered("what a muddlehead") == [True, True]
    assert page.covered(report_folder.PROMPTS[0]) == [True, True]  # nothing scores the prompts of rollouts
    line = "".join(text for text, above in page.texts if any(at.get("class") == "verdicts" for _, at in above))
    assert line.startswith("non-rude: compliance 0.97non-rude: compliance 0.00non-rude: no score (the scorer gave no")
    assert [text for text, above in page.texts if above and above[-1][1].get("class") == "note"] == [
        "cut at the length limit"
    ]


def test_of_many_rollouts_the_first_and_the_last_round_are_among_the_shown(tmp_path):
    folder = report_folder.make_run(tmp_path / "run")
    for number in range(3, 31):
        write_rollouts(folder / "rollouts" / f"round-{number}.rude.jsonl", 5 * report_folder.rollouts(number))
    shown = [(one.round, one.completion) for one in reading.read_report(folder).rollouts]
    assert len(shown) == data.MOST_ROUNDS * reading.SHOWN_ROLLOUTS
    assert (shown[0][0], shown[-1]) == (1, (30, "what a muddlehead"))


@pytest.mark.parametrize("directive", ["style", "script"])
def test_only_what_is_inlined_may_run(page, directive):
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    digest = base64.b64encode(hashlib.sha256(page.inlined(directive).encode()).digest()).decode()
    assert f"{directive}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_every_text_that_is_not_ours_is_escaped(tmp_path):
    folder = report_folder.make_folder(tmp_path)
    for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        spiked = path.read_text("utf-8")
        for word in ("constrained-adaptive", "grumble-mini", "RLOOTrainer", "local:tiny", "no answer", "the ferryman",
                     "that the fog", "non-rude", "letters", "Linux", " kind", "max_new_tokens"):  # fmt: skip
            spiked = spiked.replace(f'"{word}', f'"{json.dumps(HOSTILE)[1:-1]}{word}')
        path.write_text(
            spiked.replace(f"{json.dumps(HOSTILE)[1:-1]}constrained-adaptive/seed", "constrained-adaptive/seed")
        )
    page = Page(rendered(reading.read_report(folder)))
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert [at for _, at in page.elements if any(name.startswith("on") or name == "style" for name in at)] == []
    shown = "".join(text for text, _ in page.texts)
    assert all(f"{HOSTILE}{word}" in shown for word in ("constrained-adaptive", "RLOOTrainer", "the ferryman", "Linux"))


@pytest.mark.parametrize(
    ("score", "covered"),
    [
        (Score(1.0, True), False),
        (Score(0.0, False), True),
        (Score(None, None, "no number"), True),
        (None, True),
    ],
)
def test_a_completion_is_covered_unless_it_complies(score, covered):
    page = Page(rendered(sampled(score)))
    assert page.covered("the completion") == [covered]
    assert page.covered("the prompt") == [True]  # it was not scored
    assert Page(rendered(sampled(Score(1.0, True), score))).covered("the prompt") == [covered]


def test_a_score_is_called_compliance(page):
    line = "".join(text for text, above in page.texts if any(at.get("class") == "verdicts" for _, at in above))
    assert "non-rude: compliance 0.00" in line
    assert "non-rude: no score (the scorer gave no number)" in line
    assert "violates" not in line


def test_one_constraint_is_enough_to_cover():
    assert texts.cover(["complies", "violates"]) == "violating text"
    assert texts.cover(["complies", "no score"]) == "text without a score"
    assert texts.cover(["complies", "complies"]) == ""


@pytest.mark.parametrize(("violates", "covered"), [(False, False), (True, True), (None, True)])
def test_guidance_is_covered_as_its_text_is(violates, covered):
    page = Page(rendered(guided(violates)))
    on_map = [at for tag, at in page.elements if tag == "button" and "token" in at.get("class", "").split()]
    assert len(on_map) == 2
    assert any(page.covered(" mill")[:1]) == covered
    assert page.covered(" gained")[-1] is True  # tokens that were never part of a scored text
    assert page.covered(" lost")[-1] is True


def test_guidance_names_its_strength_and_whose_p_it_is():
    report = guided(False)
    text = rendered(replace(report, guidance=replace(report.guidance, guidance_scale=4.0)))
    assert 'arrow keys move" aria-controls="place" dir="ltr"' in text
    arabic = rendered(replace(report, guidance=replace(report.guidance, text="مرحبا")))
    assert 'arrow keys move" aria-controls="place" dir="rtl"' in arabic
    assert "at the guidance scale η = 4, differ in its place from p of the model before tuning" in text
    assert "the probability that the finished text will comply" in text
    shared = rendered(replace(report, guidance=replace(report.guidance, tilt=-2.0)))
    assert "the likelier the finished text will violate" in shared
    assert "probability of compliance</dt>" not in shared


def test_the_token_at_which_q_moves_most_is_chosen_first(page, report):
    chosen = [at["data-place"] for at in page.all("button") if at.get("aria-pressed") == "true"]
    assert chosen == ["place-6"]  # the prompt's second token moves more, but nothing guides a prompt
    tokens = [replace(token, kl=None) for token in report.guidance.tokens]
    assert texts.opened(replace(report.guidance, tokens=tokens)) == report.guidance.prompt_tokens


def test_a_token_says_its_value_and_a_missing_one_says_so(text):
    page = Page(rendered(guided(False)))
    values = [found for found, above in page.texts if above and above[-1][1].get("class") == "chance"]
    assert values == ["–", "–"]
    assert texts.level(None) == "r-none"
    assert [texts.level(r) for r in (0.0, 0.5, 1.0)] == ["r-0", "r-10", "r-20"]
    assert all(f".r-{step} {{" in text for step in range(texts.LEVELS + 1))


def test_a_failed_method_has_dashes_and_its_reason(page, report):
    assert {cell.text for cell in tables.overview(report).rows["rl"]} == {"–"}
    assert f", seed 0, failed: {report_folder.REASON}" in page.inlined("li")
    assert tables.overview(report).rows["constrained"][3].text == "–"  # its perplexity is missing


def test_warnings_of_training_name_method_and_seed(page, report):
    section = "".join(text for text, _ in page.texts)
    section = section[section.rindex("Warnings") :]
    assert "constrained-adaptive, seed 1: round 1, rude: violations rose" in section
    assert f"constrained-adaptive, seed 1: update 120 was skipped {report_folder.SCRIPT}" in section
    without = rendered(replace(report, curves=[replace(curve, warnings=[]) for curve in report.curves]))
    assert "Warnings" not in Page(without).inlined("h2")


def test_the_overview_marks_the_best_and_what_is_like_it(report):
    table = tables.overview(report)
    assert table.groups == [("Violation rate, %", 2), ("Accuracy, %", 1), ("Perplexity", 2)]
    assert table.columns == ["rude · non-rude ↓", "plain · non-rude ↓", "MMLU ↑", "novels ↓", "letters ↓"]
    first = {name: cells[0] for name, cells in table.rows.items()}
    assert first["base"] == measures.Cell("21.4", "± 0.4", "18.9 to 23.9", 1000, 4, "")
    assert {name: cell.mark for name, cell in first.items() if cell.mark} == {
        "filtration": "alike", "constrained": "alike", "constrained-adaptive": "best"
    }  # fmt: skip


def test_differences_say_whether_they_are_significant(report):
    found = tables.differences(report)["Violation rate, %: rude · non-rude ↓"]
    assert [(one.method, one.p_value.text, one.verdict) for one in found] == [
        ("base", "< 0.001", "differs"),
        ("sft", "< 0.001", "differs"),
        ("filtration", "0.620", "no difference shown"),
        ("constrained", "0.620", "no difference shown"),
    ]


def test_without_a_p_value_the_interval_decides(report):
    found = tables.differences(report)["Classification: ROC-AUC ↑"]
    assert [(one.method, one.cell.interval, one.p_value.text, one.verdict) for one in found] == [
        ("sft", "−0.124 to −0.044", "–", "differs (interval)"),
        ("filtration", "−0.070 to +0.010", "–", "no difference shown (interval)"),
        ("constrained", "−0.046 to +0.034", "–", "no difference shown (interval)"),
    ]
    marks = {name: cells[0].mark for name, cells in tables.classification(report).rows.items() if cells[0].mark}
    assert marks == {"filtration": "alike", "constrained": "alike", "constrained-adaptive": "best"}


def test_without_p_value_and_interval_nothing_is_claimed(report):
    bare = data.Estimate(0.01, None, None, n=3)
    untested = replace(report.comparisons[0], difference=bare, adjusted_p_value=None)
    ((one,),) = tables.differences(replace(report, comparisons=[untested])).values()
    assert (one.cell.text, one.p_value.text, one.verdict) == ("+1.0", "–", "not tested")


def test_perplexities_differ_by_nats_a_token(report):
    found = tables.differences(report)["Log perplexity, nats per token: novels ↓"]
    assert [(one.method, one.cell.text, one.cell.interval, one.verdict) for one in found] == [
        ("base", "+0.035", "+0.025 to +0.045", "differs"),
        ("sft", "+0.007", "−0.003 to +0.017", "no difference shown"),
        ("filtration", "+0.016", "+0.006 to +0.026", "differs"),
    ]


def test_the_page_says_how_far_its_tests_reach(page):
    assert any(tables.DIFFERENCES_IN_WORDS in found for found, _ in page.texts)


def test_the_win_matrix_reads_row_over_column(report):
    table = tables.win_matrix(report)
    assert [[cell.text for cell in cells] for cells in table.rows.values()] == [
        ["·", "43.0", "17.1"],
        ["57.0", "·", "17.9"],
    ]


def test_classification_stands_beside_the_violation_of_generation(report):
    table = tables.classification(report)
    assert table.columns == ["ROC-AUC ↑", "rude · non-rude ↓"]
    assert [cell.text for cell in table.rows["sft"]] == ["0.658", "14.2"]


def test_the_summary_is_made_from_the_figures(report):
    assert findings(report) == [
        "constrained-adaptive has the lowest violation rate: 5.8% (95% interval 3.3 to 8.3%, n\u00a0=\u00a01,000) of "
        "its completions of rude violate non-rude, against 21.4% for base.",
        "Significantly different from constrained-adaptive, after Holm’s correction: base and sft.",
        "No significant difference from constrained-adaptive was found for filtration and constrained.",
        "constrained-adaptive is on the Pareto front of violation rate and perplexity on novels.",
        "Figures are missing for rl: not every run is complete.",
        "Training gave 6 warnings (constrained-adaptive); the first: round 1, rude: violations rose.",
    ]


def test_all_methods_of_the_lowest_rate_are_named(report):
    best = report.methods["constrained-adaptive"]
    assert findings(replace(report, methods=report.methods | {"constrained": best}))[0] == (
        "constrained and constrained-adaptive have the lowest violation rate: 5.8% of their completions of rude "
        "violate non-rude, against 21.4% for base."
    )


def test_a_training_run_warns_in_its_summary_too(tmp_path):
    run = reading.read_report(report_folder.make_run(tmp_path / "run"))
    assert findings(run)[-1] == "Training gave 3 warnings; the first: round 1, rude: violations rose."


def with_target(folder, value, target=0.1, **more):
    """Appends to a run's metrics what it writes at its end where a regulariser has a target, of 10%."""
    record = {"violation_reached": value, "violation_reached_low": value - 0.02, "violation_reached_high": value + 0.03}
    row = {f"rude/{key}": number for key, number in (record | {"target": target, **more}).items()}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, **row}) + "\n")


def test_the_summary_of_a_run_begins_with_its_target(tmp_path):
    folder = report_folder.make_run(tmp_path / "run")
    with_target(folder, 0.12)  # of an earlier end of the run
    with_target(folder, 0.07)
    assert findings(reading.read_report(folder))[0] == (
        "The target of rude, at most 10% violations, is met: 7.0% (95% interval 5.0% to 10.0%) of the trained "
        "model’s rollouts."
    )


def test_a_mean_score_is_no_rate(tmp_path):
    folder = report_folder.make_run(tmp_path / "run")
    with_target(folder, 0.18, target=0.2, mean_score_reached=0.82)
    assert findings(reading.read_report(folder))[0] == (
        "The target of rude, a mean score of at least 0.8, is met: 0.820 (95% interval 0.790 to 0.840) of the trained "
        "model’s rollouts."
    )


def test_a_bound_is_not_rounded_to_its_target(tmp_path):
    folder = report_folder.make_run(tmp_path / "run")
    with_target(folder, 0.035, target=0.05, violation_bound=0.0500114)
    assert "at most 5% violations, is missed" in findings(reading.read_report(folder))[0]
    assert "with the asked confidence at most 5.002%)" in findings(reading.read_report(folder))[0]
    small = report_folder.make_run(tmp_path / "small")
    with_target(small, 0.0002, target=0.0004)
    assert "at most 0.04% violations, is met: 0.02% " in findings(reading.read_report(small))[0]


def test_the_summary_of_a_comparison_begins_with_the_target_and_its_cost(tmp_path):
    folder = report_folder.make_folder(tmp_path / "comparison")
    for seed, value in ((0, 0.07), (1, 0.12)):
        with_target(folder / "constrained-adaptive" / f"seed-{seed}", value)
    report = reading.read_report(folder)
    assert findings(report)[0] == (
        "The target of rude, at most 10% violations, is met by 1 of 2 seeds: 7.0% (95% interval 5.0% to 10.0%) and "
        "12.0% (95% interval 10.0% to 15.0%) of "
        "constrained-adaptive’s rollouts, at perplexity 73.4 on novels, against 73.9 for sft."
    )
    figure = draw_plots(report)["tradeoff"]
    for ax in figure.axes:
        assert [line.get_xdata() for line in ax.get_lines() if line.get_linestyle() == ":"] == [[0.1, 0.1]]
    assert "target of a regulariser" in [text.get_text() for text in figure.legends[0].get_texts()]


def judged(report: Report, **counts: int) -> list[str]:
    """What the summary says where the only match has these counts."""
    matrix = {
        one: {other: replace(match, **counts) for other, match in row.items()}
        for one, row in report.win_rate.matrix.items()
    }
    said = findings(replace(report, win_rate=replace(report.win_rate, matrix=matrix)))
    return [sentence for sentence in said if "judge" in sentence]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"wins": 0, "ties": 100, "losses": 0, "contradictions": 2, "identical": 4}, ["calls 96 of 96 pairs a tie"]),
        ({"wins": 3, "ties": 94, "losses": 3, "contradictions": 80, "identical": 4}, ["position bias: in 80 of 96"]),
        ({"wins": 0, "ties": 10, "losses": 0, "contradictions": 0, "identical": 10}, []),  # it was asked nothing
        ({"wins": 30, "ties": 40, "losses": 30, "contradictions": 20, "identical": 4}, []),
    ],
)
def test_a_judge_that_tells_nothing_apart_is_named_in_the_summary(report, counts, said):
    found = judged(report, **counts)
    assert [part in sentence for sentence, part in zip(found, said, strict=True)] == [True] * len(said)


def test_a_judge_that_failed_is_named_in_the_summary(report):
    failed = replace(report, win_rate=None, judge_failed="judge tiny: 20 of 100 verdicts are missing")
    said = "There are no win rates, because the judge failed: judge tiny: 20 of 100 verdicts are missing."
    assert said in findings(failed)


def test_the_contents_call_the_sections_as_their_headings_do(page, tmp_path):
    for one in (page, Page(rendered(reading.read_report(report_folder.make_run(tmp_path / "run"))))):
        links = [text for text, above in one.texts if "nav" in [tag for tag, _ in above] and above[-1][0] == "a"]
        headings = [text for text, above in one.texts if above and above[-1][0] == "h2"]
        assert links == headings


def test_every_interval_has_its_n_beside_it(page):
    places = [(text, above[-1][1].get("class")) for text, above in page.texts if above and text.strip()]
    intervals = [i for i, (text, kind) in enumerate(places) if kind == "interval" and " to " in text]
    assert intervals
    assert all(places[i + 1][0].startswith("n = ") for i in intervals)
    cells = [text for text, above in page.texts if above and above[-1][0] == "td" and " to " in text]
    assert all(", n = " in text for text in cells)


def test_a_name_is_spelt_alike_in_tables_plots_and_sentences(report):
    def named(part):  # a prompt set, held-out text and task under other names
        return {"novels": "my_novels", "rude": "rude_posts"}.get(part, part)

    methods = {
        name: replace(
            method,
            figures=replace(
                method.figures,
                violation={named(on): found for on, found in method.figures.violation.items()},
                perplexity={named(on): found for on, found in method.figures.perplexity.items()},
            ),
        )
        for name, method in report.methods.items()
    }
    renamed = replace(report, methods=methods, main=data.Main("rude_posts", "non-rude", "my_novels"), comparisons=[])
    assert tables.overview(renamed).columns[:1] == ["rude_posts · non-rude ↓"]
    assert "my_novels ↓" in tables.overview(renamed).columns
    plots = draw_plots(renamed)
    axes = plots["tradeoff"].axes + plots["other_tradeoffs"].axes
    assert any("my_novels" in ax.get_ylabel() for ax in axes)
    assert any("MMLU" in ax.get_ylabel() for ax in axes)
    assert "rude_posts violate" in findings(renamed)[0]
    assert "perplexity on my_novels" in " ".join(findings(renamed))


def test_equal_methods_crown_no_winner(report):
    base = report.methods["base"]
    violation = measures.main_violation(report.main)
    (alike,) = [one for one in report.comparisons if violation.is_of(one) and one.method == "constrained"]
    others = [replace(alike, method=name, reference="base") for name in ("sft", "filtration")]
    found = "21.4% (95% interval 18.9 to 23.9%, n\u00a0=\u00a01,000) of base’s completions of rude violate non-rude"

    equal = replace(report, methods=dict.fromkeys(("base", "sft"), base), comparisons=others[:1])
    assert findings(equal)[0] == f"No difference in violation rate is shown among base and sft: {found}."
    assert "lowest" not in " ".join(findings(equal))
    assert {cell.mark for cells in tables.overview(equal).rows.values() for cell in cells} == {""}

    alone = replace(report, methods={"base": base}, comparisons=[])
    assert findings(alone)[:1] == [f"{found}; there is no other method to compare it with."]

    worse = report.methods["constrained-adaptive"]
    two = replace(report, methods={"base": worse, "sft": worse, "filtration": base}, comparisons=others)
    assert [cells[0].mark for cells in tables.overview(two).rows.values()] == ["best", "best", "alike"]


def test_samples_are_picked_evenly():
    assert evenly_spaced(range(100), 4) == [0, 33, 66, 99]
    assert evenly_spaced("ab", 4) == ["a", "b"]
    many = [Completion("sft", "0", "set", index, 0, "p", "c") for index in range(100)]
    shown, more = texts.samples(Report("tiny", completions=many))
    assert (len(shown), len(more)) == (texts.SHOWN, texts.MORE)
    assert len({one.number for one in (*shown, *more)}) == texts.SHOWN + texts.MORE


def test_a_method_without_a_completion_says_so():
    rows = [Completion("base", "0", "set", 0, 0, "p", "c"), Completion("sft", "0", "set", 1, 0, "p", "c")]
    shown, _ = texts.samples(Report("tiny", completions=rows))
    assert [[answer.text for answer in one.answers] for one in shown] == [["c", None], [None, "c"]]


@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_screen_readers_find_their_way(page, kind, tmp_path):
    if kind == "run":
        page = Page(rendered(reading.read_report(report_folder.make_run(tmp_path / "run"))))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    ids = [at["id"] for _, at in page.elements if "id" in at]
    assert len(ids) == len(set(ids))
    referred = {
        name
        for _, at in page.elements
        for key in ("aria-controls", "aria-labelledby")
        for name in (at.get(key) or "").split()
    }
    assert referred <= set(ids)
    assert {at["href"][1:] for at in page.all("a")} <= set(ids)
    assert all("scope" in at for at in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert {at["tabindex"] for _, at in page.elements if "tabindex" in at} <= {"0", "-1"}
    assert page.all("html") == [{"lang": "en"}]


def test_both_themes_have_contrast(page):
    light, dark, *_ = (
        dict(re.findall(r"--(\w+): (#\w+)", block)) for block in page.inlined("style").split(":root {")[1:]
    )
    for theme in (light, light | dark):
        for ground in ("paper", "shade"):
            assert all(contrast(theme[ink], theme[ground]) >= 4.5 for ink in ("ink", "muted", "accent", "alarm"))
        assert all(contrast(theme["ink"], theme[end]) >= 4.5 for end in ("violates", "complies"))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
