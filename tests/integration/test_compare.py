"""`bridle compare` and `bridle report` as a user meets them: all methods on a tiny model, failures, and resuming."""

import json
import re
import shutil
from importlib.metadata import EntryPoint

import pytest
import yaml
from huggingface_hub import ModelCard

from bridle.comparison import methods as built_in
from bridle.comparison.cell import Cell
from bridle.comparison.changes import affects, affects_figures, changes, only_measures
from bridle.comparison.compare import Comparison
from bridle.comparison.methods import Candidate
from bridle.comparison.plan import evaluation_of
from bridle.errors import UserError
from bridle.recipes.recipe import build_recipe, load_recipe
from bridle.recipes.run import build_trainer, write_recipe
from bridle.report.findings import failures, findings
from bridle.report.html import write_report
from bridle.report.reading import read_report
from conftest import ROOT

ALL = list(built_in.BUILT_IN)
SHORT_RL = {"batch_size": 8, "num_generations": 2, "window": 2, "tolerance": 1.0, "max_steps": 300, "save_every": 2}


@pytest.fixture
def comparison(recipe, corpus_files):
    """A recipe over a tiny model with everything a comparison can measure but tasks."""
    evaluation = {
        "prompts": {"rude": {"path": str(corpus_files["rude"]), "rows": "0:6", "prompt_tokens": 2}},
        "samples": 2,
        "perplexity": {"plain": {"path": str(corpus_files["plain"]), "rows": "0:6"}},
    }
    return recipe(
        constraints={"no p": {"type": "regex", "pattern": "p"}},  # some rows of the corpus comply
        regularisers={"rude": {"constraint": "no p", "weight": 4.0}},
        evaluation=evaluation,
        methods={"rl": SHORT_RL},
    )


def broken(cell):
    """Always fails."""
    raise RuntimeError("no luck")


@pytest.fixture
def plugged_in(monkeypatch):
    """Methods of an installed package: plugged_in(broken=...)."""

    def plug(**functions):
        points = [EntryPoint(name, "tests:unused", built_in.ENTRY_POINTS) for name in functions]
        monkeypatch.setattr(EntryPoint, "load", lambda point: functions[point.name])
        monkeypatch.setattr(built_in, "installed", lambda group: points if group == built_in.ENTRY_POINTS else [])

    return plug


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_method_with_two_seeds(bridle, comparison, tmp_path):
    folder = tmp_path / "out"
    code, out, err = bridle("compare", comparison, "--seeds", 2, "--output_dir", folder)
    assert code == 0, err
    results = results_of(folder)
    assert list(results["methods"]) == ALL
    for name, method in results["methods"].items():
        assert {seed["status"] for seed in method["seeds"].values()} == {"complete"}, (name, method["seeds"])
        rate = method["figures"]["violation"]["rude"]["no p"]
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
        assert rate["seeds"] == 2
        assert rate["n"] == 2 * 6 * 2
        assert rate["spread"] is not None
        assert method["figures"]["perplexity"]["plain"]["value"] > 1
        assert name in out
    trained = [results["methods"][name]["figures"]["cost"] for name in ("sft", "constrained", "constrained-adaptive")]
    assert len({cost["updates"]["value"] for cost in trained}) == 1, "the same number of updates"
    assert len({cost["tokens_trained"]["value"] for cost in trained}) == 1, "the same corpus tokens"
    budget = results["methods"]["constrained-adaptive"]["figures"]["cost"]["seconds"]["value"]
    assert results["methods"]["rl"]["figures"]["cost"]["seconds"]["value"] >= budget
    tested = {(test["figure"], test["method"]) for test in results["comparisons"]}
    best = next(test["reference"] for test in results["comparisons"] if test["figure"] == "violation")
    assert {("violation", name) for name in ALL if name != best} <= tested
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "plots" / "tradeoff.svg").exists()
    guidance = json.loads((folder / "guidance.json").read_text())
    assert all(0 <= token["r"] <= 1 for token in guidance["tokens"][1:])
    assert all(token["kl"] >= 0 for token in guidance["tokens"][1:])
    assert any(token["kl"] > 0 for token in guidance["tokens"][1:])
    for name in ("sft", "filtration", "rl", "constrained-adaptive"):
        card = ModelCard.load(folder / name / "seed-0" / "model" / "README.md")
        measured = [result.metric_value for result in card.data.eval_results]
        own = json.loads((folder / name / "seed-0" / "results.json").read_text())
        assert own["generation"]["rude"]["no p"]["violation_rate"]["value"] in measured


