"""`bridle certify`."""

from glob import glob, has_magic
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bridle.cli import common
from bridle.cli.common import load_constraints, refuse, say
from bridle.errors import UserError
from bridle.utils.quiet import quiet_libraries

app = typer.Typer()

WEIGHTS = ("guide", "guidance_scale", "perplexity", "device", "dtype")  # options that need a model's weights
NOTHING_CERTIFIED = 1  # exit code
GOAL = {"rate", "confidence", "method", "anytime", "seek"}  # with nothing else, the command says what they need

Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL...", help="Folder, adapter folder, GGUF file, hub name, or http://HOST/v1."),
]
Prompts = Annotated[
    str | None, typer.Option(metavar="FILE|NAME", help="Prompts used for nothing else; each is completed once.")
]
Constraint = Annotated[
    str | None,
    typer.Option(metavar="SPEC", help="What decides, as bridle evaluate takes it. --verify scores again by it."),
]
Rate = Annotated[float, typer.Option(help="Show that at most this share of the completions violates.")]
Confidence = Annotated[float, typer.Option(help="Of the statement.")]
Scales = Annotated[
    str | None,
    typer.Option("--guidance_scale", metavar="η,...", help="Strengths of the guidance, each a candidate. [default: 1]"),
]
Candidates = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Further models, e.g. 'RUN/checkpoint-*'; may be given several times."),
]
Development = Annotated[
    str | None, typer.Option(metavar="FILE|NAME", help="Other prompts, which order several candidates.")
]
Perplexity = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Held-out text; candidates that neither comply nor write better are left out."),
]
OracleLabels = Annotated[
    str | None,
    typer.Option(
        "--oracle_labels",
        metavar="FILE",
        help="Texts with human labels, which bound the true rate, too: label 1 violates, or a mapping in YAML with "
        "path, label and violating.",
    ),
]
Method = Annotated[
    Literal["count", "importance"],
    typer.Option(help="Count violations, or draw more of them by the R of --guide and weigh them (for rare ones)."),
]
Anytime = Annotated[bool, typer.Option("--anytime", help="Stop as soon as the result is settled.")]
Seek = Annotated[
    float | None, typer.Option(help="Share of completions that seek violations, for importance. [default: 0.1]")
]
Output = Annotated[Path, typer.Option(metavar="FILE", help="The certificate; completions are written beside it.")]
Verify = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Recompute this certificate from its completions instead.")
]


@app.command(
    epilog="Example: bridle certify runs/detox-mini/model --prompts unseen.jsonl --constraint recipe.yaml:polite "
    "--rate 0.01"
)
def certify(
    context: typer.Context,
    models: Models = None,
    prompts: Prompts = None,
    constraint: Constraint = None,
    rate: Rate = 0.01,
    confidence: Confidence = 0.95,
    guide: common.Guide = None,
    guidance_scale: Scales = None,
    candidates: Candidates = None,
    development: Development = None,
    perplexity: Perplexity = None,
    oracle_labels: OracleLabels = None,
    method: Method = "count",
    anytime: Anytime = False,
    seek: Seek = None,
    output: Output = Path("certificate.json"),
    verify: Verify = None,
    prompt_tokens: common.PromptTokens = None,
    max_new_tokens: common.MaxNewTokens = None,
    temperature: common.Temperature = None,
    top_p: common.TopP = None,
    greedy: common.Greedy = False,
    batch_size: common.BatchSize = 64,
    served: common.Served = None,
    tokenizer: common.Tokenizer = None,
    api_key_env: common.ApiKeyEnv = None,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
) -> None:
    """Show that a model's violation rate is at most a bound, exactly and one-sided; without a model, plan it.

    Candidates are ordered on --development prompts from the safest on and tested in this order, up to the first that
    fails; the last that passed is certified. Exit code 1: none is.
    """
    asked = common.asked(context)
    if verify is not None:
        _verify(verify, constraint, sorted(asked - {"verify", "constraint"}))
        return
    goal = _goal(method, seek, rate=rate, confidence=confidence, anytime=anytime)
    named = [*(models or []), *(path for pattern in candidates or [] for path in _matching(pattern))]
    if asked <= GOAL:
        say(goal.plan())
        return
    server = next((model for model in named if common.is_url(model)), "")
    refuse(
        *common.about_server(context, server, WEIGHTS),
        (server and len(named) > 1, f"{server}: is a server, which is certified alone; leave out the other models"),
        (not named, "nothing to certify: give a MODEL or --candidates"),
        (prompts is None or constraint is None, "--prompts and --constraint are needed: texts are drawn, then judged"),
        (guide is None and guidance_scale is not None, common.SCALE_WITHOUT_GUIDE),
        *_used(output),
    )
    how = common.given(prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens, temperature=temperature)
    how |= common.given(top_p=top_p, greedy=greedy)
    request = {"goal": goal, "batch_size": batch_size, "seed": seed, "device": device, "dtype": dtype}
    request["candidates"] = [(model, guide, scale, served) for model in named for scale in _scales(guidance_scale)]
    request |= {"tokenizer": tokenizer, "api_key_env": api_key_env}
    _certify(request, str(constraint), output, how, [prompts, development], perplexity, oracle_labels)


