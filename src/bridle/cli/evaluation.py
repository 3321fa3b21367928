"""`bridle evaluate`, `score` and `judge`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bridle.cli import common
from bridle.cli.common import load_constraints, refuse, say
from bridle.errors import UserError
from bridle.utils.quiet import quiet_libraries

app = typer.Typer()

Prompts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|NAME",
        help="Prompts to complete: a file, or toxigen, toxigen-llama2 or realtoxicityprompts; several times for "
        "several sets. "
        "FILE,rows=90%:,label=1 takes some of the rows.",
    ),
]
Constraints = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPEC",
        help="classifier:MODEL,label=toxic,threshold=0.5 | guard:MODEL,family=llama-guard | words:FILE | "
        "regex:PATTERN | python:module:function | RECIPE.yaml:name | a mapping in YAML, as in a recipe. Give it "
        "several times to see the oracle that was trained on beside an independent one.",
    ),
]
HeldOut = Annotated[list[str] | None, typer.Option(metavar="FILE", help="Held-out text; may be given several times.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="lm-eval tasks, by comma: mmlu, commonsense-4, commonsense-8, or one of its eight."
    ),
]
TaskData = Annotated[
    Path | None, typer.Option("--task_data", metavar="DIR", help="Read tasks from NAME.SPLIT.jsonl files here.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Number of documents of a task, from the first. [default: all]")]
Shots = Annotated[
    int | None, typer.Option(min=0, help="Examples in front of a document. [default: 5 for mmlu, else 0]")
]
Classify = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Labelled rows (text, label 0 or 1) to classify by the likelihood of the label in words."
    ),
]
Validation = Annotated[
    str | None, typer.Option(metavar="FILE", help="Labelled rows that choose --classify's threshold.")
]
Base = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Measure the completions' perplexity under this model.")
]
PromptData = Annotated[
    Path | None, typer.Option("--prompt_data", metavar="DIR", help="Where named prompt sets lie as local files.")
]
Completions = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write what was drawn here, a JSON line each, with scores.")
]
Examine = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Examine the judge first, on pairs from this held-out human text whose better one is known; without "
        "methods, only examine it.",
    ),
]
By = Annotated[
    Literal["verdict", "likelihood"],
    typer.Option(help="Ask for a verdict, or compare the completions' likelihoods per token."),
]
Examples = Annotated[int, typer.Option(min=0, help="Pairs from other rows of --examine that a verdict is shown first.")]
Url = Annotated[
    str | None,
    typer.Option(help="Ask an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1, not a local model."),
]
WEIGHTS = ("guide", "guidance_scale", "perplexity", "tasks", "classify", "base", "batch_size", "device", "dtype")
"""Options that need a model's weights."""

Keep = Annotated[
    Path, typer.Option(metavar="FILE", help="Verdicts are kept here as they come, in place of earlier ones.")
]


@app.command(
    epilog="Example: bridle evaluate runs/detox-mini/model --prompts unseen.jsonl "
    "--constraint classifier:oracle,label=toxic --perplexity heldout.jsonl --tasks piqa,mmlu --json results.json"
)
def evaluate(
    context: typer.Context,
    model: common.MeasuredModel,
    prompts: Prompts = None,
    constraint: Constraints = None,
    guide: common.Guide = None,
    samples: common.Samples = None,
    perplexity: HeldOut = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    limit: Limit = None,
    shots: Shots = None,
    classify: Classify = None,
    validation: Validation = None,
    base: Base = None,
    prompt_data: PromptData = None,
    completions: Completions = None,
    json_file: common.JsonFile = None,
    prompt_tokens: common.PromptTokens = None,
    max_new_tokens: common.MaxNewTokens = None,
    temperature: common.Temperature = None,
    top_p: common.TopP = None,
    greedy: common.Greedy = False,
    batch_size: common.BatchSize = 64,
    guidance_scale: common.GuidanceScale = 1.0,
    served: common.Served = None,
    tokenizer: common.Tokenizer = None,
    api_key_env: common.ApiKeyEnv = None,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
) -> None:
    """Measure what a model says (violations), what it knows (perplexity, tasks), each figure with its interval.

    Of a model behind an OpenAI-compatible server, http://HOST/v1 --model NAME, violations and text are measured.
    A figure's n counts what it is made from; texts that could not be scored are missing, never a number.
    """
    how = common.given(prompt_tokens=prompt_tokens, samples=samples, max_new_tokens=max_new_tokens)
    how |= common.given(temperature=temperature, top_p=top_p, greedy=greedy)
    of_tasks = common.given(task_data=task_data, limit=limit, shots=shots)
    measured = prompts or perplexity or tasks or classify
    refuse(
        *common.about_server(context, model, WEIGHTS),
        (bool(prompts) != bool(constraint), "--prompts and --constraint go together: texts are drawn, then scored"),
        (completions and not prompts, "--completions keeps the completions of --prompts; give both"),
        (how and not prompts, f"--{next(iter(how), '')} says how --prompts are completed; give both"),
        (base and not prompts, "--base measures the completions of --prompts; give both"),
        (prompt_data and not prompts, "--prompt_data is where named --prompts lie; give both"),
        (of_tasks and not tasks, f"--{next(iter(of_tasks), '')} is for --tasks; give both"),
        (guide is None and guidance_scale != 1, common.SCALE_WITHOUT_GUIDE),
        (bool(classify) != bool(validation), "--classify and --validation go together: one chooses the threshold"),
        (not measured, "nothing to measure: give --prompts with --constraint, --perplexity, --tasks or --classify"),
    )
    plan = _plan(prompts or [], prompt_data, how, constraint or [], perplexity or [])
    plan |= common.given(tasks=tasks and tasks.split(",")) | of_tasks
    plan |= _classification(classify, validation) | {"batch_size": batch_size}
    how = {"guide": guide, "guidance_scale": guidance_scale, "base": base, "device": device, "dtype": dtype}
    how = {"name": served, "tokenizer": tokenizer, "api_key_env": api_key_env} if served is not None else how
    _measure(model, plan, completions, json_file, **how, seed=seed)