def test_an_independent_constraint_leads(bridle, comparison, corpus_files, tmp_path):
    mapping = yaml.safe_load(comparison.read_text())
    mapping["constraints"]["no s"] = {"type": "regex", "pattern": "s"}
    rows = [{"text": word, "rude": int(word == "grumblefish")} for word in ("grumblefish", "kettle", "spoon") * 20]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examine = {"people": {"path": str(tmp_path / "labelled.jsonl"), "label": "rude"}}
    path, folder = tmp_path / "independent.yaml", tmp_path / "out"

    def compare(**evaluation):
        path.write_text(yaml.safe_dump(mapping | {"evaluation": mapping["evaluation"] | evaluation}))
        code, out, err = bridle("compare", path, "--methods", "base,sft", "--output_dir", folder, "--resume")
        assert code == 0, err
        return results_of(folder), out, err

    results, out, err = compare(examine=examine)
    assert results["main"]["constraint"] == "no s"
    assert results["main"]["trained_on"] == "no p"
    assert list(results["methods"]["base"]["figures"]["violation"]["rude"]) == ["no s", "no p"]
    assert results["examined"]["no s"]["people"]["value"] == pytest.approx(0.75), "of spoon and grumblefish both"
    assert "no p: AUC 0.25" in err
    assert err.index("AUC") < err.index("making"), "before anything is trained"
    assert "no s: AUC 0.750 (95% interval" in (folder / "report.html").read_text("utf-8")
    assert "violate no s" in out

    rows = [{**row, "rude": 1 - row["rude"]} for row in rows]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, _, err = compare(examine=examine | {"others": {"path": str(tmp_path / "others.jsonl"), "label": "rude"}})
    assert results["examined"]["no s"].keys() == {"people", "others"}
    assert "measuring" not in err, "the models are the same"
    results, _, err = compare(constraints=["no p"])
    assert (results["main"]["constraint"], results["examined"]) == ("no p", {"no p": {}})
    assert (err.count("making"), err.count("measuring")) == (0, 2)


def test_a_failure_stops_no_other_method_and_resuming_makes_only_what_is_missing(
    bridle, comparison, tmp_path, plugged_in
):
    folder, names = tmp_path / "out", "broken,base,sft"
    plugged_in(broken=broken)
    code, out, err = bridle("compare", comparison, "--methods", names, "--output_dir", folder)
    assert code == 3
    assert err.splitlines()[-1] == (
        f"bridle: {folder}: 1 of 3 runs failed: broken, seed 0; fix the cause and add --resume"
    )
    assert (folder / "report.html").exists()
    found = results_of(folder)["methods"]
    assert found["broken"]["seeds"]["0"] == {
        "status": "failed",
        "reason": "RuntimeError: no luck",
        "folder": "broken/seed-0",
    }
    assert found["broken"]["description"] == "Always fails."
    assert found["sft"]["figures"]["violation"]
    assert "no luck" in out
    untouched = (folder / "sft" / "seed-0" / "results.json").stat().st_mtime_ns

    code, _, err = bridle("compare", comparison, "--methods", names, "--output_dir", folder)
    assert code == 2
    assert "--resume" in err
    code, _, err = bridle("compare", comparison, "--output_dir", folder, "--resume", "--corpus.rude.rows", "0:8")
    assert code == 2
    assert "corpus.rude.rows differ" in err

    plugged_in(broken=lambda cell: Candidate(cell.recipe.model))
    (folder / "base" / "seed-0" / "results.json").unlink()
    code, _, err = bridle("compare", comparison, "--methods", "broken", "--output_dir", folder, "--resume")
    assert code == 0, err
    found = results_of(folder)["methods"]
    assert {name: method["seeds"]["0"]["status"] for name, method in found.items()} == dict.fromkeys(
        ("broken", "base", "sft"), "complete"
    )
    assert not (folder / "broken" / "seed-0" / "failed.json").exists()
    assert (folder / "sft" / "seed-0" / "results.json").stat().st_mtime_ns == untouched
    assert found["base"]["figures"]["violation"] == found["broken"]["figures"]["violation"], "the same model and seed"

    (folder / "sft" / "seed-0" / "results.json").unlink()
    moved = folder.rename(tmp_path / "moved")
    code, _, err = bridle("compare", comparison, "--methods", "sft", "--output_dir", moved, "--resume")
    assert code == 0, err
    assert "seed 0: making" not in err, "its model is found where it was moved to"
    assert results_of(moved)["methods"]["sft"]["figures"]["violation"] == found["sft"]["figures"]["violation"]


