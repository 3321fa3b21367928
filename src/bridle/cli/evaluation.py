"""`bridle evaluate`, `score` and `judge`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bridle.cli.common import (
    BatchSize,
    Device,
    Dtype,
    Guide,
    GuidePower,
    MaxNewTokens,
    Model,
    PromptTokens,
    Samples,
    Seed,
    load,
    oracles_of,
    say,
)
from bridle.errors import UserError

app = typer.Typer()


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
    completions: Annotated[
        Path | None,
        typer.Option("--completions", metavar="FILE", help="Write what was drawn here, a JSON line each, with scores."),
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
    from bridle.evaluation import FORMAT, Evaluator, prompt_set, write_results
    from bridle.models.guidance import guided
    from bridle.utils.files import check_output, write_rows
    from bridle.utils.provenance import environment

    if bool(prompts) != bool(constraint):
        raise UserError("--prompts and --constraint go together: texts are drawn from one and scored by the other")
    if completions and not prompts:
        raise UserError("--completions keeps what --prompts are completed with; give some, with a --constraint")
    if guide is None and guide_power != 1:
        raise UserError("--guide_power is the strength of a --guide; name one, or leave it out")
    if bool(classify) != bool(validation):
        raise UserError("--classify and --validation go together: the threshold is chosen on rows of its own")
    if not (prompts or perplexity or tasks or classify):
        raise UserError("nothing to measure: give --prompts with --constraint, --perplexity, --tasks or --classify")
    check_output(json_file, completions)
    sets = [prompt_set(name, data_dir=prompt_data) for name in prompts or []]
    oracles = oracles_of(constraint or [])
    held_out = {name: texts_of(DataSource.parse(name)) for name in perplexity or []}
    lm, tokenizer = load(model, device, dtype)
    base_model = load(base, device, dtype) if base else None
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": model,
        "guide": guide,
        "settings": {"samples": samples, "max_new_tokens": max_new_tokens, "guide_power": guide_power},
        "prompt_sets": {one.name: one.describe() for one in sets},
        "constraints": {name: oracle.describe() for name, oracle in oracles.items()},
    }
    with guided(lm, guide, guide_power) as guidance:
        evaluator = Evaluator(lm, tokenizer, guidance, batch_size, seed, show=say)
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
    if completions is not None:
        write_rows(completions, evaluator.observations.completions)
        results["completions"] = str(completions)
    if json_file is not None:
        write_results(json_file, results | {"environment": environment(seed)})


@app.command(epilog="Example: bridle score classifier:oracle,label=toxic comments.jsonl")
def score(
    constraint: Annotated[str, typer.Argument(metavar="SPEC", help="A constraint, as bridle evaluate takes it.")],
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Rows of text, prompts and completions, or chats; FILE,rows=0:100.")
    ],
    rows: Annotated[
        int, typer.Option("--rows", min=0, help="How many of the surest and of the least sure rows to name.")
    ] = 5,
    show_texts: Annotated[
        bool, typer.Option("--show_texts", help="Print, and keep in --json, the rows' texts, whatever they say.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures and every row's score here.")
    ] = None,
) -> None:
    """Try a constraint on texts: how often they violate, how sure it is of it, and of which rows."""
    from bridle.data import DataSource
    from bridle.evaluation.scoring import try_constraint
    from bridle.utils.files import check_output, write_json

    check_output(json_file)
    (oracle,) = oracles_of([constraint]).values()
    trial = try_constraint(oracle, DataSource.parse(file))
    for line in trial.lines(rows, show_texts):
        say(line)
    if json_file is not None:
        write_json(json_file, {"file": file, **trial.to_json(show_texts), "specification": oracle.describe()})


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
    from bridle.evaluation import FORMAT, ChatJudge, LocalJudge, read_methods, win_rates, write_results
    from bridle.utils.files import check_output
    from bridle.utils.provenance import environment

    files = dict(part.partition("=")[::2] for part in completions)
    if len(files) < 2 or not all(files.values()):
        raise UserError("give at least two methods as NAME=FILE")
    if api_key_env is not None and url is None:
        raise UserError("--api_key_env: a local judge needs no key; give --url, or leave it out")
    check_output(json_file, keep)
    prompts, texts = read_methods(files)
    arbiter = (
        ChatJudge(url, judge_model, api_key_env)
        if url
        else LocalJudge(*load(judge_model, device, dtype), batch_size=batch_size)
    )
    rates = win_rates(prompts, texts, arbiter, seed=seed, keep=keep)
    say(str(rates))
    if json_file is not None:
        found = {"format": FORMAT, "model": ", ".join(files), "win_rate": rates.to_json()}
        write_results(json_file, found | {"environment": environment(seed)})
