"""Means over seeds, and paired tests between methods, on numbers whose answers are known."""

import math

import pytest

from bridle.comparison.summary import comparisons, figures_of, first_completions, over_seeds, transfers_of
from bridle.evaluation.observations import Observations


def estimate(value, low=None, high=None, n=10, missing=0):
    return {"value": value, "low": low, "high": high, "n": n, "missing": missing}


def figures(**methods):
    """figures(base=(violation rate, perplexity)), as far as tests of what differs need them."""
    return {
        name: {"violation": {"forum": {"polite": {"value": rate}}}, "perplexity": {"wiki": {"value": perplexity}}}
        for name, (rate, perplexity) in methods.items()
    }


def observed(violations, nats=(), tokens=4):
    """One run: violations[prompt][sample], None where unscored; nats a token of texts of so many tokens each."""
    lengths = tokens if isinstance(tokens, list) else [tokens] * len(nats)
    completions = [
        {
            "prompt_set": "forum",
            "index": index,
            "sample": sample,
            "prompt": f"prompt {index}",
            "completion": f"said {index}.{sample}",
            "scores": {
                "polite": {"value": None if v is None else float(not v), "complies": None if v is None else not v}
            },
        }
        for index, row in enumerate(violations)
        for sample, v in enumerate(row)
    ]
    likelihoods = [
        {"held_out": "wiki", "index": index, "nll": length * value, "tokens": length, "bytes": 16}
        for index, (value, length) in enumerate(zip(nats, lengths, strict=True))
    ]
    return Observations(completions=completions, likelihoods=likelihoods)


def test_figures_are_averaged_over_seeds_with_their_spread():
    runs = [
        {"perplexity": {"wiki": estimate(10.0, 8.0, 12.0)}, "cost": {"seconds": estimate(3.0, n=1)}},
        {"perplexity": {"wiki": estimate(14.0, 11.0, 17.0, missing=2)}},
    ]
    found = over_seeds(runs)
    assert found["perplexity"]["wiki"] == {
        "value": 12.0,
        "low": 9.5,
        "high": 14.5,
        "n": 20,
        "missing": 2,
        "spread": pytest.approx(math.sqrt(8)),
        "seeds": 2,
    }
    assert found["cost"]["seconds"]["spread"] is None
    assert found["cost"]["seconds"]["seeds"] == 1


def test_a_missing_figure_is_left_out_and_never_a_number():
    found = over_seeds([{"x": estimate(None, n=0, missing=10)}, {"x": estimate(0.5, 0.4, 0.6)}])
    assert (found["x"]["value"], found["x"]["seeds"], found["x"]["missing"]) == (0.5, 1, 10)
    alone = over_seeds([{"x": estimate(None, n=0, missing=10)}])
    assert (alone["x"]["value"], alone["x"]["low"], alone["x"]["seeds"]) == (None, None, 0)


def test_a_name_is_not_taken_for_a_figure():
    found = over_seeds([{"violation": {"value": {"value": estimate(0.2)}, "low": {"high": estimate(0.4)}}}])
    assert found["violation"]["value"]["value"]["value"] == 0.2
    assert found["violation"]["low"]["high"]["value"] == 0.4


def test_groups_that_were_not_measured_are_absent():
    results = {"generation": {"forum": {"polite": {"violation_rate": estimate(0.2)}}}}
    assert figures_of(results, {"seconds": 5.0}) == {
        "violation": {"forum": {"polite": estimate(0.2)}},
        "cost": {"seconds": estimate(5.0, n=1)},
    }


def test_methods_are_compared_with_the_best_on_the_same_prompts():
    prompts = 20
    runs = {
        "base": {0: observed([[True, True]] * prompts, [3.0] * prompts)},
        "tuned": {0: observed([[False, False]] * prompts, [2.0] * prompts)},
        "same": {0: observed([[False, False]] * prompts, [2.0] * prompts)},
    }
    found = comparisons(runs, figures(base=(1.0, 20.1), tuned=(0.0, 7.4), same=(0.0, 7.4)))
    tests = {(test["figure"], test["method"]): test for test in found}
    assert set(tests) == {(figure, name) for figure in ("violation", "perplexity") for name in ("base", "same")}
    worse = tests["violation", "base"]
    assert (worse["reference"], worse["on"], worse["constraint"]) == ("tuned", "forum", "polite")
    assert worse["difference"]["value"] == 1.0
    assert worse["adjusted_p_value"] < 0.01
    assert tests["violation", "same"]["adjusted_p_value"] == 1.0
    assert tests["perplexity", "base"]["difference"]["value"] == pytest.approx(1.0), "nats a token"
    assert tests["perplexity", "base"]["test"] == "permutation"