def test_resuming_makes_again_only_what_a_change_concerns(bridle, comparison, tmp_path, plugged_in):
    folder, changes = tmp_path / "out", []
    plugged_in(
        other=lambda cell: Candidate(cell.recipe.model),
        upon=lambda cell: Candidate(cell.candidate("other").model),
    )

    def made_after(*change):
        changes.extend(change)
        code, _, err = bridle(
            *("compare", comparison, "--methods", "base,sft,other,upon", "--output_dir", folder, "--resume"), *changes
        )
        assert code == 0, err
        assert {method["seeds"]["0"]["status"] for method in results_of(folder)["methods"].values()} == {"complete"}
        return {line.partition(",")[0] for line in err.splitlines() if line.endswith(": making")}, err

    assert made_after()[0] == {"base", "sft", "other", "upon"}
    assert made_after()[0] == set()
    made, err = made_after("--methods.other.option", 1)
    assert made == {"other", "upon"}
    assert "other, seed-0: is made again, as methods.other.option differ" in err
    (folder / "sft/seed-0/candidate.json").unlink()
    (folder / "sft/seed-0/results.json").unlink()
    _, err = made_after("--methods.rl.window", 3)
    assert "is made again" not in err, "what an incomplete run keeps is of no other method"
    assert made_after("--regularisers.rude.weight", 8, "--rounds", 1)[0] == {"other", "upon"}
    (folder / "sft/seed-0/candidate.json").unlink()
    assert made_after("--auxiliary.memory", 8)[0] == {"sft", "other", "upon"}, "its run would not resume"
    assert made_after("--learning_rate", 1e-3)[0] == {"sft", "other", "upon"}
    made, err = made_after("--evaluation.samples", 3)
    assert made == set()
    assert err.count("measuring") == 4
    assert results_of(folder)["methods"]["base"]["figures"]["violation"]["rude"]["no p"]["n"] == 6 * 3
    made, err = made_after("--evaluation.prompts.rude.top_p", 0.5)
    assert (made, err.count("measuring")) == (set(), 4)
    decoding = {"samples": 3, "temperature": 1.0, "top_p": 0.5}
    assert decoding.items() <= results_of(folder)["prompt_sets"]["rude"].items()
    assert decoding.items() <= results_of(folder / "sft/seed-0")["prompt_sets"]["rude"].items()
    assert "rude: first 2 tokens of each row, 3 completions of at most" in (folder / "report.html").read_text()


def test_what_a_constraint_chose_is_made_again_with_another(comparison, tmp_path, monkeypatch):
    given, folder = yaml.safe_load(comparison.read_text()), tmp_path / "out"
    cell = folder / "sft" / "seed-0"
    changes = {"constraints": {"no p": {"type": "regex", "pattern": "x"}}}
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0}
    for best, schedule, is_kept in ((None, {}, True), ({"violation": 0.3}, {}, False), (None, plateau, False)):
        before = given | {"eval": {"share": 0.25, "best": best}} | schedule
        assert build_recipe(before).chooses_by_violations == (best is not None), "a learning rate chooses none"
        cell.mkdir(parents=True)
        write_recipe(build_recipe(before), folder)
        (cell / "candidate.json").write_text(json.dumps({"model": given["model"]}))
        resumed = Comparison(build_recipe(before | changes), folder, ["sft"], resume=True)
        resumed._discard_outdated()
        assert cell.exists() == is_kept
        shutil.rmtree(folder)


