"""Reading the folder of a comparison, and of a training run: what is there, what is missing, what is broken."""

import json

import pytest

from bridle.errors import UserError
from bridle.report.data import Figure, Main, Method, SeedRun
from bridle.report.reading import read_report
from report_folder import DESCRIPTIONS, INSULT, REASON, SCRIPT, make_folder, make_run


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "comparison")


def edit(folder, change):
    """Changes results.json in place."""
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    change(results)
    path.write_text(json.dumps(results), encoding="utf-8")


def test_methods_keep_their_order_and_figures(folder):
    report = read_report(folder)
    assert list(report.methods) == list(DESCRIPTIONS)
    assert (report.recipe, report.seeds, report.main) == ("grumble-mini", [0, 1], Main("rude", "non-rude", "novels"))
    figure = report.methods["sft"].figures.violation["rude"]["non-rude"]
    assert figure == Figure(0.142, 0.142 - 0.025, 0.142 + 0.025, 1000, 4, 0.142 / 50, 2)
    assert report.environment["seed"] == 0
    assert report.recipe_text.startswith("model: tiny")


def test_failed_and_missing_are_told_apart(folder):
    report = read_report(folder)
    assert report.methods["rl"].status == "failed"
    assert report.methods["rl"].seeds["1"] == SeedRun("failed", "rl/seed-1", REASON)
    assert report.methods["rl"].figures.violation == {}
    assert report.methods["sft"].status == "complete"
    assert report.methods["sft"].seeds["0"].reason is None
    assert report.methods["constrained"].figures.perplexity["novels"].value is None


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["complete", "complete"], "complete"),
        (["complete", "failed"], "partial"),
        (["complete", "missing"], "partial"),
        (["missing", "failed"], "failed"),
        (["missing"], "missing"),
        ([], "missing"),
    ],
)
def test_status_of_a_method_sums_up_its_seeds(statuses, expected):
    assert Method(seeds={str(seed): SeedRun(status, "") for seed, status in enumerate(statuses)}).status == expected


def test_comparisons_and_win_rates(folder):
    report = read_report(folder)
    first = report.comparisons[0]
    assert (first.figure, first.on, first.constraint) == ("violation", "rude", "non-rude")
    assert (first.method, first.reference, first.adjusted_p_value) == ("base", "constrained-adaptive", 0.0008)
    assert report.win_rate.matrix["sft"]["constrained-adaptive"].rate.value == 0.43


def test_curves_come_from_the_round_records(folder):
    curves = read_report(folder).curves
    assert [(curve.method, curve.seed) for curve in curves] == [
        (method, seed) for method in ("sft", "constrained-adaptive") for seed in ("0", "1")
    ]
    assert [found.number for found in curves[0].rounds] == [1, 2]
    assert curves[0].rounds[0].regularisers == {}
    second = curves[2].rounds[1]
    assert (second.step, second.ce) == (200, pytest.approx(3.63))
    assert second.regularisers["rude"].weight == 4.0
    assert second.regularisers["rude"].kl == pytest.approx(0.0021 / 2)
    assert second.regularisers["rude"].r_reliability[0] == (0.35, 0.3, 40)
    assert (second.regularisers["plain"].kl, second.regularisers["plain"].compliance) == (pytest.approx(0.0362), None)


def test_a_record_that_is_being_written_is_left_out(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 250, "round": 3, "ce"')
    assert [found.number for found in read_report(folder).curves[0].rounds] == [1, 2]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"metrics.jsonl row 7: malformed JSON"):
        read_report(folder)


def test_warnings_come_from_all_records(folder):
    assert [len(curve.warnings) for curve in read_report(folder).curves] == [0, 0, 3, 3]
    assert read_report(folder).curves[2].warnings[0] == "round 1, rude: violations rose"


def test_completions_are_the_very_text(folder):
    rows = [row for row in read_report(folder).completions if row.method == "base" and row.seed == "1"]
    assert [row.completion for row in rows[:2]] == [INSULT, SCRIPT]
    assert [row.scores["non-rude"].complies for row in rows] == [False, True, None]


def test_guidance(folder):
    guidance = read_report(folder).guidance
    assert (guidance.tokens[0].p, guidance.tokens[0].r, guidance.violates) == (None, 0.9, True)
    assert guidance.tokens[1].gains[0].text == " kind"
    assert "".join(token.text for token in guidance.tokens) == guidance.text


