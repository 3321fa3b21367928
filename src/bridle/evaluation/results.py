"""One format for everything that is measured: `results.json`, described by `results.schema.json` beside this file."""

import json
import math
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from textwrap import shorten
from typing import Any

from jsonschema import Draft202012Validator, ValidationError  # type: ignore[import-untyped]
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]
from jsonschema.validators import extend  # type: ignore[import-untyped]

from bridle.errors import UserError
from bridle.evaluation.generation import GenerationResult
from bridle.evaluation.statistics import Estimate
from bridle.utils.files import read_json, write_json

FORMAT = 1
LONGEST_MESSAGE = 200  # characters; a message may quote the whole of what is wrong


@cache
def results_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `results.json`; its descriptions document every field."""
    schema: dict[str, Any] = json.loads(files("bridle.evaluation").joinpath("results.schema.json").read_text("utf-8"))
    return schema


def validate_results(results: Any) -> None:
    """Checks an object against `results_schema`; NaN and infinities are no numbers to it.

    Raises:
        UserError: naming the place that is wrong, as in "$.text.toxigen.distinct_1.n", and what it should be.
    """
    error = best_match(_validator().iter_errors(results))
    if error is not None:
        raise UserError(f"results: {error.json_path}: {_explained(error)}")


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Writes results that are valid; an older file stays as it is where they are not.

    Raises:
        UserError: as `validate_results`, or the file cannot be written.
    """
    validate_results(results)
    write_json(path, results)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_results` wrote.

    Raises:
        UserError: naming the file: it cannot be read, or `validate_results` refuses it.
    """
    results = read_json(path, dict[str, Any])
    try:
        validate_results(results)
    except UserError as error:
        raise UserError(f"{path}: {error}; remove the file and measure again") from error
    return results


def generation_parts(
    found: Mapping[str, Mapping[str, GenerationResult]], output_perplexities: Mapping[str, Estimate] | None = None
) -> dict[str, Any]:
    """The parts `generation` and `text`.

    Args:
        found: by prompt set what `evaluate_constraints` returned for it.
        output_perplexities: by prompt set what `output_perplexity` returned.
    """
    perplexities = output_perplexities or {}
    return {
        "generation": {
            prompt_set: {constraint: _under_constraint(result) for constraint, result in results.items()}
            for prompt_set, results in found.items()
        },
        "text": {
            prompt_set: _json(_text_figures(results) | _given("output_perplexity", perplexities.get(prompt_set)))
            for prompt_set, results in found.items()
        },
    }


def _under_constraint(result: GenerationResult) -> dict[str, Any]:
    return {"prompts": result.prompts, "incomplete": result.incomplete, **_json(result.violation_figures())}


def _text_figures(results: Mapping[str, GenerationResult]) -> dict[str, Estimate]:
    """Those under the first constraint: they are the same under all."""
    return next((result.text_figures() for result in results.values()), {})


def _given(name: str, estimate: Estimate | None) -> dict[str, Estimate]:
    return {} if estimate is None else {name: estimate}


def _json(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in figures.items()}


@cache
def _validator() -> Draft202012Validator:
    types = {"number": _is_finite_number, "integer": _is_whole_number}
    checker = Draft202012Validator.TYPE_CHECKER.redefine_many(types)
    return extend(Draft202012Validator, type_checker=checker)(results_schema())


def _is_finite_number(_: Any, value: Any) -> bool:
    return _is_whole_number(_, value) or (isinstance(value, float) and math.isfinite(value))


def _is_whole_number(_: Any, value: Any) -> bool:
    # By the standard 1.0 is whole too: a measured share of exactly 1 would pass for a count.
    return isinstance(value, int) and not isinstance(value, bool)


def _explained(error: ValidationError) -> str:
    """What is wrong, in one line, and what the schema says of the place."""
    said = error.schema.get("description") if isinstance(error.schema, dict) else None
    message = shorten(error.message, LONGEST_MESSAGE, placeholder=" ...")
    return f"{message} ({said.rstrip('.')})" if said else message