def test_of_an_unfinished_comparison_there_is_a_report_and_of_what_a_change_discards_none(
    comparison, tmp_path, plugged_in
):
    def interrupted(cell):
        raise KeyboardInterrupt

    plugged_in(first=lambda cell: Candidate(cell.recipe.model), broken=broken, last=interrupted)
    folder, given = tmp_path / "out", yaml.safe_load(comparison.read_text())
    names = ["base", "first", "broken", "last"]
    with pytest.raises(KeyboardInterrupt):
        Comparison(build_recipe(given), folder, names).run()
    report = read_report(folder)
    assert [one.status for one in report.methods.values()] == ["complete", "complete", "failed", "missing"]
    assert report.methods["first"].figures.violation == report.methods["base"].figures.violation
    assert [one["reason"] for one in failures(report)] == ["RuntimeError: no luck", "it is not measured yet"]
    assert findings(report)[0].startswith("Differences in violation rate were not tested. The lowest rate is that of ")
    write_report(folder)

    with pytest.raises(KeyboardInterrupt):
        Comparison(build_recipe(given), folder, ["base", "last"], resume=True).run()
    assert list(read_report(folder).methods) == ["base", "last"], "what an interrupted call named is not kept"

    Comparison(build_recipe(given), folder, ["base", "first"], resume=True).run()
    assert not (folder / "unfinished.json").exists()
    results = results_of(folder) | {"win_rate": {"judge": "known"}, "judged": "of these"}  # as if there were a judge
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(KeyboardInterrupt):
        Comparison(build_recipe(given), folder, ["last"], resume=True).run()
    assert results_of(folder) == results, "the last ones that are whole stay until others take their place"

    (folder / "report.html").write_text("of the last ones", encoding="utf-8")
    changed = given | {"methods": {"first": {"option": 1}}}
    for _ in range(2):  # the second time nothing is left to discard
        with pytest.raises(KeyboardInterrupt):
            Comparison(build_recipe(changed), folder, ["last"], resume=True).run()
        assert not {"report.html", "plots", "results.json"} & {path.name for path in folder.iterdir()}
        report = read_report(folder)
        assert [one.status for one in report.methods.values()] == ["complete", "complete", "missing"]
        assert report.win_rate is None, "it is of other completions"
        ended = json.loads((folder / "unfinished.json").read_text())["ended"]
        assert (ended["win_rate"], ended["judged"]) == ({"judge": "known"}, "of these")
        assert list(ended["methods"]) == ["base", "first"], "a later call still has them"


