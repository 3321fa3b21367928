"""What a report is made from: the folder of a comparison, or of one training run, read and checked."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from bridle.errors import UserError
from bridle.evaluation.statistics import Comparison, Estimate
from bridle.evaluation.win_rate import WinRates
from bridle.utils.files import checked, read_json, read_rows, read_text
from bridle.utils.progress import track

Group = Literal["violation", "text", "perplexity", "tasks", "classification", "cost"]  # of `Figures`

FORMAT = 1  # of a comparison's results.json
MOST_ROUNDS = 6  # of which rollouts or reliability are shown; of more, as many evenly spaced ones
SHOWN_ROLLOUTS = 3  # of each round and regulariser

T = TypeVar("T")


@dataclass(frozen=True)
class Figure(Estimate):
    """One figure of a method: the mean over its seeds, with a 95% interval; any number may be missing.

    Attributes:
        spread: standard deviation over seeds; None with one seed.
        seeds: how many seeds it is the mean of.
    """

    spread: float | None = None
    seeds: int = 1

    @property
    def known(self) -> float:
        """The value, where a missing figure has been ruled out."""
        assert self.value is not None, "a missing figure is not drawn"
        return self.value


@dataclass(frozen=True)
class Figures:
    """All figures of a method; a group that was not measured is empty.

    Attributes:
        violation: by prompt set and constraint, the share of completions that violate.
        text: by prompt set and name, distinct_2, mean_length (words) and the like.
        perplexity: by held-out set, per token.
        tasks: by name, accuracy in [0, 1].
        classification: by name, roc_auc and the like.
        cost: by name, seconds, tokens_trained, updates.
    """

    violation: dict[str, dict[str, Figure]] = field(default_factory=dict)
    text: dict[str, dict[str, Figure]] = field(default_factory=dict)
    perplexity: dict[str, Figure] = field(default_factory=dict)
    tasks: dict[str, Figure] = field(default_factory=dict)
    classification: dict[str, Figure] = field(default_factory=dict)
    cost: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class SeedRun:
    """One method under one seed: how it ended, why it failed, and its folder within the comparison's."""

    status: Literal["complete", "failed", "missing"]
    folder: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Method:
    """One row of the comparison: `seeds` by seed, as text."""

    description: str = ""
    seeds: dict[str, SeedRun] = field(default_factory=dict)
    figures: Figures = Figures()

    @property
    def status(self) -> Literal["complete", "partial", "failed", "missing"]:
        """Of all seeds together: "partial" where some are complete and others are not."""
        found = {run.status for run in self.seeds.values()}
        if "complete" in found:
            return "complete" if found == {"complete"} else "partial"
        return "failed" if "failed" in found else "missing"


@dataclass(frozen=True)
class Main:
    """What the trade-off is drawn from first."""

    prompt_set: str
    constraint: str
    held_out: str | None = None


@dataclass(frozen=True)
class FigureComparison(Comparison):
    """A method against the best on one figure.

    Attributes:
        figure: its group; a `difference` of "perplexity" is one of its logarithm, in nats per token.
        on: the prompt set, held-out set, task or name.
        constraint: None for a figure that needs none.
    """

    figure: Group
    on: str
    constraint: str | None = None


@dataclass(frozen=True)
class RegulariserRound:
    """One regulariser in one round, by the names of `metrics.jsonl`; None is what a round did not measure.

    Attributes:
        kl: KL(q‖p) in nats per prefix, the mean over the round.
        kl_unreached: share of the corpus's prefixes that the KL left out, since no rollout can be there.
        weight: λ.
        r_reliability: per non-empty bin R's mean prediction, the observed rate and the count.
        rollouts: how many were drawn, and `rollouts_missing` how many of them have no score.
        clipped: share of the rollouts that were cut at the length limit.
        truncated: rollouts that the constraint read in part only.
        fit: what R was fitted on: "fitted", "replay", "kept" or "none".
    """

    compliance: float | None = None
    compliance_low: float | None = None
    compliance_high: float | None = None
    kl: float | None = None
    kl_unreached: float | None = None
    weight: Annotated[float | None, Field(validation_alias="lambda")] = None
    r_brier: float | None = None
    r_ece: float | None = None
    r_reliability: list[tuple[float, float, int]] = field(default_factory=list)
    rollouts: int | None = None
    rollouts_missing: int | None = None
    clipped: float | None = None
    truncated: float | None = None
    fit: str | None = None

    @property
    def scored(self) -> int:
        """How many rollouts the compliance is made from."""
        return (self.rollouts or 0) - (self.rollouts_missing or 0)


