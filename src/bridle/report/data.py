"""The data of a report: of a comparison, or of one training run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from bridle.evaluation.judge_examination import JudgeExamination
from bridle.evaluation.prompt_sets import GenerationOptions
from bridle.evaluation.statistics import Comparison, Estimate
from bridle.evaluation.win_rate import WinRates

Group = Literal["violation", "transfer", "text", "perplexity", "tasks", "classification", "cost"]  # of `Figures`

MOST_ROUNDS = 6  # whose rollouts or reliability are shown, evenly spaced

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
class Critic:
    """How far one R is from the truth; a skill is 1 − MSE / MSE of the best constant.

    Attributes:
        mae: mean absolute error at prefixes.
        correlation: Pearson's, with the true R; None if one of them is constant.
        skill: at prefixes of the policy's texts, and its standard error; None if the truth is constant.
        skill_violating: the same at prefixes of texts that violate.
        skill_texts: against the verdicts on whole texts.
        kl_closed: 1 − KL(q ‖ q_R) / KL(q ‖ p).
        guided: share of violations in samples of q_R.
    """

    mae: float
    skill_texts: float
    kl_closed: float
    correlation: float | None = None
    skill: tuple[float, float] | None = None
    skill_violating: tuple[float, float] | None = None
    guided: float | None = None


@dataclass(frozen=True)
class Policy:
    """The policy that an R was fitted on: the share of its texts that violate, and KL(q ‖ p) in nats a text."""

    p: float
    kl_q_p: float


@dataclass(frozen=True)
class Critics:
    """What `benchmarks/critic.py` measured of a run: the run's R among `variants`, and the policy."""

    policy: Policy
    variants: dict[str, Critic]


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
    """The data of a report; the fields of a training run are recipe, seeds, environment, curves, rollouts and critics.

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
        critics: R against the truth, if it was measured.
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
    critics: Critics | None = None
    guidance: Guidance | None = None
    recipe_text: str = ""

    @property
    def win_rates_mean_something(self) -> bool:
        """Whether there are win rates, by a judge that did not fail its examination."""
        return self.win_rate is not None and (self.judge_examined is None or self.judge_examined.passed)


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Picks at most `count` (> 1) evenly spaced items, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]
