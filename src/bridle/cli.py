"""The command line: `bridle train`, `bridle generate`, `bridle evaluate`."""

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bridle.errors import RunStopped, UserError

app = typer.Typer(
    name="bridle",
    help="Fine-tune a language model on a corpus while holding its outputs to a policy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

USER_ERROR, RUN_STOPPED = 2, 3  # exit codes

Model = Annotated[str, typer.Argument(help="Folder written by save_pretrained, adapter folder, or hub name.")]
Guide = Annotated[
    str | None,
    typer.Option("--guide", metavar="AUXILIARY", help="Guide sampling by this auxiliary model (NADO decoding)."),
]
GuidePower = Annotated[float, typer.Option("--guide_power", help="η: strength of the guidance; 1 is the method.")]
PromptTokens = Annotated[
    int | None,
    typer.Option("--prompt_tokens", help="Take only the first so many tokens of each row as the prompt."),
]
MaxNewTokens = Annotated[int, typer.Option("--max_new_tokens", help="Tokens at which a completion is cut.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="K: completions drawn for each prompt.")]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Rows in one forward.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed draws the same text.")]
Device = Annotated[str | None, typer.Option("--device", help="cuda, cpu, ...; the GPU where there is one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Type of the weights: float32, bfloat16, float16.")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: bridle train recipes/detox-mini.yaml --regularisers.toxigen.weight 10 --max_steps 100",
)
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, corpus, constraints, regularisers.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="Where the run goes. [default: runs/NAME OF RECIPE]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
) -> None:
    """Fine-tune a model as a recipe says.

    Any key of the recipe can be set here: --key value, or --group.name.key value.

    The folder then holds model/ and auxiliary/ (both loadable by from_pretrained), rollouts/, metrics.jsonl,
    recipe.yaml (as resolved) and environment.json (versions, git hash, seed).
    """
    from bridle.training.recipe import load_recipe, parse_overrides
    from bridle.training.run import train as run

    _quiet_libraries()
    folder = output_dir or Path("runs") / recipe.stem
    run(load_recipe(recipe, parse_overrides(context.args)), folder, resume=resume)
    typer.echo(f"The model is in {folder / 'model'}, what was measured in {folder / 'metrics.jsonl'}.")