@dataclass(frozen=True)
class Round:
    """One round: its number from 1, the policy's step at its end, the corpus's CE in nats per token."""

    number: int
    step: int
    ce: float | None = None
    regularisers: dict[str, RegulariserRound] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """One training run: a method under a seed, its rounds, and what its guards warned of, in order."""

    method: str
    seed: str
    rounds: list[Round]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """What a constraint said of a completion: 1 complies .. 0 violates; None is missing, with the reason."""

    value: float | None = None
    complies: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """One sample: untrusted text.

    Attributes:
        index: counts the prompt set's prompts, from 0.
        sample: counts a prompt's samples, from 0.
        scores: of the completion, by constraint.
        prompt_scores: of the prompt, by constraint.
    """

    method: str
    seed: str
    prompt_set: str
    index: int
    sample: int
    prompt: str
    completion: str
    scores: dict[str, Score] = field(default_factory=dict)
    prompt_scores: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout(Score):
    """A completion drawn in training, with its score: untrusted text. `finished` is false where it was cut."""

    prompt: str = ""
    completion: str = ""
    round: int = 0
    regulariser: str = ""
    constraint: str = ""
    finished: bool = True


@dataclass(frozen=True)
class Shift:
    """A token whose probability guidance changes from p to q."""

    text: str
    p: float
    q: float


@dataclass(frozen=True)
class GuidedToken:
    """One token of a guided text.

    Attributes:
        text: the token as text, white space included.
        p: p(token | prefix); None for the first.
        r: R of the prefix that ends with it: the chance that the whole output will comply.
        q: q(token | prefix).
        gains: tokens that q gives most to in its place, the largest q − p first.
        losses: tokens that q takes most from.
        kl: KL(q‖p) of the next-token probabilities in its place, in nats; None where it was not recorded.
    """

    text: str
    p: float | None = None
    r: float | None = None
    q: float | None = None
    gains: list[Shift] = field(default_factory=list)
    losses: list[Shift] = field(default_factory=list)
    kl: float | None = None