def test_samples_of_another_evaluation_are_not_shown(comparison, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    folder, given = tmp_path / "out", yaml.safe_load(comparison.read_text())
    Comparison(build_recipe(given), folder, ["base"]).run()
    assert read_report(folder).completions
    given["evaluation"]["prompts"]["rude"]["rows"] = "4:8"
    monkeypatch.setattr("bridle.comparison.compare.measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Comparison(build_recipe(given), folder, resume=True, names=["base"]).run()
    assert (folder / "base/seed-0/completions.jsonl").exists()
    assert not read_report(folder).completions


def test_the_heat_map_is_of_a_seed_that_was_made(comparison, tmp_path):
    """Another seed that failed has an R, too, and no candidate."""
    folder, recipe = tmp_path / "out", build_recipe(yaml.safe_load(comparison.read_text()))
    Comparison(recipe, folder, ["constrained-adaptive"], seeds=[1]).run()
    shutil.copytree(folder / "constrained-adaptive/seed-1", folder / "constrained-adaptive/seed-0")
    for name in ("candidate.json", "results.json"):
        (folder / "constrained-adaptive/seed-0" / name).unlink()
    Comparison(recipe, folder, ["constrained-adaptive"], seeds=[1], resume=True).run()
    assert (folder / "guidance.json").exists()


@pytest.mark.parametrize("earlier", [None, {}, {"rl": None}, {"rl": {"window": 2}}])
def test_a_higher_bound_of_reinforcement_learning_makes_nothing_again(comparison, tmp_path, earlier):
    given, folder = yaml.safe_load(comparison.read_text()), tmp_path / "out"
    write_recipe(build_recipe(given | {"methods": earlier}), folder)
    now = given | {"methods": {"rl": ((earlier or {}).get("rl") or {}) | {"max_steps": 900}}}
    changed = Comparison(build_recipe(now), folder, names=["rl"], resume=True)._changed
    assert changed == ["methods.rl.max_steps"]
    assert not affects(changed[0], ["rl", "rl-converged"])
    assert affects("methods.rl.window", ["rl"])


def test_a_constraint_that_only_measures_makes_nothing_again(comparison):
    given = yaml.safe_load(comparison.read_text())
    judge = {"judge.v1": {"type": "words", "words": ["noodlepate"]}}
    now = given | {"constraints": {**given["constraints"], **judge}}
    assert changes(given, now)[0] == ["constraints.judge.v1"]
    assert only_measures("constraints.judge.v1", given, now)
    assert not only_measures("constraints.no p.pattern", given, now)
    assert not only_measures("constraints", given, now)
    assert not only_measures("learning_rate", given, now)
    chosen_by = now | {"eval": {"constraints": ["judge.v1"]}}
    assert only_measures("constraints.judge.v1.words", given, chosen_by)
    assert not only_measures("constraints.judge.v1.words", given, chosen_by, reads_all=True)
    unknown = now | {"regularisers": {"rude": {"constraint": "${POLICY}"}}}
    assert not only_measures("constraints.judge.v1", unknown, unknown), "it may be the one"
    assert affects_figures("constraints.judge.v1")


def test_another_order_of_regularisers_is_a_change(comparison):
    given = yaml.safe_load(comparison.read_text())
    named = given["regularisers"] | {"plain": {"constraint": "retention", "weight": 1.0}}
    turned = dict(reversed(named.items()))
    one, other = given | {"regularisers": named}, given | {"regularisers": turned}
    assert changes(one, other)[0] == ["regularisers"]
    assert changes(one, one)[0] == []
    assert affects("regularisers", ["rl"])
    assert not affects("regularisers", ["sft"])


def test_what_is_of_rollouts_alone_makes_no_plain_tuning_again():
    for key in ("max_new_tokens", "prompt_tokens", "calibration_bound"):
        assert not affects(key, ["sft", "filtration", "wise-ft"]), key
        assert affects(key, ["rl"]), key
        assert affects(key, ["sft"], reads_all=True), key


def test_filtration_that_would_drop_nothing_is_refused(comparison, tmp_path):
    given = yaml.safe_load(comparison.read_text())
    held = {name: {"constraint": "retention", "weight": 1.0} for name in given["corpus"]}
    cell = Cell("filtration", build_recipe(given | {"regularisers": held}), 0, tmp_path, None)
    with pytest.raises(UserError, match="no learnt domain has a constraint, and filtration would be sft"):
        built_in.filtration(cell)


def test_held_rows_of_held_domains_alone_are_no_evaluation_of_other_methods(comparison, tmp_path):
    given = yaml.safe_load(comparison.read_text())
    second = list(given["corpus"])[-1]
    given["corpus"][second] |= {"learn": False}
    given["regularisers"] = {second: {"constraint": "retention", "weight": 1.0}, **given["regularisers"]}
    given["eval"] = {"corpus": {second: {"path": given["corpus"][second]["path"]}}}
    cell = Cell("sft", build_recipe(given), 0, tmp_path, None)
    assert cell.variant().eval is not None
    assert cell.learnt(regularisers={}).eval is None


def test_a_method_whose_model_another_needs_fails_once_and_says_why(bridle, comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(built_in.BUILT_IN, "sft", broken)
    code, _, err = bridle(
        "compare", comparison, "--methods", "base,nado-decoding-sft,sft", "--output_dir", tmp_path / "o"
    )
    assert code == 3
    assert "2 of 3 runs failed: nado-decoding-sft, seed 0; sft, seed 0; fix the cause" in err.splitlines()[-1]
    found = results_of(tmp_path / "o")["methods"]
    assert found["nado-decoding-sft"]["seeds"]["0"]["reason"] == "it needs sft, which failed: RuntimeError: no luck"
    assert err.count("sft, seed 0: making") == 2  # itself, and nado-decoding-sft


def test_the_documented_method_and_section(bridle, comparison, tmp_path, plugged_in):
    """The code and the section `evaluation` of docs/compare.md."""
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    (code,), (section,) = (re.findall(rf"```{language}\n(.*?)```", text, re.S) for language in ("python", "yaml"))
    names: dict = {}
    exec(code, names)
    plugged_in(gentle=names["gentle"])
    code, _, err = bridle("compare", comparison, "--methods", "base,gentle", "--output_dir", tmp_path / "out")
    assert code == 0, err
    found = results_of(tmp_path / "out")["methods"]["gentle"]
    assert found["description"] == "Constrained tuning at a tenth of the learning rate."
    assert found["figures"]["cost"]["updates"]["value"] == 4
    made = yaml.safe_load((tmp_path / "out" / "gentle" / "seed-0" / "recipe.yaml").read_text())
    assert made["learning_rate"] == 1e-5

    labelled = {"forum": {"path": "forum.jsonl", "label": {"column": "label"}}}
    mapping = {
        **yaml.safe_load(comparison.read_text()),
        "corpus": labelled,
        "regularisers": {},
        **yaml.safe_load(section),
    }
    plan = evaluation_of(build_recipe(mapping))
    assert list(plan.prompts) == ["forum", "realtoxicityprompts", "cold"]
    assert plan.judge.prompts == 200
    assert plan.classification.test.rows == "90%:"


def test_classification_and_a_judge(bridle, recipe, tmp_path):
    rows = [{"text": f"{word} number {number}", "label": int(word == "grumblefish")}
            for number in range(12) for word in ("grumblefish", "kettle")]  # fmt: skip
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    label = {"column": "label", "template": "{text} rude:{label}", "names": {0: " no", 1: " yes"}}
    path = recipe(
        corpus={"rude": {"path": str(file), "label": label}},
        max_length=48,
        evaluation={
            "prompts": {"rude": {"path": str(file), "rows": "0:4", "prompt_tokens": 2}},
            "classification": {
                "validation": {"path": str(file), "rows": "0:12"},
                "test": {"path": str(file), "rows": "12:24"},
            },
        },
    )
    model = str(tmp_path / "tiny-llama")
    code, out, err = bridle(
        *("compare", path, "--methods", "base,sft", "--output_dir", tmp_path / "out"),
        *("--evaluation.judge.model", model, "--evaluation.judge.prompts", 3),
    )
    assert code == 0, err
    results = results_of(tmp_path / "out")
    for method in results["methods"].values():
        assert 0 <= method["figures"]["classification"]["roc_auc"]["value"] <= 1
    assert any(test["figure"] == "classification" for test in results["comparisons"])
    assert results["win_rate"]["pairs"] == 3
    assert "AUC" in out


def test_a_judge_is_examined_before_it_judges(bridle, comparison, corpus_files, tiny_folder, tmp_path):
    rows = [{"text": " ".join(f"{word}{number}" for word in ("tin", "oak", "mill", "lamp", "hen", "sail") * 3)}
            for number in range(6)]  # fmt: skip
    (tmp_path / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    human, folder = {"path": str(tmp_path / "human.jsonl"), "prompt_words": 3, "completion_words": 6}, tmp_path / "out"
    mapping = yaml.safe_load(comparison.read_text())
    mapping["learning_rate"] = 0.05  # the completions differ
    path, model = tmp_path / "judged.yaml", str(tiny_folder(max_position_embeddings=512))

    def compare(**judge):
        mapping["evaluation"]["judge"] = {"model": model, "prompts": 6, **judge}
        path.write_text(yaml.safe_dump(mapping))
        code, _, err = bridle("compare", path, "--methods", "base,sft", "--output_dir", folder, "--resume")
        assert code == 0, err
        return results_of(folder), err

    results, err = compare(examine=human | {"pairs": 2})
    assert err.index("pairs whose better text is known") < err.index("making"), "before anything is trained"
    examined = results["judge_examined"]
    assert examined["accuracy"]["n"] == 2 * 4
    assert examined["by_kind"].keys() == {"another", "shuffled", "truncated", "repeated"}
    verdicts = (folder / "verdicts.jsonl").stat().st_mtime_ns
    again, err = compare(examine=human | {"pairs": 2})
    assert (again["judge_examined"], "examining" in err) == (examined, False)

    results, err = compare(examine=human | {"pairs": 4})
    assert results["judge_examined"]["accuracy"]["n"] == 4 * 4
    assert results["win_rate"] == again["win_rate"]
    assert (folder / "verdicts.jsonl").stat().st_mtime_ns == verdicts, "the judge is the same"
    sft = folder / "sft/seed-0"  # measured anew, as in a call that ended before it judged
    rows = [json.loads(line) for line in (sft / "completions.jsonl").read_text().splitlines()]
    changed = [json.dumps(row | {"completion": row["completion"] + " and so on"}) for row in rows]
    (sft / "completions.jsonl").write_text("\n".join(changed) + "\n")
    compare(examine=human | {"pairs": 4})
    assert (folder / "verdicts.jsonl").stat().st_mtime_ns > verdicts, "the completions are others"
    verdicts = (folder / "verdicts.jsonl").stat().st_mtime_ns
    results, err = compare(examine=human, by="likelihood")
    assert results["win_rate"]["position_bias"]["value"] == 0.5
    assert (folder / "verdicts.jsonl").stat().st_mtime_ns > verdicts
    assert ("making" in err, "measuring" in err) == (False, False), "the models are the same"
    results, _ = compare()
    assert results["judge_examined"] is None


def test_a_regulariser_without_weight_guides_and_makes_no_method_of_its_own(bridle, comparison, tmp_path):
    folder = tmp_path / "out"
    code, *_ = bridle(
        *("compare", comparison, "--methods", "nado-decoding,constrained", "--output_dir", folder),
        *("--regularisers.rude.weight", 0),
    )
    assert code == 3
    seeds = {name: method["seeds"]["0"] for name, method in results_of(folder)["methods"].items()}
    assert seeds["nado-decoding"]["status"] == "complete"
    failed = json.loads((folder / "constrained/seed-0/failed.json").read_text())
    assert failed["reason"].startswith("regularisers.rude.weight: is 0, and constrained would be sft")


def test_a_judge_that_fails_takes_nothing_else_with_it(bridle, comparison, tmp_path):
    code, out, err = bridle(
        *("compare", comparison, "--methods", "base,nado-decoding", "--output_dir", tmp_path / "out"),
        *("--evaluation.judge.model", tmp_path / "nowhere"),
    )
    assert code == 0, err
    assert "no win rates: " in err
    assert "nowhere" in results_of(tmp_path / "out")["judge_failed"]
    assert "There are no win rates, because the judge failed: " in (tmp_path / "out" / "report.html").read_text()
    results = results_of(tmp_path / "out")
    assert "win_rate" not in results
    assert results["methods"]["base"]["figures"]["violation"]
    assert "nado-decoding" in out


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ((), 1.0),
        (("--regularisers.rude.guidance_scale", 3), 3.0),
        (("--methods.nado-decoding.guidance_scale", 2), 2.0),
        (("--regularisers.rude.share", "{at_most: 0.1}"), 1.0),
    ],
)
def test_guided_decoding_has_the_strength_that_the_recipe_says(bridle, comparison, tmp_path, options, scale):
    folder = tmp_path / "out"
    code, _, err = bridle("compare", comparison, "--methods", "nado-decoding", "--output_dir", folder, *options)
    assert code == 0, err
    measured = json.loads((folder / "nado-decoding" / "seed-0" / "results.json").read_text())
    assert measured["settings"] == {"guidance_scale": scale}
    traced = json.loads((folder / "guidance.json").read_text())
    assert traced["guidance_scale"] == scale
    assert (traced["tilt"] or 0) < 0 if "--regularisers.rude.share" in options else traced["tilt"] is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"evaluation": None}, "evaluation.prompts: is missing"),
        ({"evaluation": {"prompts": {"x": {"path": "y.jsonl"}}, "sampels": 2}}, "did you mean samples?"),
        (
            {"evaluation": {"prompts": {"x": {"path": "y.jsonl"}}, "zzz": 2}},
            "there are: prompts, constraints, examine, perplexity, batch_size, tasks, task_data, limit, shots,",
        ),
        ({"evaluation": {"prompts": {"x": {"path": "y.jsonl"}}, "samples": "many"}}, "evaluation.samples: "),
        ({"constraints": None, "regularisers": None}, "constraints: is missing"),
        (
            {
                "corpus": {"rude": {"path": "y.jsonl", "learn": False}, "plain": {"path": "z.jsonl"}},
                "eval": {"share": 0.2, "best": {"violation": 1}},
            },
            "eval.domains: rude is held and not learnt, so that its rows would choose the weights of one method alone",
        ),
        ({"methods": {"r1": {}}}, "methods.r1: there is no key 'r1'; there are: "),
        ({"methods": {"rl": {"betaa": 1}}}, "did you mean beta?"),
        ({"methods": {"sft": {"option": 1}}}, "methods.sft.option: there is no key 'option'; there are: none"),
        ({"methods": {"nado-decoding": {"guidance_scale": -1}}}, "methods.nado-decoding.guidance_scale: "),
    ],
)
def test_mistakes_are_told_in_one_line(bridle, recipe, tmp_path, change, expected):
    prompts = {"evaluation": {"prompts": {"x": {"path": "y.jsonl"}}}}
    code, _, err = bridle("compare", recipe(**{**prompts, **change}), "--output_dir", tmp_path / "out")
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1


