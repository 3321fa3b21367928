"""Means over seeds, and paired tests between methods, on numbers whose answers are known."""

import math

import pytest

from bridle.comparison.summary import comparisons, figures_of, first_completions, over_seeds
from bridle.evaluation.observations import Observations


def estimate(value, low=None, high=None, n=10, missing=0):
    return {"value": value, "low": low, "high": high, "n": n, "missing": missing}


def observed(violations, nats=()):
    """One run: violations[prompt][sample], None where unscored; nats per text of four tokens."""
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
        {"held_out": "wiki", "index": index, "nll": 4 * value, "tokens": 4, "bytes": 16}
        for index, value in enumerate(nats)
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
    tests = {(test["figure"], test["method"]): test for test in comparisons(runs, {})}
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
    (test,) = comparisons(runs, {})
    assert test["difference"]["n"] == 2
    assert test["p_value"] == pytest.approx(0.5)


def test_unscored_completions_are_left_out():
    runs = {"base": {0: observed([[None], [True]])}, "tuned": {0: observed([[False], [False]])}}
    (test,) = comparisons(runs, {})
    assert (test["difference"]["value"], test["difference"]["n"], test["difference"]["missing"]) == (1.0, 1, 1)


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
