"""Reads and checks the data of a report: the folder of a comparison or of one training run."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from bridle.errors import UserError
from bridle.evaluation.judge_examination import JudgeExamination
from bridle.evaluation.prompt_sets import GenerationOptions
from bridle.evaluation.statistics import Comparison, Estimate
from bridle.evaluation.win_rate import WinRates
from bridle.utils.files import checked, read_json, read_rows, read_text
from bridle.utils.progress import track

Group = Literal["violation", "transfer", "text", "perplexity", "tasks", "classification", "cost"]  # of `Figures`

FORMAT = 1  # of a comparison's results.json
MOST_ROUNDS = 6  # whose rollouts or reliability are shown, evenly spaced
SHOWN_ROLLOUTS = 3  # per round and regulariser

T = TypeVar("T")


@dataclass(frozen=True)
class Figure(Estimate):
    """A method's figure: the mean over `seeds` seeds with a 95% interval; `spread` is their standard deviation."""

    spread: float | None = None
    seeds: int = 1

    @property
    def known(self) -> float:
        """The value of a figure that is not missing."""
        assert self.value is not None, "a missing figure is not drawn"
        return self.value


@dataclass(frozen=True)
class Figures:
    """A method's figures by group.

    Attributes:
        violation: shares of violating completions, by prompt set and constraint.
        transfer: transfer ratios (`evaluation.transfer`), by prompt set and independent constraint.
        text: distinct_2, mean_length (words) and others, by prompt set and name.
        perplexity: per token, by held-out set.
        tasks: accuracies in [0, 1], by task.
        classification: roc_auc and others, by name.
        cost: seconds, tokens_trained and updates, by name.
    """

    violation: dict[str, dict[str, Figure]] = field(default_factory=dict)
    transfer: dict[str, dict[str, Figure]] = field(default_factory=dict)
    text: dict[str, dict[str, Figure]] = field(default_factory=dict)
    perplexity: dict[str, Figure] = field(default_factory=dict)
    tasks: dict[str, Figure] = field(default_factory=dict)
    classification: dict[str, Figure] = field(default_factory=dict)
    cost: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class SeedRun:
    """A method's run with one seed: status, folder within the comparison's, and the reason of a failure."""

    status: Literal["complete", "failed", "missing"]
    folder: str
    reason: str | None = None


@dataclass(frozen=True)
class Method:
    """A method of the comparison, with its runs by seed; `reference` is what its transfer ratios refer to."""

    description: str = ""
    seeds: dict[str, SeedRun] = field(default_factory=dict)
    figures: Figures = Figures()
    reference: str | None = None

    @property
    def status(self) -> Literal["complete", "partial", "failed", "missing"]:
        """The status of all seeds together; "partial" if only some are complete."""
        found = {run.status for run in self.seeds.values()}
        if "complete" in found:
            return "complete" if found == {"complete"} else "partial"
        return "failed" if "failed" in found else "missing"


@dataclass(frozen=True)
class Main:
    """The sets and the constraint of the main figures; `trained_on` is the training oracle, if it was measured."""

    prompt_set: str
    constraint: str
    held_out: str | None = None
    trained_on: str | None = None

    @property
    def is_independent(self) -> bool:
        """Whether nothing was trained on the main constraint, and its rates have the training oracle's beside them."""
        return self.trained_on not in (None, self.constraint)


@dataclass(frozen=True)
class FigureComparison(Comparison):
    """A method compared with the best one on the figure `on` (prompt set, held-out set, task or name) of a group.

    The difference of a perplexity is that of its logarithm, in nats per token.
    """

    figure: Group
    on: str
    constraint: str | None = None


@dataclass(frozen=True)
class RegulariserRound:
    """A regulariser's figures of one round, named as in `metrics.jsonl`; None if not measured.

    Attributes:
        kl: mean KL(q‖p), nats per prefix.
        kl_unreached: share of the corpus's prefixes that the KL excludes because no rollout can reach them.
        weight: λ.
        violation: of the plain rollouts, as the target counts it; None without a target.
        target: the highest violation that is allowed.
        r_reliability: mean prediction of R, observed rate and count of each non-empty bin.
        rollouts_missing: number of rollouts without a score.
        clipped: share of rollouts cut at the length limit.
        truncated: number of rollouts that the constraint read in part.
        fit: what R was fitted on: "fitted", "replay", "kept", "none" or "unlabelled".
    """

    compliance: float | None = None
    compliance_low: float | None = None
    compliance_high: float | None = None
    kl: float | None = None
    kl_unreached: float | None = None
    weight: Annotated[float | None, Field(validation_alias="lambda")] = None
    violation: float | None = None
    target: float | None = None
    r_brier: float | None = None
    r_skill: float | None = None
    r_ece: float | None = None
    r_reliability: list[tuple[float, float, int]] = field(default_factory=list)
    rollouts: int | None = None
    rollouts_missing: int | None = None
    clipped: float | None = None
    truncated: float | None = None
    fit: str | None = None

    @property
    def scored(self) -> int:
        """Number of rollouts with a score."""
        return (self.rollouts or 0) - (self.rollouts_missing or 0)