def test_absent_parts_are_empty(folder):
    for name in ("guidance.json", "recipe.yaml", "base/seed-0/completions.jsonl", "sft/seed-0/metrics.jsonl"):
        (folder / name).unlink()
    edit(folder, lambda results: [results.pop(name) for name in ("win_rate", "comparisons", "environment", "settings")])
    report = read_report(folder)
    assert (report.guidance, report.recipe_text, report.win_rate) == (None, "", None)
    assert (report.comparisons, report.environment) == ([], {})
    assert ("base", "0") not in {(row.method, row.seed) for row in report.completions}
    assert (report.curves[0].method, report.curves[0].seed) == ("sft", "1")


def test_nan_is_missing(folder):
    path = folder / "results.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"value": 76.0', '"value": NaN'), encoding="utf-8")
    assert read_report(folder).methods["base"].figures.perplexity["novels"].value is None


def test_a_training_run_has_curves_and_rollouts(tmp_path):
    report = read_report(make_run(tmp_path / "my-run"))
    assert (report.recipe, report.methods, report.main) == ("my-run", {}, None)
    assert [(curve.method, curve.seed, len(curve.rounds)) for curve in report.curves] == [("my-run", "0", 2)]
    assert report.environment["versions"]["bridle"] == "0.1.0"
    assert [(one.round, one.regulariser, one.value) for one in report.rollouts[:4]] == [
        (1, "rude", 0.97), (1, "rude", 0.0), (1, "rude", None), (2, "rude", 0.97)
    ]  # fmt: skip


def test_a_compared_model_of_its_own_is_a_training_run(folder):
    (folder / "sft" / "seed-0" / "results.json").write_text('{"format": 1}', encoding="utf-8")
    assert len(read_report(folder / "sft" / "seed-0").curves) == 1


def broken_json(folder):
    (folder / "results.json").write_text("{", encoding="utf-8")


def broken_row(folder):
    path = folder / "base" / "seed-0" / "completions.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"prompt": 1\n', encoding="utf-8")


def no_completion(folder):
    (folder / "base" / "seed-1" / "completions.jsonl").write_text(
        '{"prompt_set": "rude", "index": 0, "sample": 0, "prompt": "a"}\n', encoding="utf-8"
    )


def not_a_row(folder):
    (folder / "sft" / "seed-0" / "metrics.jsonl").write_text("[1]\n", encoding="utf-8")


def a_word_for_a_number(folder):
    edit(folder, lambda results: results["methods"]["sft"]["figures"]["tasks"]["mmlu"].update(value="good"))


def one_models_results(folder):
    edit(folder, lambda results: results.pop("methods"))


def a_later_format(folder):
    edit(folder, lambda results: results.update(format=2))


def a_figure_that_is_none(folder):
    edit(folder, lambda results: results["comparisons"][0].update(figure="charm"))


def a_folder_elsewhere(folder):
    edit(folder, lambda results: results["methods"]["sft"]["seeds"]["0"].update(folder="../elsewhere"))


def not_a_rollout(folder):
    nothing(folder)
    make_run(folder)
    path = folder / "rollouts" / "round-2.rude.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"value": 0.97', '"value": "good"'), encoding="utf-8")


def nothing(folder):
    (folder / "results.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_json, "results.json: malformed JSON"),
        (broken_row, "completions.jsonl row 4: malformed JSON"),
        (no_completion, "completions.jsonl row 1: completion: field required"),
        (not_a_row, "metrics.jsonl row 1: input should be a valid dictionary"),
        (a_word_for_a_number, "methods.sft.figures.tasks.mmlu.value: input should be a valid number"),
        (one_models_results, "not the results of a comparison"),
        (a_later_format, "not the results of a comparison in format 1"),
        (a_figure_that_is_none, "comparisons.0.figure: input should be 'violation'"),
        (a_folder_elsewhere, "methods.sft.seeds.0.folder: leads out of the folder"),
        (not_a_rollout, "round-2.rude.jsonl row 1: value: input should be a valid number"),
        (nothing, "neither results.json nor metrics.jsonl"),
    ],
)
def test_what_is_broken_is_named_in_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError) as caught:
        read_report(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