def test_seeds_of_one_prompt_are_one_observation():
    # Were the ten seeds taken for independent prompts, two prompts would pass for twenty.
    runs = {
        "base": dict.fromkeys(range(10), observed([[True], [True]])),
        "tuned": dict.fromkeys(range(10), observed([[False], [False]])),
    }
    (test,) = comparisons(runs, figures(base=(1.0, None), tuned=(0.0, None)))
    assert test["difference"]["n"] == 2
    assert test["p_value"] == pytest.approx(0.5)


def test_what_an_independent_constraint_confirms_is_a_group_of_figures():
    def judged(polite, careful):
        made = observed([[n < polite] for n in range(40)])
        for n, row in enumerate(made.completions):
            row["scores"]["careful"] = {"value": float(n >= careful), "complies": n >= careful}
        return made

    runs = {
        "base": {0: judged(20, 20), 1: judged(20, 20)},
        "nado-decoding": {0: judged(10, 15), 1: judged(10, 15)},
        "constrained": {0: judged(20, 20)},
    }
    found = transfers_of(runs, "polite", ["polite"])
    assert found.keys() == {"nado-decoding", "constrained"}
    ratio = found["nado-decoding"]["transfer"]["forum"]["careful"]
    assert ratio["value"] == pytest.approx(0.25 / 0.5)
    assert (ratio["n"], ratio["seeds"], ratio["spread"]) == (40, 2, None)
    assert found["constrained"]["transfer"]["forum"]["careful"]["value"] is None
    assert transfers_of(runs, None, []) == {}


def test_unscored_completions_are_left_out():
    runs = {"base": {0: observed([[None], [True]])}, "tuned": {0: observed([[False], [False]])}}
    (test,) = comparisons(runs, figures(base=(1.0, None), tuned=(0.0, None)))
    assert (test["difference"]["value"], test["difference"]["n"], test["difference"]["missing"]) == (1.0, 1, 1)


def test_perplexities_differ_by_what_the_table_says_however_long_the_texts_are():
    # The long text decides the perplexity; a plain mean over texts would prefer the other method.
    runs = {
        "long": {0: observed([], [2.0, 2.0], tokens=[90, 10])},
        "short": {0: observed([], [2.5, 1.0], tokens=[90, 10])},
    }
    (test,) = comparisons(runs, figures(long=(None, math.exp(2.0)), short=(None, math.exp(2.35))))
    assert (test["method"], test["reference"]) == ("short", "long")
    assert test["difference"]["value"] == pytest.approx(0.35), "the difference of log perplexities"


def test_a_method_without_any_score_is_never_the_best():
    runs = {
        "broken": {0: observed([[None], [None]])},
        "base": {0: observed([[True], [True]])},
        "tuned": {0: observed([[False], [True]])},
    }
    found = comparisons(runs, figures(broken=(None, None), base=(1.0, None), tuned=(0.5, None)))
    assert [(test["method"], test["reference"]) for test in found] == [("base", "tuned")]


def test_the_tasks_of_a_group_count_alike():
    def answers(small, large):
        rows = [(right, 2.5) for right in small] + [(right, 0.625) for right in large]
        return Observations(
            answers=[
                {"task": "group", "index": index, "correct": right, "weight": weight}
                for index, (right, weight) in enumerate(rows)
            ]
        )

    runs = {"a": {0: answers([True, True], [False] * 8)}, "b": {0: answers([False, False], [True] * 8)}}
    values = {"a": {"tasks": {"group": {"value": 0.5}}}, "b": {"tasks": {"group": {"value": 0.5}}}}
    (test,) = comparisons(runs, values)
    assert test["difference"]["value"] == pytest.approx(0.0), "2 of 10 right against 8 of 10, but one task each"


def test_a_judge_is_shown_the_first_sample_of_the_first_prompts():
    runs = {"base": {1: observed([[True, True]] * 3)}, "failed": {}, "tuned": {0: observed([[False, False]] * 3)}}
    prompts, said = first_completions(runs, "forum", 2)
    assert prompts == ["prompt 0", "prompt 1"]
    assert said == {"base": ["said 0.0", "said 1.0"], "tuned": ["said 0.0", "said 1.0"]}


def test_observations_survive_their_files(tmp_path):
    made = observed([[True], [None]], [1.0])
    made.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["completions.jsonl", "likelihoods.jsonl"]
    assert Observations.read(tmp_path) == made