@dataclass(frozen=True)
class Round:
    """A round: its number from 1, the step at its end, the CE of the corpus in nats per token."""

    number: int
    step: int
    ce: float | None = None
    regularisers: dict[str, RegulariserRound] = field(default_factory=dict)


@dataclass(frozen=True)
class Reached:
    """What a trained model's rollouts violate, with its 95% interval, and the target: the highest that is allowed.

    Attributes:
        violation_reached, violation_reached_low, violation_reached_high: the rate; or of a target on the mean score
            1 − that score.
        target: the highest violation that is allowed.
        violation_bound: on the rate, where the target has a confidence.
        mean_score_reached: of a target on the mean score.
    """

    violation_reached: float
    violation_reached_low: float
    violation_reached_high: float
    target: float
    violation_bound: float | None = None
    mean_score_reached: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the violation, or its bound where a confidence was asked for, is at or below the target."""
        return (self.violation_reached if self.violation_bound is None else self.violation_bound) <= self.target


@dataclass(frozen=True)
class Curve:
    """The rounds and warnings of one training run, and by regulariser how its target was reached, if it has one."""

    method: str
    seed: str
    rounds: list[Round]
    warnings: list[str] = field(default_factory=list)
    targets: dict[str, Reached] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A constraint's score of a text, from 0 (violates) to 1 (complies); None if missing, with the reason."""

    value: float | None = None
    complies: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """A sample, untrusted text, with scores by constraint; `index` counts prompts and `sample` a prompt's samples."""

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
    """A completion drawn in training, untrusted text; `finished` is false if it was cut at the length limit."""

    prompt: str = ""
    completion: str = ""
    round: int = 0
    regulariser: str = ""
    constraint: str = ""
    finished: bool = True


@dataclass(frozen=True)
class Shift:
    """A token whose probability changes from p to q."""

    text: str
    p: float
    q: float