def _plan(
    prompts: list[str], data_dir: Path | None, how: dict[str, Any], constraints: list[str], held_out: list[str]
) -> dict[str, Any]:
    """The prompts, constraints and held-out texts of a plan."""
    from bridle.data import DataSource
    from bridle.evaluation.prompt_sets import prompt_set

    return {
        "prompts": {one: prompt_set(one, data_dir=data_dir, defaults={"samples": 1}, **how) for one in prompts},
        "constraints": load_constraints(constraints),
        "perplexity": {name: DataSource.parse(name) for name in held_out},
    }


def _classification(test: str | None, validation: str | None) -> dict[str, Any]:
    """The classification options of a plan."""
    from bridle.comparison.plan import ClassificationOptions
    from bridle.data import DataSource, VerbalisedLabel

    if test is None or validation is None:
        return {}
    rows = ClassificationOptions(validation=DataSource.parse(validation), test=DataSource.parse(test))
    return {"classification": rows, "label": VerbalisedLabel()}


def _measure(model: str, plan: dict[str, Any], completions: Path | None, json_file: Path | None, **how: Any) -> None:
    """Measures a model as `how` says, shows the figures, and writes them and the completions if asked."""
    from bridle.comparison.measure import measure, measure_served
    from bridle.comparison.plan import Evaluation
    from bridle.evaluation.results import write_results
    from bridle.utils.files import check_output, write_rows

    common.check_tokenizer(how.get("tokenizer"), plan["prompts"].values())
    check_output(json_file, completions)
    quiet_libraries()
    results, observations = (measure_served if "name" in how else measure)(model, Evaluation(**plan), show=say, **how)
    if completions is not None:
        write_rows(completions, observations.completions)
        results["completions"] = str(completions)
    if json_file is not None:
        write_results(json_file, results)


@app.command(epilog="Example: bridle score classifier:oracle,label=toxic comments.jsonl")
def score(
    constraint: Annotated[str, typer.Argument(metavar="SPEC", help="A constraint, as bridle evaluate takes it.")],
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Rows of text, prompts and completions, or chats; FILE,rows=0:100.")
    ],
    rows: Annotated[int, typer.Option(min=0, help="How many of the surest and of the least sure rows to name.")] = 5,
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
    (loaded,) = load_constraints([constraint]).values()
    trial = try_constraint(loaded, DataSource.parse(file))
    for line in trial.lines(rows, show_texts):
        say(line)
    if json_file is not None:
        write_json(json_file, {"file": file, **trial.to_json(show_texts), "specification": loaded.describe()})


@app.command(
    epilog="Example: bridle judge base=base.jsonl tuned=tuned.jsonl --judge facebook/opt-30b "
    "--examine held-out.jsonl,rows=80%:90% --json wins.json"
)
def judge(
    context: typer.Context,
    judge_model: Annotated[str, typer.Option("--judge", metavar="MODEL", help="The judge: a folder, or a name.")],
    completions: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=FILE...", help="What `bridle generate --output` wrote, by method."),
    ] = None,
    examine: Examine = None,
    by: By = "verdict",
    examples: Examples = 0,
    url: Url = None,
    api_key_env: common.ApiKeyEnv = None,
    json_file: common.JsonFile = None,
    keep: Keep = Path("verdicts.jsonl"),
    batch_size: common.BatchSize = 8,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
) -> None:
    """Let a language model judge which method's completions are better, pair by pair and in both orders."""
    from bridle.comparison.plan import JudgeOptions
    from bridle.evaluation.judge_examination import HumanText, examine_judge
    from bridle.evaluation.results import FORMAT, write_results
    from bridle.evaluation.win_rate import read_methods, win_rates
    from bridle.utils.files import check_output
    from bridle.utils.provenance import environment

    files = _files_by_method(completions or [])
    if (files or not examine) and (len(files) < 2 or not all(files.values())):
        raise UserError("give at least two methods as NAME=FILE, or --examine to examine the judge alone")
    local = ("batch_size", "device", "dtype")
    refuse(*((url and name in common.asked(context), common.needs_weights(name)) for name in local))
    rows = HumanText.parse(examine) if examine else None
    options = JudgeOptions(judge_model, url, api_key_env, by=by, examples=examples, examine=rows)
    check_output(json_file, keep)
    quiet_libraries()
    prompts, texts = read_methods(files)
    continuations = options.continuations()
    asked = options.judge(dtype, device, batch_size=batch_size)
    if keep.is_file():
        keep.unlink()  # verdicts are appended
    found = {"format": FORMAT, "model": ", ".join(files) or judge_model}
    if continuations is not None:
        examined = examine_judge(asked, continuations, seed=seed, keep=keep)
        say(str(examined))
        found["judge_examined"] = examined.to_json()
    if files:
        rates = win_rates(prompts, texts, asked, seed=seed, keep=keep)
        say(str(rates))
        found["win_rate"] = rates.to_json()
    if json_file is not None:
        write_results(json_file, found | {"environment": environment(seed)})


def _files_by_method(given: list[str]) -> dict[str, str]:
    """The files of NAME=FILE, by name."""
    files: dict[str, str] = {}
    for part in given:
        name, _, file = part.partition("=")
        if name in files:
            raise UserError(f"{name}: is given twice; give each method a name of its own")
        files[name] = file
    return files
