"""The command line: `bridle quickstart`, `train`, `generate`, `evaluate`, `judge`, `compare` and `report`."""

import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
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
    typer.Option("--prompt_tokens", min=1, help="Take only the first so many tokens of each row as the prompt."),
]
MaxNewTokens = Annotated[int, typer.Option("--max_new_tokens", min=1, help="Tokens at which a completion is cut.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="K: completions drawn for each prompt.")]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Rows in one forward.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed draws the same text.")]
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
    accept_changes: Annotated[
        bool, typer.Option("--accept_changes", help="Go on although the recipe has changed.")
    ] = False,
) -> None:
    """Fine-tune a model as a recipe says.

    Any key of the recipe can be set here: --key value, or --group.name.key value.

    The folder then holds model/ and auxiliary/ (both loadable by from_pretrained), rollouts/, metrics.jsonl,
    recipe.yaml (as resolved) and environment.json (versions, git hash, seed).
    """
    from bridle.ranks import is_main
    from bridle.training.recipe import load_recipe, parse_overrides
    from bridle.training.run import train as run

    _quiet_libraries()
    folder = output_dir or Path("runs") / recipe.stem
    loaded = load_recipe(recipe, parse_overrides(context.args))
    if loaded.training.get("schedule") == "parallel":
        from bridle.training.schedules.roles import train_in_roles

        train_in_roles(loaded, folder, resume=resume, accept_changes=accept_changes)
    else:
        run(loaded, folder, resume=resume, accept_changes=accept_changes)
    if is_main():
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
        Path | None, typer.Option("--output", metavar="FILE", help="Write JSON lines here instead of printing.")
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
    from bridle.environment import write_text
    from bridle.evaluation import Evaluator, prompt_set
    from bridle.models.guidance import guided

    if (prompts is None) == (prompt is None):
        raise UserError("give either --prompts FILE or --prompt TEXT")
    lm, tokenizer = _load(model, device, dtype)
    with guided(lm, guide, guide_power) as guidance:
        evaluator = Evaluator(lm, tokenizer, guidance, batch_size, seed)
        if prompts is not None:
            asked = evaluator.read(prompt_set(prompts), max_new_tokens, prompt_tokens)
        else:
            asked = [evaluator.prompt(prompt or "", max_new_tokens)]
        drawn = evaluator.draw([one.ids for one in asked], samples=samples, max_new_tokens=max_new_tokens)
    rows = [{"prompt": one.text, "completion": text} for one, texts in zip(asked, drawn, strict=True) for text in texts]
    if output is None:
        for row in rows:
            typer.echo(row["prompt"] + row["completion"] + "\n")
        return
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    typer.echo(f"{len(rows)} completions are in {output}.")


