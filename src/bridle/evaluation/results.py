"""The format of all results: `results.json`, described by `results.schema.json` beside this file."""

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
    """Checks an object against `results_schema`; NaN and infinities are not numbers.

    Raises:
        UserError: naming the wrong place, as in "$.text.toxigen.distinct_1.n", and what it should be.
    """
    error = best_match(_validator().iter_errors(results))
    if error is not None:
        raise UserError(f"results: {error.json_path}: {_explained(error)}")


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Writes valid results; an older file stays where they are not valid.

    Raises:
        UserError: as `validate_results`, or the file cannot be written.
    """
    validate_results(results)
    write_json(path, results)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `write_results` wrote.

    Raises:
        UserError: naming the file, which cannot be read or is not valid.
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
    """The parts `generation` and `text` of the results.

    Args:
        found: results of `evaluate_constraints` by prompt set.
        output_perplexities: results of `output_perplexity` by prompt set.
    """
    generation, text = {}, {}
    for prompt_set, results in found.items():
        generation[prompt_set] = {
            name: {"prompts": result.prompts, "incomplete": result.incomplete, **_json(result.violation_figures())}
            for name, result in results.items()
        }
        figures = next((result.text_figures() for result in results.values()), {})  # the same under every constraint
        if output_perplexities and prompt_set in output_perplexities:
            figures["output_perplexity"] = output_perplexities[prompt_set]
        text[prompt_set] = _json(figures)
    return {"generation": generation, "text": text}


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
    # In JSON Schema 1.0 is an integer too, but a measured share of exactly 1 is not a count.
    return isinstance(value, int) and not isinstance(value, bool)


def _explained(error: ValidationError) -> str:
    """What is wrong, in one line, and the schema's description of the place."""
    description = error.schema.get("description") if isinstance(error.schema, dict) else None
    message = shorten(error.message, LONGEST_MESSAGE, placeholder=" ...")
    return f"{message} ({description.rstrip('.')})" if description else message
