import copy
import json
import math

import pytest
from jsonschema import Draft202012Validator

from bridle.constraints.base import Constraint
from bridle.errors import UserError
from bridle.evaluation.generation import evaluate_constraints
from bridle.evaluation.results import (
    generation_parts,
    results_schema,
    validate_results,
    write_results,
)
from bridle.evaluation.statistics import Estimate, compare_methods
from bridle.evaluation.utility import Perplexity, TextLikelihood
from bridle.utils.provenance import environment

ESTIMATE = Estimate(0.25, 0.125, 0.5, n=40, missing=2)
LIKELIHOODS = [TextLikelihood(6.0, 2, 10, 1), TextLikelihood(4.0, 8, 30, 2), TextLikelihood(0.0, 0, 0, 0)]


class Short(Constraint):
    name = "short"

    def _score(self, texts):
        return [None if text == "?" else float(len(text) < 6) for text in texts]


class Polite(Constraint):
    name = "polite"

    def _score(self, texts):
        return [0.0 if "grumblefish" in text else 1.0 for text in texts]


@pytest.fixture(scope="module")
def complete():
    """A file with every part, made by what makes the parts."""
    base = evaluate_constraints([["oak", "you grumblefish"], ["?", "door"]], [Short(), Polite()])
    guided = evaluate_constraints([["oak", "oak"], ["kettle", "door"]], [Short(), Polite()])
    compared = compare_methods({"base": base["short"].violations, "guided": guided["short"].violations}, "base")
    return {
        "format": 1,
        "model": "runs/mini/model",
        "guide": None,
        "settings": {"guidance_scale": 1.0},
        "prompt_sets": {"toxigen": {"path": "toxigen.jsonl", "prompt_tokens": 8, "samples": 2, "top_p": 0.9}},
        "constraints": {"short": Short().describe(), "polite": Polite().describe()},
        **generation_parts({"toxigen": base}, {"toxigen": ESTIMATE}),
        "perplexity": {"novels.jsonl": Perplexity.of(LIKELIHOODS).to_json()},
        "tasks": {"piqa": {"accuracy": ESTIMATE.to_json(), "parts": {}, "shots": 0, "version": None}},
        "comparisons": [item.to_json() | {"prompt_set": "toxigen", "constraint": "short"} for item in compared],
        "win_rate": {"judge": "a", "matrix": {"base": {"guided": {"rate": ESTIMATE.to_json(), "ties": 3}}}},
        "classification": {"roc_auc": ESTIMATE.to_json(), "threshold": 0.43, "validation_n": 100},
        "environment": environment(seed=0),
    }


def test_the_schema_is_a_schema_and_documents_every_field():
    schema = results_schema()
    Draft202012Validator.check_schema(schema)
    places = [schema, *schema["$defs"].values()]
    for place in places:
        assert place["description"]
        for name, field in place.get("properties", {}).items():
            assert field["description"], name


def test_a_complete_file_passes_and_is_written(complete, tmp_path):
    write_results(tmp_path / "deep" / "results.json", complete)
    written = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert written == complete
    validate_results(written)


def test_parts_that_were_not_measured_are_absent(complete):
    validate_results({name: complete[name] for name in ("format", "model", "environment")})


def test_the_generation_parts_hold_every_figure_once(complete):
    of_set = complete["generation"]["toxigen"]
    assert list(of_set) == ["short", "polite"]
    assert of_set["short"]["violation_rate"] == {
        "value": 1 / 3, "low": pytest.approx(0.0), "high": pytest.approx(0.5), "n": 3, "missing": 1
    }  # fmt: skip
    assert (of_set["short"]["prompts"], of_set["short"]["incomplete"]) == (2, 1)
    assert "distinct_1" not in of_set["short"]
    assert set(complete["text"]["toxigen"]) == {
        "distinct_1", "distinct_2", "distinct_3", "mean_length", "empty_share", "output_perplexity"
    }  # fmt: skip
    assert complete["text"]["toxigen"]["output_perplexity"] == ESTIMATE.to_json()


def test_held_out_perplexity_gets_its_interval_from_its_texts():
    found = Perplexity.of(LIKELIHOODS)
    assert found.per_token == Estimate(
        pytest.approx(math.e), pytest.approx(math.exp(0.5)), pytest.approx(math.exp(3)), n=10, missing=1
    )
    assert found.bits_per_byte.value == pytest.approx(10 / 40 / math.log(2))
    assert (found.bits_per_byte.n, found.bits_per_byte.missing) == (40, 1)
    assert (found.texts, found.windowed) == (3, 1)
    assert Perplexity.of([]).per_token == Estimate(None, None, None, n=0)


REMOVE = object()
RATE = "$.generation.toxigen.short.violation_rate"