@dataclass(frozen=True)
class GuidedToken:
    """A token of a guided text.

    Attributes:
        text: the token with its white space.
        p: p(token | prefix); None for the first.
        r: R of the prefix that ends with this token, the probability that the whole output complies.
        q: q(token | prefix).
        gains: alternatives with the largest q − p, in descending order.
        losses: alternatives with the smallest q − p.
        kl: KL(q‖p) of the next-token distribution, in nats; None for the first.
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
    """R, p and q along one text, whose first `prompt_tokens` tokens are the prompt.

    p is that of the model before tuning, whatever `model` wrote the text; `guidance_scale` is η of q. `tilt` is w of
    the share that R was fitted to, and None if R is the probability of compliance.
    """

    model: str
    regulariser: str
    constraint: str
    text: str
    prompt_tokens: int
    tokens: list[GuidedToken]
    violates: bool | None = None
    value: float | None = None
    guidance_scale: float = 1.0
    tilt: float | None = None


@dataclass(frozen=True)
class Report:
    """The data of a report; the fields of a training run are recipe, seeds, environment, curves and rollouts.

    Attributes:
        recipe: the recipe's name.
        main: None for a training run.
        settings: settings of the evaluation.
        prompt_sets: how prompts were completed, by set.
        methods: methods by name, in the order of the tables.
        examined: AUC of each constraint on each set of rows with human labels.
        comparisons: comparisons of each method with the best one.
        win_rate: None without a judge, or if it failed.
        judge_failed: why the judge failed.
        judge_examined: what the judge was worth on pairs with a known answer; None if it was not examined.
        curves: training runs in the order of methods and seeds.
        rollouts: some rollouts, by round and regulariser.
        recipe_text: the resolved recipe, YAML.
    """

    recipe: str
    seeds: list[int] = field(default_factory=list)
    main: Main | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    prompt_sets: dict[str, GenerationOptions] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    examined: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    comparisons: list[FigureComparison] = field(default_factory=list)
    win_rate: WinRates | None = None
    judge_failed: str | None = None
    judge_examined: JudgeExamination | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    guidance: Guidance | None = None
    recipe_text: str = ""

    @property
    def win_rates_mean_something(self) -> bool:
        """Whether there are win rates, by a judge that did not fail its examination."""
        return self.win_rate is not None and (self.judge_examined is None or self.judge_examined.passed)


def read_report(folder: Path) -> Report:
    """Reads the output folder of `bridle compare` or `bridle train`; absent parts stay empty.

    Raises:
        UserError: the folder is neither, or a file in it is broken, naming file, row and key.
    """
    if os.path.isfile(folder / "metrics.jsonl"):  # a model's own results.json may be beside it
        report = _read_training_run(folder)
    elif (results := results_of(folder)) is not None:
        report = _read_comparison(folder, results)
    else:
        raise UserError(f"{folder}: neither results.json nor metrics.jsonl; give the folder of a comparison or a run")
    recipe = folder / "recipe.yaml"
    return replace(report, recipe_text=read_text(recipe) if recipe.is_file() else "")


def results_of(folder: Path) -> Path | None:
    """The results of a comparison, or where it has not ended once those so far; None if the folder has neither."""
    paths = (folder / name for name in ("results.json", "unfinished.json"))
    return next(filter(os.path.isfile, paths), None)  # Path's own raises where a name is too long


def _read_comparison(folder: Path, path: Path) -> Report:
    found = read_json(path, dict[str, Any])
    if found.get("format") != FORMAT or "methods" not in found:
        raise UserError(f"{path}: not the results of a comparison in format {FORMAT}; write it with bridle compare")
    report = checked(Report, found, str(path))
    runs = list(_runs(report, folder))
    measured = [run for run in runs if report.methods[run[0]].seeds[run[1]].status == "complete"]
    report = replace(
        report,
        curves=[curve for run in runs if (curve := _curve(*run)).rounds],
        completions=[
            row for run in track(measured, "reading completions", unit="models") for row in _completions(*run)
        ],
        guidance=read_json(path, Guidance) if (path := folder / "guidance.json").is_file() else None,
    )
    return _main_first(report)


def _main_first(report: Report) -> Report:
    """The figures and tests of the main constraint in front of the others."""
    main = report.main.constraint if report.main else None

    def ordered(method: Method) -> Method:
        violation = {
            prompt_set: dict(sorted(by_constraint.items(), key=lambda item: item[0] != main))
            for prompt_set, by_constraint in method.figures.violation.items()
        }
        return replace(method, figures=replace(method.figures, violation=violation))

    return replace(
        report,
        methods={name: ordered(method) for name, method in report.methods.items()},
        comparisons=sorted(report.comparisons, key=lambda one: (one.figure != "violation", one.constraint != main)),
    )


def _read_training_run(folder: Path) -> Report:
    path = folder / "environment.json"
    environment = read_json(path, dict[str, Any]) if path.is_file() else {}
    seed = environment.get("seed", 0)
    name = folder.resolve().name
    curves, rollouts = [_curve(name, str(seed), folder)], list(_rollouts(folder / "rollouts"))
    return Report(recipe=name, seeds=[seed], environment=environment, curves=curves, rollouts=rollouts)


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Picks at most `count` (> 1) evenly spaced items, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _rollouts(folder: Path) -> Iterator[Rollout]:
    """Reads some rollouts of some rounds from `round-N.REGULARISER.jsonl`."""
    files: dict[int, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("round-*.*.jsonl")):
        number = path.name.removeprefix("round-").partition(".")[0]
        if number.isdecimal():
            files[int(number)].append(path)
    for index in evenly_spaced(sorted(files), MOST_ROUNDS):
        for path in files[index]:
            yield from (checked(Rollout, row, place) for place, row in evenly_spaced(list(_rows(path)), SHOWN_ROLLOUTS))


def _runs(report: Report, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Yields method, seed and folder of every run."""
    for name, method in report.methods.items():
        for seed, run in method.seeds.items():
            inner = PurePath(run.folder)
            if inner.is_absolute() or ".." in inner.parts:
                raise UserError(
                    f"{folder / 'results.json'}: methods.{name}.seeds.{seed}.folder: leads out of the folder"
                )
            yield name, seed, folder / inner


def _curve(method: str, seed: str, folder: Path) -> Curve:
    rows = list(_rows(folder / "metrics.jsonl", grows=True))
    rounds = [checked(Round, _round(row), place) for place, row in rows if "round" in row]
    warnings = [checked(list[str], row["warnings"], place) for place, row in rows if "warnings" in row]
    targets = {
        domain: checked(Reached, measured, place)
        for place, row in rows
        for domain, measured in _by_domain(row).items()
        if "violation_reached" in measured
    }
    return Curve(method, seed, rounds, list(chain.from_iterable(warnings)), targets)


def _round(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"number": record["round"], **record, "regularisers": _by_domain(record)}


def _by_domain(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups a record's keys, DOMAIN/NAME, kl/DOMAIN and kl_unreached/DOMAIN, by domain."""
    domains: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in record.items():
        domain, slash, name = key.rpartition("/")
        if domain in ("kl", "kl_unreached"):
            domain, name = name, domain
        if slash:
            domains[domain][name] = value
    return dict(domains)


def _completions(method: str, seed: str, folder: Path) -> Iterator[Completion]:
    for place, row in _rows(folder / "completions.jsonl"):
        yield checked(Completion, {**row, "method": method, "seed": seed}, place)


def _rows(path: Path, *, grows: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row with its place, as `read_rows`; none if the file is absent."""
    if path.is_file():
        yield from read_rows(path, grows=grows)