@app.command(
    epilog="Example: bridle evaluate runs/detox-mini/model --prompts unseen.jsonl "
    "--constraint classifier:oracle,label=toxic --perplexity heldout.jsonl --tasks piqa,mmlu --json results.json"
)
def evaluate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="FILE|NAME",
            help="Prompts to complete: a file, toxigen, or realtoxicityprompts; several times for several sets. "
            "FILE,rows=90%:,label=1 takes some of the rows.",
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            "--constraint",
            metavar="SPEC",
            help="classifier:MODEL,label=toxic,threshold=0.5 | words:FILE | regex:PATTERN | "
            "python:module:function | RECIPE.yaml:name | a mapping in YAML, as in a recipe. Give it several times "
            "to see the oracle that was trained on beside an independent one.",
        ),
    ] = None,
    guide: Guide = None,
    samples: Samples = 1,
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", metavar="FILE", help="Held-out text; may be given several times."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="NAMES", help="lm-eval tasks, by comma: mmlu, commonsense, or one of its eight."
        ),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option("--task_data", metavar="DIR", help="Read tasks from NAME.SPLIT.jsonl files here.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first so many documents of a task.")] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", help="Examples in front of a document. [default: 5 for mmlu, else 0]")
    ] = None,
    classify: Annotated[
        str | None,
        typer.Option(
            "--classify",
            metavar="FILE",
            help="Labelled rows (text, label 0 or 1) to classify by the likelihood of the label in words.",
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option("--validation", metavar="FILE", help="Labelled rows that choose --classify's threshold."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Measure the completions' perplexity under this model."),
    ] = None,
    prompt_data: Annotated[
        Path | None, typer.Option("--prompt_data", metavar="DIR", help="Where named prompt sets lie as local files.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure here; see the schema.")
    ] = None,
    prompt_tokens: PromptTokens = None,
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 64,
    guide_power: GuidePower = 1.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Measure what a model says (violations), what it knows (perplexity, tasks), each figure with its interval.

    A figure's n counts what it is made from; texts that could not be scored are missing, never a number.
    """
    from bridle.data import DataSource, VerbalisedLabel, texts_of
    from bridle.environment import environment
    from bridle.evaluation import FORMAT, Evaluator, prompt_set, write_results
    from bridle.models.guidance import guided

    if bool(prompts) != bool(constraint):
        raise UserError("--prompts and --constraint go together: texts are drawn from one and scored by the other")
    if bool(classify) != bool(validation):
        raise UserError("--classify and --validation go together: the threshold is chosen on rows of its own")
    if not (prompts or perplexity or tasks or classify):
        raise UserError("nothing to measure: give --prompts with --constraint, --perplexity, --tasks or --classify")
    sets = [prompt_set(name, data_dir=prompt_data) for name in prompts or []]
    oracles = _oracles(constraint or [])
    held_out = {name: texts_of(DataSource.parse(name)) for name in perplexity or []}
    lm, tokenizer = _load(model, device, dtype)
    base_model = _load(base, device, dtype) if base else None
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": model,
        "guide": guide,
        "settings": {"samples": samples, "max_new_tokens": max_new_tokens, "guide_power": guide_power},
        "prompt_sets": {one.name: one.describe() for one in sets},
        "constraints": {name: oracle.describe() for name, oracle in oracles.items()},
    }
    with guided(lm, guide, guide_power) as guidance:
        evaluator = Evaluator(lm, tokenizer, guidance, batch_size, seed, show=typer.echo)
        results |= evaluator.generation(
            sets,
            oracles,
            samples=samples,
            max_new_tokens=max_new_tokens,
            prompt_tokens=prompt_tokens,
            base=base_model,
        )
        results["perplexity"] = evaluator.perplexity(held_out)
        if classify and validation:
            rows = DataSource.parse(classify), DataSource.parse(validation)
            results["classification"] = evaluator.classification(*rows, VerbalisedLabel())
        if tasks:
            results["tasks"] = evaluator.tasks(tasks.split(","), task_data=task_data, limit=limit, shots=shots)
    if json_file is not None:
        write_results(json_file, results | {"environment": environment(seed)})


@app.command(epilog="Example: bridle judge base=base.jsonl tuned=tuned.jsonl --judge facebook/opt-30b --json wins.json")
def judge(
    completions: Annotated[
        list[str], typer.Argument(metavar="NAME=FILE...", help="What `bridle generate --output` wrote, by method.")
    ],
    judge_model: Annotated[str, typer.Option("--judge", metavar="MODEL", help="The judge: a folder, or a name.")],
    url: Annotated[
        str | None,
        typer.Option(
            "--url", help="Ask an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1, not a local model."
        ),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option("--api_key_env", metavar="NAME", help="Environment variable whose key is sent to --url."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure here; see the schema.")
    ] = None,
    keep: Annotated[Path, typer.Option("--keep", metavar="FILE", help="Verdicts are kept here as they come.")] = Path(
        "verdicts.jsonl"
    ),
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Let a language model judge which method's completions are better, pair by pair and in both orders."""
    from bridle.environment import environment
    from bridle.evaluation import FORMAT, ChatJudge, LocalJudge, read_methods, win_rates, write_results

    files = dict(part.partition("=")[::2] for part in completions)
    if len(files) < 2 or not all(files.values()):
        raise UserError("give at least two methods as NAME=FILE")
    if api_key_env is not None and url is None:
        raise UserError("--api_key_env: a local judge needs no key; give --url, or leave it out")
    prompts, texts = read_methods(files)
    arbiter = (
        ChatJudge(url, judge_model, api_key_env)
        if url
        else LocalJudge(*_load(judge_model, device, dtype), batch_size=batch_size)
    )
    rates = win_rates(prompts, texts, arbiter, seed=seed, keep=keep)
    typer.echo(str(rates))
    if json_file is not None:
        found = {"format": FORMAT, "model": ", ".join(files), "win_rate": rates.to_json()}
        write_results(json_file, found | {"environment": environment(seed)})


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: bridle compare recipes/detox-mini.yaml --methods base,sft,constrained-adaptive --seeds 3",
)
def compare(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML file, with a section `evaluation` that says what is measured.")],
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAMES",
            help="By comma: base, sft, filtration, rl, rl-converged, nado-decoding, nado-decoding-sft, constrained, "
            "constrained-adaptive, or one of an installed package. [default: all]",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, from the recipe's own on.")] = 1,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="Where everything goes. [default: runs/compare-NAME OF RECIPE]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Make only what is missing or failed.")] = False,
) -> None:
    """Train and measure several methods on a recipe's corpus and constraint, and show the trade-off.

    Any key of the recipe can be set here, as in `bridle train`. The folder then holds results.json, a report to
    open in a browser, and for each method and seed its model, figures and completions.
    """
    from bridle.comparison.compare import Comparison
    from bridle.report.data import read_report
    from bridle.report.html import write_report
    from bridle.report.terminal import tables
    from bridle.training.recipe import load_recipe, parse_overrides

    _quiet_libraries()
    loaded = load_recipe(recipe, parse_overrides(context.args))
    folder = output_dir or Path("runs") / f"compare-{recipe.stem}"
    first = loaded.training.get("seed", 0)
    Comparison(
        loaded,
        folder,
        names=[name.strip() for name in methods.split(",")] if methods else (),
        seeds=range(first, first + seeds),
        title=recipe.stem,
        resume=resume,
        show=lambda line: typer.echo(line, err=True),
    ).run()
    typer.echo(tables(read_report(folder)))
    typer.echo(f"Every figure is in {folder / 'results.json'}; look at {write_report(folder)} in a browser.")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: bridle quickstart --corpus comments.jsonl --constraint words:insults.txt",
)
def quickstart(
    context: typer.Context,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus", metavar="FILE", help="Rows of your own instead of the embedded forum; needs --constraint."
        ),
    ] = None,
    constraint: Annotated[
        str | None,
        typer.Option(
            "--constraint",
            metavar="SPEC",
            help="What a text must not be: words:FILE | regex:PATTERN | python:module:function | "
            "classifier:MODEL,label=toxic",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="A folder or a hub's name instead of the embedded model."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", help="Where everything goes. [default: runs/quickstart, or -own with your own]"),
    ] = None,
) -> None:
    """Compare all methods on a small embedded world whose truth is known, or on a corpus of your own.

    Nothing is downloaded: the world's texts, a model of a million parameters that has read them and a classifier are
    made at first use and kept in the user's cache (BRIDLE_CACHE). Any key of the recipe can be set, as in `bridle
    compare`. A tour that was cut short goes on where it was.
    """
    from bridle.quickstart.tour import take_tour, tour_recipe
    from bridle.training.recipe import parse_overrides

    _quiet_libraries()
    recipe = tour_recipe(corpus, constraint, model, parse_overrides(context.args))
    folder = output_dir or Path("runs") / ("quickstart-own" if corpus or constraint or model else "quickstart")
    take_tour(recipe, folder, show=typer.echo, progress=lambda line: typer.echo(line, err=True))


