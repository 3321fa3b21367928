"""Shared options and helpers of the commands."""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bridle.errors import UserError, plain
from bridle.utils.quiet import quiet_libraries

if TYPE_CHECKING:
    from bridle.recipes.recipe import Recipe

RECIPE_KEYS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that takes any key of a recipe as an option."""

RecipeFile = Annotated[Path, typer.Argument(help="YAML file: model, corpus, constraints, regularisers.")]
Model = Annotated[
    str, typer.Argument(help="Folder written by save_pretrained, adapter folder, GGUF file, or hub name.")
]
MeasuredModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, adapter folder, GGUF file, hub name, or http://HOST/v1.")
]
Served = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="What the server at an http address calls its model.")
]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Cuts prompts to --prompt_tokens for a server's model.")
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option("--api_key_env", metavar="NAME", help="Environment variable whose key is sent to a server."),
]
Guide = Annotated[
    str | None, typer.Option(metavar="AUXILIARY", help="Guide sampling by this auxiliary model (NADO decoding).")
]
GuidanceScale = Annotated[float, typer.Option("--guidance_scale", help="η: strength of the guidance; 1 is the method.")]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        "--prompt_tokens",
        min=1,
        help="Tokens at the start of a row that are the prompt. [default: the set's, or all]",
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="K: completions drawn for each prompt. [default: the set's, or 1]")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max_new_tokens", min=1, help="Tokens at which a completion is cut. [default: the set's, or 32]"),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Divides the log-probabilities, after guidance. [default: the set's, or 1]"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top_p", help="Draw from the likeliest tokens that have this probability together. [default: the set's, or 1]"
    ),
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead of drawing one.")]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Rows in one forward.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed draws the same text.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, ...; the GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16, float16.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write every figure here; see the schema.")
]

SCALE_WITHOUT_GUIDE = "--guidance_scale is the strength of a --guide; name one, or leave it out"


class PlainFormatter(logging.Formatter):
    """Escapes control characters in warnings that quote a file or a model."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return plain(super().format(record))


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Prints text of models and files with control characters escaped."""
    typer.echo(plain(text), err=err, nl=nl)


def check_resumed(folder: Path, resume: bool) -> None:
    """Warns if nothing in the folder can be resumed, not even a run that ended before its first update."""
    from bridle.recipes.run import RECIPE_FILE
    from bridle.utils.files import LOCK

    if resume and not any(os.path.exists(folder / file) for file in (RECIPE_FILE, LOCK)):
        logging.getLogger(__name__).warning("%s: holds no run to resume; a new one begins there", folder)


def refuse(*mistakes: tuple[object, str]) -> None:
    """Raises a UserError for the first of several (condition, message) that is true."""
    for is_made, message in mistakes:
        if is_made:
            raise UserError(message)


def read_recipe(path: Path, context: typer.Context) -> "Recipe":
    """Reads a recipe, with the keys set on the command line, and checks the sections that only comparisons read.

    Of methods those that Bridle has, in the main process: another machine may have the packages of the others.
    """
    from bridle.recipes.recipe import load_recipe, parse_overrides

    quiet_libraries()
    if str(path).startswith("--"):
        raise UserError(f"{path}: put the recipe before its keys: bridle {context.info_name} RECIPE --KEY VALUE")
    recipe = load_recipe(path, parse_overrides(context.args))
    if recipe.evaluation:
        from bridle.comparison.plan import section_of

        section_of(recipe)
    if recipe.methods and os.environ.get("RANK", "0") == "0":
        from bridle.comparison.methods import check_options

        check_options(recipe, installed=False)
    return recipe


def load_constraints(specs: Iterable[str]) -> dict[str, Any]:
    """Loads constraints by name, so that mistakes show before sampling."""
    from bridle.constraints import build_constraint
    from bridle.recipes.recipe import constraint_of

    quiet_libraries()
    constraints: dict[str, Any] = {}
    for spec in specs:
        is_in_recipe = re.fullmatch(r"[^{:]+\.ya?ml:[^:]+", spec)
        constraint = constraint_of(spec) if is_in_recipe else build_constraint(spec)
        constraint.load()
        if constraint.name in constraints:
            raise UserError(f"--constraint: two constraints are called '{constraint.name}'; name them in a recipe")
        constraints[constraint.name] = constraint
    return constraints


def asked(context: typer.Context) -> set[str]:
    """The names of the parameters that were given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def is_url(model: str) -> bool:
    """Whether a model is behind a server."""
    return model.startswith(("http://", "https://"))


def about_server(context: typer.Context, model: str, weights: Iterable[str]) -> Iterable[tuple[object, str]]:
    """What to refuse, as `refuse` takes it, where a model is or is not behind a server.

    Args:
        weights: the options that need a model's weights.
    """
    of_server = {"served": "--model", "tokenizer": "--tokenizer", "api_key_env": "--api_key_env"}
    found = asked(context)
    if not is_url(model):
        for name in of_server.keys() & found:
            yield True, f"{of_server[name]} is for a model behind a server, http://HOST/v1; leave it out"
        return
    for name in weights:
        yield name in found, needs_weights(name)
    yield "served" not in found, f"{model} is a server: say which of its models with --model NAME"


def needs_weights(option: str) -> str:
    """Why an option is refused where a model is behind a server."""
    return f"--{option} needs the model's weights, which a server does not show; leave it out"


def check_tokenizer(tokenizer: str | None, sets: Iterable[Any]) -> None:
    """Refuses a tokenizer that would cut no prompt of the `PromptSet`s, which go to a server as text."""
    useless = tokenizer is not None and all(one.generation.prompt_tokens is None for one in sets)
    refuse((useless, "--tokenizer cuts prompts to --prompt_tokens; give both, or leave it out"))


def given(**options: Any) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None and value is not False}
