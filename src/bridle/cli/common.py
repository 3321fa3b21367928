"""Options that commands share, what several of them load, and how all of them speak."""

import logging
import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bridle.errors import UserError, plain

RECIPE_KEYS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that takes any key of a recipe as an option."""

Model = Annotated[str, typer.Argument(help="Folder written by save_pretrained, adapter folder, or hub name.")]
Guide = Annotated[
    str | None,
    typer.Option("--guide", metavar="AUXILIARY", help="Guide sampling by this auxiliary model (NADO decoding)."),
]
GuidePower = Annotated[float, typer.Option("--guide_power", help="η: strength of the guidance; 1 is the method.")]
PromptTokens = Annotated[
    int | None,
    typer.Option("--prompt_tokens", min=1, help="Take only the first so many tokens of each row as the prompt."),
]
MaxNewTokens = Annotated[int, typer.Option("--max_new_tokens", min=1, help="Tokens at which a completion is cut.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="K: completions drawn for each prompt.")]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Rows in one forward.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed draws the same text.")]
Device = Annotated[str | None, typer.Option("--device", help="cuda, cpu, ...; the GPU where there is one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Type of the weights: float32, bfloat16, float16.")]


class PlainFormatter(logging.Formatter):
    """Shows a warning as it is, whatever of a file or a model it quotes."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return plain(super().format(record))


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Prints text of models and files as it is: no terminal obeys it."""
    typer.echo(plain(text), err=err, nl=nl)


def quiet_libraries() -> None:
    """Bars of `transformers` and `datasets` for work of milliseconds; the phases that take long have ours."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def load(model: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    """A model, ready for inference, and its tokenizer."""
    from bridle.models.loading import load_for_inference

    quiet_libraries()
    return load_for_inference(model, dtype, device)


def oracles_of(specs: Sequence[str]) -> dict[str, Any]:
    """Constraints by name, loaded, so that a mistake shows before any text is drawn."""
    from bridle.constraints import build_constraint
    from bridle.recipes.recipe import constraint_of

    quiet_libraries()
    oracles = {}
    for spec in specs:
        refers_to_recipe = re.fullmatch(r"[^{:]+\.ya?ml:[^:]+", spec)
        oracle = constraint_of(spec) if refers_to_recipe else build_constraint(spec)
        oracle.load()
        if oracle.name in oracles:
            raise UserError(f"--constraint: two constraints are called '{oracle.name}'; name them in a recipe")
        oracles[oracle.name] = oracle
    return oracles