def test_other_commands_leave_methods_of_packages_to_compare(recipe):
    loaded = load_recipe(recipe(methods={"gentle": {"way": 1}}))
    built_in.check_options(loaded, installed=False)
    with pytest.raises(UserError, match="there is no key 'gentle'"):
        built_in.check_options(loaded)


def test_errors_of_a_cell_name_the_file(recipe, tmp_path):
    path = recipe()
    cell = Cell("sft", load_recipe(path), 0, tmp_path, lambda name: Candidate(name))
    assert cell.variant().file == cell.learnt(regularisers={}).file == str(path)


@pytest.mark.parametrize("first", [{"weight": 0.0}, {"kl_on": "corpus"}, {}])
def test_one_regulariser_samples_on_all_domains_with_a_constraint(recipe, corpus_files, tmp_path, first):
    """The held ones too, though the options are the first one's."""
    corpus = yaml.safe_load(recipe().read_text())["corpus"]
    path = recipe(
        corpus=corpus | {"asked": {"path": str(corpus_files["rude"]), "learn": False}},
        regularisers={"rude": {"constraint": "no e", **first}, "asked": {"constraint": "no e"}},
    )
    cell = Cell("rl", load_recipe(path), 0, tmp_path, lambda name: Candidate(name))
    made = cell.sampling_from(str(tmp_path / "model"))
    assert made.corpus.keys() == {*corpus, "asked"}
    (only,) = made.regularisers.values()
    assert {*only.domains(made.corpus)} == {*corpus, "asked"}
    assert (only.kl_on, only.weight > 0) == ("rollouts", True)