def _goal(method: Literal["count", "importance"], seek: float | None, **options: Any) -> Any:
    from bridle.certification.goal import Goal

    refuse((seek is not None and method == "count", "--seek is for --method importance"))
    return Goal(method=method, **options, **common.given(seek=seek))


def _used(output: Path) -> list[tuple[bool, str]]:
    """What would be written over."""
    from bridle.certification.certificate import completions_file

    evidence = completions_file(output)
    return [
        (output.exists(), f"{output}: exists; its prompts were used, so certify anew on others, into another file"),
        (evidence.exists(), f"{evidence}: exists, of another certificate; name another --output"),
    ]


def _certify(
    request: dict[str, Any],
    constraint: str,
    output: Path,
    how: dict[str, Any],
    prompts: list[str | None],
    perplexity: str | None,
    oracle_labels: str | None,
) -> None:
    """Runs a certification, and writes the certificate, its completions and the card."""
    from dataclasses import replace

    from bridle.certification.certificate import completions_file, write_completions
    from bridle.certification.certify import Candidate, Certification
    from bridle.data import DataSource
    from bridle.evaluation.prompt_sets import prompt_set
    from bridle.utils.files import check_output

    check_output(output, completions_file(output))
    quiet_libraries()
    (request["constraint"],) = load_constraints([constraint]).values()
    request["candidates"] = [Candidate(*one) for one in request["candidates"]]
    request["prompts"], request["development"] = (one and prompt_set(one, samples=1, **how) for one in prompts)
    common.check_tokenizer(request["tokenizer"], filter(None, (request["prompts"], request["development"])))
    request["perplexity"] = perplexity and DataSource.parse(perplexity)
    request["oracle_labels"] = oracle_labels and _labelled(oracle_labels)
    certificate, observed = Certification(**request, show=say).run()
    certificate = replace(certificate, completions_sha256=write_completions(output, observed))
    certificate.save(output)
    limits = "".join(f"\n* {limit}" for limit in certificate.limits)
    say(f"\n{certificate.statement}\nIt does not cover:{limits}")
    say(f"The certificate is in {output}, its completions in {completions_file(output)}.")
    if certificate.certified is None:
        raise typer.Exit(NOTHING_CERTIFIED)
    _write_card(certificate, output)


def _write_card(certificate: Any, output: Path) -> None:
    """Writes the certificate's block into the card of the certified model, if its folder has one."""
    from bridle.models.card import CARD_FILE, add_certificate

    if common.is_url(certificate.certified.model):
        return
    folder = Path(certificate.certified.model)
    if (folder / CARD_FILE).is_file():
        say(f"It is in the model card {add_certificate(folder, **certificate.public().card(output.name))}, too.")
    else:
        say(f"{folder} has no {CARD_FILE} to write it into.")


def _verify(path: Path, constraint: str | None, others: list[str]) -> None:
    """Recomputes a certificate, and says what was checked; `others` are options that do not go with it."""
    from bridle.certification.certificate import Certificate

    refuse((others, f"--verify reads a certificate; leave out {', '.join(others)}"))
    certificate = Certificate.load(path)
    loaded = next(iter(load_constraints([constraint]).values())) if constraint else None
    certificate.verify(path, loaded)
    count = sum(tried.n for tried in certificate.tried)
    scores = "scored again" if loaded else "with the verdicts in the file (give --constraint to score them again)"
    weights = " and the weights in the file" if certificate.goal.method == "importance" else ""
    say(f"{path}: agrees with its {count:,} completions, {scores}{weights}.\n{certificate.statement}")


def _scales(text: str | None) -> list[float]:
    try:
        return [float(part) for part in (text or "1").split(",")]
    except ValueError:
        raise UserError(f"--guidance_scale: {text!r} is not a list of numbers such as 0,1,2") from None


def _matching(pattern: str) -> list[str]:
    """The files and folders of a pattern; the name itself where none matches, since it may be one on the hub."""
    found = sorted(glob(pattern))
    if not found and has_magic(pattern):
        raise UserError(f"--candidates: nothing matches {pattern}")
    return found or [pattern]


def _labelled(text: str) -> Any:
    """Labelled rows from FILE,key=value, or from a mapping in YAML."""
    from bridle.evaluation.examination import LabelledRows
    from bridle.utils.settings import as_mapping, build, parse_yaml

    if text.lstrip().startswith("{"):
        return build(
            LabelledRows, as_mapping(parse_yaml(text, "--oracle_labels"), "--oracle_labels"), "--oracle_labels"
        )
    return LabelledRows.parse(text)