@app.command(epilog="Example: bridle report runs/compare-detox-mini")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `bridle compare` or `bridle train` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The page. [default: DIR/report.html]")
    ] = None,
) -> None:
    """Write one HTML page with tables, plots and texts, and every plot as PNG and SVG.

    The page needs no network and opens from the file system.
    """
    from bridle.report.html import write_report

    typer.echo(f"The report is {write_report(folder, output)}.")


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, a stopped run exit code 3."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a model or a file says, it can be printed
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
    from bridle.models.loading import load_for_inference

    _quiet_libraries()
    return load_for_inference(model, dtype, device)


def _oracles(specs: Sequence[str]) -> dict[str, Any]:
    """Constraints by name, loaded, so that a mistake shows before any text is drawn."""
    from bridle.constraints import build_constraint
    from bridle.training.recipe import constraint_of

    oracles = {}
    for spec in specs:
        refers_to_recipe = re.fullmatch(r"[^{:]+\.ya?ml:[^:]+", spec)
        oracle = constraint_of(spec) if refers_to_recipe else build_constraint(spec)
        oracle.load()
        if oracle.name in oracles:
            raise UserError(f"--constraint: two constraints are called '{oracle.name}'; name them in a recipe")
        oracles[oracle.name] = oracle
    return oracles


if __name__ == "__main__":
    main()