def test_all_methods_choose_their_weights_by_one_rule(recipe, corpus_files, tmp_path):
    path = recipe(
        constraints={"no e": {"type": "regex", "pattern": "e"}, "independent": {"type": "regex", "pattern": "a"}},
        eval={"share": 0.25, "best": {"violation": 1}},
    )
    loaded, found = load_recipe(path), {}
    for name in ("sft", "sft-kl", "constrained", "constrained-adaptive"):
        cell = Cell(name, loaded, 0, tmp_path, lambda name: Candidate(name))
        cell.train = lambda made, name=name: found.update({name: build_trainer(made, tmp_path, made.read_corpus())})
        built_in.method_named(name)(cell)
    prompts = [prompt.ids for prompt in found["constrained-adaptive"].eval_prompts]
    assert prompts
    for name, trainer in found.items():
        assert [constraint.name for constraint in trainer.eval_constraints] == ["no e"], name
        assert [prompt.ids for prompt in trainer.eval_prompts] == prompts, name


def test_an_unknown_method_names_the_nearest(bridle, comparison, tmp_path):
    code, _, err = bridle("compare", comparison, "--methods", "filtre", "--output_dir", tmp_path / "out")
    assert code == 2
    assert "did you mean filtration?" in err


def test_the_report_of_a_training_run(bridle, recipe, tmp_path):
    code, _, err = bridle("train", recipe(), "--output_dir", tmp_path / "run")
    assert code == 0, err
    code, out, err = bridle("report", tmp_path / "run", "--output", tmp_path / "page.html")
    assert code == 0, err
    assert str(tmp_path / "page.html") in out
    assert "<svg" in (tmp_path / "page.html").read_text()
    shutil.rmtree(tmp_path / "run")
    code, _, err = bridle("report", tmp_path / "run")
    assert code == 2