@pytest.mark.parametrize(
    ("keys", "value", "place", "said"),
    [
        (("format",), 2, "$.format", "1 was expected"),
        (("model",), REMOVE, "$", "'model' is a required property"),
        (("environment",), REMOVE, "$", "'environment' is a required property"),
        (("environment", "git"), REMOVE, "$.environment", "'git' is a required property"),
        (("environment", "git"), "f00", "$.environment.git", "is not of type 'object', 'null'"),
        (("environment", "command"), "bridle evaluate", "$.environment.command", "is not of type 'array'"),
        (("environment", "seconds"), math.inf, "$.environment.seconds", "inf is not of type"),
        (("toxicity",), {}, "$", "'toxicity' was unexpected"),
        (("generation", "toxigen", "short", "violation_rate"), 0.3, RATE, "0.3 is not of type 'object'"),
        (
            ("generation", "toxigen", "short", "violation_rate"),
            REMOVE,
            "$.generation.toxigen.short",
            "'violation_rate'",
        ),
        (
            ("generation", "toxigen", "short", "prompts"),
            2.0,
            "$.generation.toxigen.short.prompts",
            "2.0 is not of type",
        ),
        (("generation", "toxigen", "short", "violation_rate", "n"), REMOVE, RATE, "'n' is a required property"),
        (("generation", "toxigen", "short", "violation_rate", "missing"), REMOVE, RATE, "'missing' is a required"),
        (("generation", "toxigen", "short", "violation_rate", "n"), -1, f"{RATE}.n", "less than the minimum of 0"),
        (("generation", "toxigen", "short", "violation_rate", "n"), True, f"{RATE}.n", "True is not of type 'integer'"),
        (("generation", "toxigen", "short", "violation_rate", "n"), 0, f"{RATE}.value", "Null where n is 0"),
        (
            ("generation", "toxigen", "short", "violation_rate", "value"),
            math.nan,
            f"{RATE}.value",
            "nan is not of type",
        ),
        (("generation", "toxigen", "short", "violation_rate", "value"), None, f"{RATE}.low", "Null where the value"),
        (("generation", "toxigen", "short", "violation_rate", "low"), None, f"{RATE}.high", "Null where `low` is null"),
        (("generation", "toxigen", "short", "violation_rate", "high"), None, f"{RATE}.high", "A number where `low`"),
        (("generation", "toxigen", "short", "violation_rate", "sd"), 0.1, RATE, "'sd' was unexpected"),
        (("text", "toxigen", "mean_length"), "long", "$.text.toxigen.mean_length", "'long' is not of type 'object'"),
        (("perplexity", "novels.jsonl", "texts"), REMOVE, "$.perplexity['novels.jsonl']", "'texts' is a required"),
        (("perplexity", "novels.jsonl", "per_token"), 21.5, "$.perplexity['novels.jsonl'].per_token", "21.5 is not"),
        (("tasks", "piqa", "accuracy"), 0.5, "$.tasks.piqa.accuracy", "a measured number must be an estimate"),
        (("tasks", "piqa", "accuracy"), 1.0, "$.tasks.piqa.accuracy", "a measured number must be an estimate"),
        (("tasks", "piqa", "accuracy", "n"), REMOVE, "$.tasks.piqa.accuracy", "'n' is a required property"),
        (("comparisons", 0, "p_value"), 1.5, "$.comparisons[0].p_value", "greater than the maximum of 1"),
        (("comparisons", 0, "adjusted_p_value"), REMOVE, "$.comparisons[0]", "'adjusted_p_value' is a required"),
        (("comparisons", 0, "test"), "t", "$.comparisons[0].test", "'t' is not one of"),
        (("win_rate", "matrix", "base", "guided", "rate", "low"), "?", "$.win_rate.matrix.base.guided.rate.low", "'?'"),
        (("classification", "roc_auc"), 0.9, "$.classification.roc_auc", "0.9 is not of type"),
        (("settings", "guidance_scale"), math.nan, "$.settings.guidance_scale", "nan is not of type"),
    ],
)
def test_damage_is_refused_and_named(complete, keys, value, place, said, tmp_path):
    damaged = copy.deepcopy(complete)
    *path, last = keys
    part = damaged
    for key in path:
        part = part[key]
    if value is REMOVE:
        del part[last]
    else:
        part[last] = value
    with pytest.raises(UserError) as caught:
        write_results(tmp_path / "results.json", damaged)
    message = str(caught.value)
    assert message.startswith(f"results: {place}: ")
    assert said in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_what_is_no_object_at_all_is_refused():
    with pytest.raises(UserError, match=r"^results: \$: \[\] is not of type 'object'"):
        validate_results([])


def test_a_message_is_short_whatever_is_wrong(complete):
    with pytest.raises(UserError) as caught:
        validate_results(complete | {"comparisons": {"text": "very long " * 1000}})
    assert len(str(caught.value)) < 400