@dataclass(frozen=True)
class Guidance:
    """What R and q say of one text, token by token; the first `prompt_tokens` tokens are the prompt."""

    model: str
    regulariser: str
    constraint: str
    text: str
    prompt_tokens: int
    tokens: list[GuidedToken]
    violates: bool | None = None
    value: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything there is to show; the folder of a training run has only curves and its environment.

    Attributes:
        recipe: the recipe's name.
        seeds: that were asked for.
        main: None where no methods were compared.
        settings: what was asked of the evaluation.
        methods: by name, in the order of the tables.
        comparisons: of each method with the best.
        win_rate: None where no judge was asked, or it failed.
        judge_failed: why there are no win rates.
        environment: where and how the results were made.
        curves: one a training run, in the order of methods and seeds.
        completions: of all methods and seeds.
        rollouts: some of a training run, by round and regulariser.
        guidance: None where it was not recorded.
        recipe_text: the recipe as resolved, in YAML.
    """

    recipe: str
    seeds: list[int] = field(default_factory=list)
    main: Main | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    comparisons: list[FigureComparison] = field(default_factory=list)
    win_rate: WinRates | None = None
    judge_failed: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    guidance: Guidance | None = None
    recipe_text: str = ""


def read_report(folder: Path) -> Report:
    """Reads the folder that `bridle compare` or `bridle train` left; parts that are absent stay empty.

    Raises:
        UserError: the folder is neither, or a file in it is broken, naming file, row and key.
    """
    if os.path.isfile(folder / "metrics.jsonl"):  # beside it may stand a results.json, of this one model
        report = _read_training_run(folder)
    elif os.path.isfile(folder / "results.json"):
        report = _read_comparison(folder)
    else:
        raise UserError(f"{folder}: neither results.json nor metrics.jsonl; give the folder of a comparison or a run")
    recipe = folder / "recipe.yaml"
    return replace(report, recipe_text=read_text(recipe) if recipe.is_file() else "")


def _read_comparison(folder: Path) -> Report:
    path = folder / "results.json"
    found = read_json(path, dict[str, Any])
    if found.get("format") != FORMAT or "methods" not in found:
        raise UserError(f"{path}: not the results of a comparison in format {FORMAT}; write it with bridle compare")
    report = checked(Report, found, str(path))
    runs = list(_runs(report, folder))
    return replace(
        report,
        curves=[curve for run in runs if (curve := _curve(*run)).rounds],
        completions=[row for run in track(runs, "reading completions", unit="models") for row in _completions(*run)],
        guidance=_guidance(folder / "guidance.json"),
    )


def _read_training_run(folder: Path) -> Report:
    path = folder / "environment.json"
    environment = read_json(path, dict[str, Any]) if path.is_file() else {}
    seed = environment.get("seed", 0)
    name = folder.resolve().name
    curves, rollouts = [_curve(name, str(seed), folder)], list(_rollouts(folder / "rollouts"))
    return Report(recipe=name, seeds=[seed], environment=environment, curves=curves, rollouts=rollouts)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, in their order and equally far apart; the first and the last are among them."""
    last = len(items) - 1
    places = range(count) if count > 1 and last >= count else range(len(items))
    return [items[round(place * last / (count - 1)) if last >= count else place] for place in places]


def _rollouts(folder: Path) -> Iterator[Rollout]:
    """Some rollouts of some rounds, each regulariser's: `round-N.REGULARISER.jsonl` holds them all."""
    files: dict[int, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("round-*.*.jsonl")):
        number = path.name.removeprefix("round-").partition(".")[0]
        if number.isdecimal():
            files[int(number)].append(path)
    for index in spread(sorted(files), MOST_ROUNDS):
        for path in files[index]:
            yield from (checked(Rollout, row, place) for place, row in spread(list(_rows(path)), SHOWN_ROLLOUTS))


def _runs(report: Report, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Method, seed and folder of every model that was to be made."""
    for name, method in report.methods.items():
        for seed, run in method.seeds.items():
            inner = PurePath(run.folder or f"{name}/seed-{seed}")
            if inner.is_absolute() or ".." in inner.parts:
                raise UserError(
                    f"{folder / 'results.json'}: methods.{name}.seeds.{seed}.folder: leads out of the folder"
                )
            yield name, seed, folder / inner


def _curve(method: str, seed: str, folder: Path) -> Curve:
    rows = list(_rows(folder / "metrics.jsonl"))
    rounds = [checked(Round, _round(row), place) for place, row in rows if "round" in row]
    warnings = [checked(list[str], row["warnings"], place) for place, row in rows if "warnings" in row]
    return Curve(method, seed, rounds, list(chain.from_iterable(warnings)))


def _round(record: Mapping[str, Any]) -> dict[str, Any]:
    """A round's record, whose keys are DOMAIN/WHAT, kl/DOMAIN and kl_unreached/DOMAIN, by domain."""
    domains: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in record.items():
        domain, slash, what = key.rpartition("/")
        if domain in ("kl", "kl_unreached"):
            domains[what][domain] = value
        elif slash:
            domains[domain][what] = value
    return {"number": record["round"], **record, "regularisers": dict(domains)}


def _completions(method: str, seed: str, folder: Path) -> Iterator[Completion]:
    for place, row in _rows(folder / "completions.jsonl"):
        yield checked(Completion, {**row, "method": method, "seed": seed}, place)


def _guidance(path: Path) -> Guidance | None:
    return read_json(path, Guidance) if path.is_file() else None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place; none where there is no file."""
    if path.is_file():
        yield from read_rows(path)