@app.command(epilog="Example: bridle generate runs/detox-mini/model --prompt 'The weather in' --samples 3")
def generate(
    model: Model,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts: JSONL, CSV, Parquet, or one a line in a .txt."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="A single prompt.")] = None,
    guide: Guide = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write JSON lines here instead of printing."),
    ] = None,
    prompt_tokens: PromptTokens = None,
    samples: Samples = 1,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 64,
    guide_power: GuidePower = 1.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Draw text from a model, guided or not, at temperature 1 from its whole distribution."""
    from bridle.evaluation import generate_completions

    if (prompts is None) == (prompt is None):
        raise UserError("give either --prompts FILE or --prompt TEXT")
    lm, tokenizer = _load(model, device, dtype)
    asked = _prompts(prompts, prompt, tokenizer, lm, max_new_tokens, prompt_tokens)
    with _guided(lm, guide, guide_power) as guidance:
        drawn = generate_completions(
            lm,
            tokenizer,
            [item.ids for item in asked],
            samples=samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            guide=guidance,
        )
    rows = [
        {"prompt": item.text, "completion": text} for item, texts in zip(asked, drawn, strict=True) for text in texts
    ]
    if output is None:
        for row in rows:
            typer.echo(row["prompt"] + row["completion"] + "\n")
        return
    _write(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    typer.echo(f"{len(rows)} completions are in {output}.")


@app.command(
    epilog="Example: bridle evaluate runs/detox-mini/model --prompts unseen.jsonl "
    "--constraint classifier:oracle,label=toxic --perplexity heldout.jsonl --json result.json"
)
def evaluate(
    model: Model,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts to complete; FILE,rows=90%:,label=1 takes some of its rows.",
        ),
    ] = None,
    constraint: Annotated[
        str | None,
        typer.Option(
            "--constraint",
            metavar="SPEC",
            help="classifier:MODEL,label=toxic,threshold=0.5 | words:FILE | regex:PATTERN | "
            "python:module:function | RECIPE.yaml:name | a mapping in YAML, as in a recipe.",
        ),
    ] = None,
    guide: Guide = None,
    samples: Samples = 1,
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", metavar="FILE", help="Held-out text; may be given several times."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every figure here.")] = None,
    prompt_tokens: PromptTokens = None,
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 64,
    guide_power: GuidePower = 1.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Measure how often a model violates a constraint, and its perplexity on held-out text.

    Every rate carries a 95% interval; texts that could not be scored are counted as missing.
    """
    from bridle.data import DataSource, texts_of
    from bridle.environment import environment, write_json
    from bridle.evaluation import evaluate_generations, generate_completions
    from bridle.evaluation import perplexity as measure_perplexity

    if (prompts is None) != (constraint is None):
        raise UserError("--prompts and --constraint go together: texts are drawn from one and scored by the other")
    if prompts is None and not perplexity:
        raise UserError("nothing to measure: give --prompts with --constraint, or --perplexity")
    oracle = _oracle(constraint) if constraint is not None else None
    held_out = {name: texts_of(DataSource.parse(name)) for name in perplexity or []}
    lm, tokenizer = _load(model, device, dtype)
    results: dict[str, Any] = {"model": model, "guide": guide}
    with _guided(lm, guide, guide_power) as guidance:
        if oracle is not None:
            asked = _prompts(prompts, None, tokenizer, lm, max_new_tokens, prompt_tokens)
            drawn = generate_completions(
                lm,
                tokenizer,
                [item.ids for item in asked],
                samples=samples,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                seed=seed,
                guide=guidance,
            )
            generation = evaluate_generations(drawn, oracle, seed=seed)
            typer.echo(str(generation))
            results["generation"] = generation.to_json() | {
                "prompts_file": prompts,
                "oracle": oracle.describe(),
            }
        results["perplexity"] = {}
        for name, texts in held_out.items():
            measured = measure_perplexity(
                lm,
                tokenizer,
                texts,
                batch_size=batch_size,
                adjust_logits=guidance.log_probs if guidance else None,
            )
            typer.echo(f"perplexity of {name}: {measured}")
            results["perplexity"][name] = measured.to_json()
    if json_file is not None:
        write_json(json_file, results | {"environment": environment(seed)})


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, a stopped run exit code 3."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    try:
        app(prog_name="bridle")
    except (UserError, RunStopped) as error:
        print(f"bridle: {error}", file=sys.stderr)
        sys.exit(USER_ERROR if isinstance(error, UserError) else RUN_STOPPED)


def _quiet_libraries() -> None:
    """Bars of `transformers` and `datasets` for work of milliseconds; the phases that take long have ours."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _load(model: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    import torch

    from bridle.models.loading import load_model, load_tokenizer

    _quiet_libraries()
    tokenizer = load_tokenizer(model)
    return load_model(model, dtype=dtype, device=device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def _oracle(spec: str) -> Any:
    from bridle.constraints import build_constraint
    from bridle.training.recipe import constraint_of

    refers_to_recipe = re.fullmatch(r"[^{:]+\.ya?ml:[^:]+", spec)
    oracle = constraint_of(spec) if refers_to_recipe else build_constraint(spec)
    oracle.load()  # a mistake shows before any text is drawn
    return oracle


def _prompts(
    file: str | None,
    text: str | None,
    tokenizer: Any,
    model: Any,
    max_new_tokens: int,
    prompt_tokens: int | None,
) -> list[Any]:
    from bridle.data import DataSource, Prompt, encode_prompt, read_prompts
    from bridle.models.loading import context_length

    if file is None:
        return [Prompt(text or "", encode_prompt(text or "", tokenizer))]
    limit = context_length(model)
    longest = limit - max_new_tokens if limit else None
    return read_prompts(DataSource.parse(file), tokenizer, max_prompt_tokens=longest, prefix_tokens=prompt_tokens)


@contextmanager
def _guided(model: Any, auxiliary: str | None, power: float) -> Iterator[Any]:
    """The guide that an auxiliary folder makes for a model; None without one."""
    from bridle.models.auxiliary import load_auxiliary
    from bridle.models.guidance import NADOGuide
    from bridle.models.hidden import causal_lm

    if auxiliary is None:
        yield None
        return
    with NADOGuide(model, load_auxiliary(auxiliary, causal_lm(model)), power) as guide:
        yield guide


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    main()
