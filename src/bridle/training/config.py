"""Options of a constrained run, in addition to TRL's `SFTConfig`."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from trl import SFTConfig

from bridle.constraints import Constraint, build_constraint
from bridle.constraints.function import PythonFunction
from bridle.constraints.options import Probability
from bridle.constraints.spec import RETENTION
from bridle.data import DataSource
from bridle.errors import UserError, prefixed
from bridle.training.dual_ascent import TargetOptions
from bridle.training.engine import SamplerOptions
from bridle.training.options import check_needed, check_refused, in_one_line
from bridle.training.shares import ShareOptions
from bridle.utils.settings import check_fields, check_file_name, known_name
from bridle.utils.variables import NO_VARIABLES

ALL = "all"
"""Stands for the whole corpus, unless a domain has this name: one regulariser on everything is "without adaptive"."""

RESERVED = ("kl", "kl_unreached", "lambda")
"""No regulariser may have these names: its metrics are kl/NAME, kl_unreached/NAME, NAME/lambda and others."""

LARGEST = torch.finfo(torch.float32).max
"""The largest weight and guidance scale: losses are in float32."""

RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("rounds", "rollouts_per_round", "rollout_batch_size"), (1, inf)),
    **dict.fromkeys(("max_new_tokens", "target_tokens"), (1, inf)),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), (1, inf)),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers"), (0, inf)),
    **dict.fromkeys(("max_missing", "entropy_floor", "calibration_bound", "empty_bound", "clipped_bound"), (0, 1)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1)),
    "max_skipped_steps": (0, inf),
    "seed": (0, 2**32 - 1),
}
"""The least and the greatest value of numbers, those of `SFTConfig` that it does not check itself included."""


@dataclass
class Regulariser:
    """How domains of the corpus are held to a policy (EMNLP 2024: the adaptive regulariser).

    Attributes:
        constraint: C, the oracle on a whole output: a `Constraint`, a specification for `build_constraint`, or a
            function of a list of texts, as `PythonFunction` takes it. None, or "retention", is retention: R = 1, so
            that q is the initial model, and the term keeps the policy close to it.
        weight: λ, the strength of KL(q ‖ p_θ) against the corpus's cross-entropy, ≥ 0; with a `target`, the value
            that it begins with. Where the model violates in more than half of its outputs, begin with 3.
        target: the highest violation, in place of a fixed λ: after each round λ moves towards it.
        share: the share of outputs that comply, in place of all of them: `{at_least: 0.4, at_most: 0.6}`.
        anchor: the model p_a that q is built on. `live`, which a constraint has if it is not given: the policy itself,
            detached, which needs no extra forward; `previous`: the policy at the start of the round; `initial`, which
            retention always has: the model before any tuning.
        kl_on: the prefixes that the regulariser sees: the `corpus`'s, the `rollouts`', or `both`. If not given,
            the rollouts' with a constraint, since q does not contradict the corpus there, and the corpus's for
            retention, which needs no rollouts.
        rollouts_of: whose rollouts, for retention: the `anchor`'s, the initial model's, drawn once; or the `policy`'s,
            drawn again in each round. A constraint has those of its anchor, on which R is fitted.
        prompts: where rollouts start, in one random order over the rounds; None for the beginnings of the domain's own
            rows.
        guidance_scale: η in q ∝ p_a·R^η.
        soft_labels: fit R to the constraint's value itself and not to its yes or no. Iterating a soft C
            gives p·C^k after k rounds, so more rounds act more strongly.
        domain: the domain, or several, whose rows and prompts it uses; None or "all" for the whole corpus. A domain
            may have several regularisers.
        name: what metrics and files call it; the domain's name if not given.

    Raises:
        UserError: a value of the wrong kind or outside its range, one that would have no effect, or a target that
            nothing measures; the message begins with the field.
    """

    constraint: Constraint | None = None
    weight: float = 30.0
    target: TargetOptions | None = None
    share: ShareOptions | None = None
    anchor: Literal["live", "previous", "initial"] | None = None
    kl_on: Literal["corpus", "rollouts", "both"] | None = None
    rollouts_of: Literal["anchor", "policy"] = "anchor"
    prompts: DataSource | None = None
    guidance_scale: float = 1.0
    soft_labels: bool = False
    domain: str | list[str] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        self.constraint = _constraint(self.constraint)
        check_fields(self)
        if not 0 <= self.weight <= LARGEST:
            raise UserError(f"weight: a regulariser's weight must be 0 or more, and a float32, not {self.weight}")
        if not 0 <= self.guidance_scale <= LARGEST:
            raise UserError(f"guidance_scale: must be 0 or more, and a float32, not {self.guidance_scale}")
        if self.is_retention:
            self._check_retention()
        elif self.rollouts_of == "policy":
            raise UserError("rollouts_of: R is fitted on its anchor's rollouts; the policy's are for retention alone")
        self.anchor = self.anchor or ("initial" if self.is_retention else "live")
        self.kl_on = self.kl_on or ("corpus" if self.is_retention else "rollouts")
        if not self.samples and self.rollouts_of == "policy":
            raise UserError("rollouts_of: retention has rollouts only with kl_on: rollouts or both; set that too")
        if not self.samples and self.prompts is not None:
            raise UserError("prompts: retention has rollouts only with kl_on: rollouts or both; set that too")
        if self.target is not None:
            self._check_target(self.target)
        if self.share is not None:
            self._check_share()

    def _check_retention(self) -> None:
        refused = {
            "target": (self.target is not None, "retention asks no constraint; set its weight instead"),
            "share": (self.share is not None, "retention asks no constraint; name the one whose share it is"),
            "anchor": (self.anchor not in (None, "initial"), "retention's is the initial model; leave it out"),
            "guidance_scale": (self.guidance_scale != 1, "retention has no R to scale; leave it out"),
            "soft_labels": (self.soft_labels, "retention has no labels; leave it out"),
        }
        _refuse(refused)

    def _check_target(self, target: TargetOptions) -> None:
        if self.anchor == "initial":
            raise UserError(
                "target: is measured on the policy's rollouts; anchor: initial has only the initial model's"
            )
        if not target.least <= self.weight <= target.most:
            raise UserError(
                f"weight: {self.weight:g} is where λ begins, outside target.least {target.least:g} and target.most "
                f"{target.most:g}"
            )

    def _check_share(self) -> None:
        refused = {
            "target": (self.target is not None, "is a highest violation, and a share has a range; leave one out"),
            "soft_labels": (self.soft_labels, "a share counts outputs; leave it out"),
            "guidance_scale": (self.guidance_scale != 1, "the share says how strong q is; leave it at 1"),
            "anchor": (self.anchor == "initial", "initial is measured once, and the policy not; set live or previous"),
        }
        _refuse(refused)

    @property
    def is_retention(self) -> bool:
        """Whether this regulariser only keeps the policy close to the initial model."""
        return self.constraint is None

    @property
    def keeps_targets(self) -> bool:
        """Whether its targets are the same in every run, so that `target_cache` keeps them: retention, no rollouts."""
        return self.is_retention and self.kl_on == "corpus"

    @property
    def samples(self) -> bool:
        """Whether this regulariser draws rollouts: for its constraint, or to look at them."""
        return not self.is_retention or self.kl_on != "corpus"

    def domains(self, corpus: Collection[str]) -> list[str]:
        """The names of its domains.

        Raises:
            UserError: it names none, or one that the corpus lacks; the message begins with "domain".
        """
        if self.domain is None or (self.domain == ALL and ALL not in corpus):
            return list(corpus)
        chosen = [self.domain] if isinstance(self.domain, str) else list(dict.fromkeys(self.domain))
        if not chosen:
            raise UserError("domain: names no domain; leave it out for the whole corpus")
        for name in chosen:
            known_name(name, corpus, "domain", "domain")
        return chosen


def _refuse(options: Mapping[str, tuple[bool, str]]) -> None:
    """Raises a UserError for the first option that is given, with the reason."""
    for name, (is_given, reason) in options.items():
        if is_given:
            raise UserError(f"{name}: {reason}")


Regularisers = Regulariser | Sequence[Regulariser] | Mapping[str, Regulariser]


def named(regularisers: Regularisers, corpus: Collection[str]) -> dict[str, Regulariser]:
    """Regularisers by name.

    Args:
        regularisers: one, a list, or by name. A name is also the regulariser's domain if it has no `domain`.
        corpus: names of the corpus's domains.

    Raises:
        UserError: one is not a `Regulariser`, two have one name, a name cannot name files or is one of metrics, or a
            domain is not in the corpus.
    """
    given: Any = [regularisers] if not isinstance(regularisers, Iterable) else regularisers
    given = given if isinstance(given, Mapping) else list(given)
    for key, one in given.items() if isinstance(given, Mapping) else enumerate(given):
        if not isinstance(one, Regulariser):
            raise UserError(
                f"regularisers.{key}: must be a Regulariser, not a {type(one).__name__}; Regulariser(constraint, "
                "weight=30.0) makes one of a constraint"
            )
    if isinstance(given, Mapping):
        given = [
            replace(one, name=name, domain=name if one.domain is None else one.domain) for name, one in given.items()
        ]
    found: dict[str, Regulariser] = {}
    for one in given:
        name = one.name or default_name(one.domain)
        if name in found:
            raise UserError(f"regularisers: two are called '{name}'; give each a `name` of its own")
        check_file_name(name, f"regularisers.{name}")
        if name in RESERVED:
            raise UserError(f"regularisers.{name}: metrics are called {name}; give the regulariser another `name`")
        with prefixed(f"regularisers.{name}."):
            one.domains(corpus)
        found[name] = replace(one, name=name)
    return found


def default_name(domain: str | Sequence[str] | None) -> str:
    """The name of a regulariser of these domains, if it is not given."""
    return ALL if domain is None else domain if isinstance(domain, str) else "+".join(map(str, domain))


def _constraint(given: Constraint | str | Mapping | list | Callable | None) -> Constraint | None:
    """The constraint that a value stands for; other values unchanged, for the type check."""
    if isinstance(given, str | Mapping | list):
        return None if given == RETENTION else build_constraint(given)
    return PythonFunction(given) if callable(given) else given


@dataclass
class AuxiliaryOptions:
    """Shape and fit of the auxiliary model R.

    Attributes:
        depth: residual blocks in its trunk.
        head_rank: rank of its vocabulary head; None for a full one.
        memory: how many features of the completion's states so far it keeps the largest value of; 0 for none. Without
            them it reads the state at the last token alone, which does not know what the completion has said.
        own_network: give it its own body instead of the guided model's hidden states.
        form: `sigmoid`; or `log-linear`, which is consistent by construction and linear in the model's final states,
            so that `bridle export --fold` makes guided decoding an ordinary checkpoint.
        learning_rate: of AdamW.
        epochs: passes over a round's rollouts.
        batch_size: rollouts a step.
        weight_decay: of AdamW.
        consistency_weight: β of the forward-consistency term; with 0, R overfits where violations are rare.
        validation_share: share of the rollouts held out to measure R's calibration.
        replay: earlier rounds whose rollouts R is also fitted on, each label weighted by the likelihood
            ratio of what follows the prefix under the current policy. A compliant policy gives a fresh R few
            violations.
        corpus_outputs: outputs of the corpus, the rest of a row after its beginning, on which a new R is fitted before
            it is fitted on the policy's. Where the policy rarely violates, most of what R can learn is there.
        seek: share of a round's rollouts, from the second fit on, that begin with tokens which R expects to end in a
            violation. R learns from what the policy itself says after them. Rates are those of the other rollouts; the
            KL on rollouts looks at all.

    Raises:
        UserError: a value of the wrong kind, or nothing but seeking; the message begins with the field.
    """

    depth: NonNegativeInt = 1
    head_rank: PositiveInt | None = 64
    memory: NonNegativeInt = 64
    own_network: bool = False
    form: Literal["sigmoid", "log-linear"] = "sigmoid"
    learning_rate: PositiveFloat = 1e-3
    epochs: PositiveInt = 3
    batch_size: PositiveInt = 64
    weight_decay: NonNegativeFloat = 0.01
    consistency_weight: NonNegativeFloat = 1.0
    validation_share: Probability = 0.1
    replay: NonNegativeInt = 0
    corpus_outputs: NonNegativeInt = 0
    seek: Probability = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seek == 1:
            raise UserError("seek: must be below 1; rates are measured on rollouts that do not seek")

    @property
    def shape(self) -> dict[str, Any]:
        """The options of `new_auxiliary`."""
        return {key: getattr(self, key) for key in ("depth", "head_rank", "memory", "own_network", "form")}


@dataclass
class ParallelOptions:
    """How and where the two roles of the parallel schedule run.

    Attributes:
        address: of a running Ray cluster, or "auto"; None starts one on this machine.
        policy_workers: processes that train the policy together, by Ray Train, when `bridle train` starts them; the
            batch of an update is `per_device_train_batch_size` of each.
        regulariser_workers: processes that share the sampling and scoring of a round.
        num_cpus: CPU cores that each process asks for.
        num_gpus: GPUs that each process asks for; None for one each if the cluster has enough, else none.
        patience: seconds to wait for the resources of a role.
        largest_message: MiB of weights or targets above which they pass through a file in the output folder, which
            all roles must then share.
        first_round: what the policy does before there is an R. `wait`: its updates wait for R_1; `train`: they run
            while R_1 is fitted, with cross-entropy alone.

    Raises:
        UserError: a value of the wrong kind, such as a role without a process; the message begins with the field.
    """

    address: str | None = None
    policy_workers: PositiveInt = 1
    regulariser_workers: PositiveInt = 1
    num_cpus: NonNegativeFloat = 1.0
    num_gpus: NonNegativeFloat | None = None
    patience: NonNegativeFloat = 60.0
    largest_message: NonNegativeFloat = 512.0
    first_round: Literal["wait", "train"] = "wait"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def largest_bytes(self) -> float:
        """`largest_message` in bytes."""
        return self.largest_message * 2**20


@dataclass
class BestOptions:
    """The rule for the best checkpoint: the lowest `eval_loss` among those with a low enough violation rate.

    Attributes:
        violation: the highest violation rate, under every constraint, that the best may have.
        patience: evaluations without a better one after which training stops, once one met the rule; None trains to the
            end.

    Raises:
        UserError: a value of the wrong kind; the message begins with the field.
    """

    violation: Probability
    patience: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class EvalOptions:
    """Held-out evaluation of the policy at the end of each round.

    Attributes:
        share: share of the rows of each domain, held out of training.
        corpus: held-out rows by domain, sources or rows as the trainer's corpus; `share` does not apply to them.
        constraints: what judges the completions; those of the regularisers if none is given.
        prompts: what is completed; None for the beginnings of held-out rows.
        domains: whose rows these are; those with a constraint if not given.
        completions: how many are drawn, one for each prompt.
        best: which checkpoint becomes the final model; None takes the last.

    Raises:
        UserError: a value of the wrong kind, two constraints of one name, or nothing is held out; the message begins
            with the field.
    """

    share: Probability = 0.0
    corpus: dict[str, Any] = field(default_factory=dict)
    constraints: list[Constraint] = field(default_factory=list)
    prompts: DataSource | None = None
    domains: list[str] = field(default_factory=list)
    completions: PositiveInt = 256
    best: BestOptions | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.share and not self.corpus:
            raise UserError("share: nothing is held out; set a share of the rows, or name other rows in corpus")
        names = [constraint.name for constraint in self.constraints]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(
                f"constraints: two are called '{twice}', so their metrics would have one name; give each its own"
            )
        if self.prompts is not None and self.domains:
            raise UserError("domains: prompts say what is completed; leave one of them out")


@dataclass
class ConstrainedConfig(SFTConfig):
    """Configuration of a `ConstrainedTrainer`: TRL's `SFTConfig` and the fields below.

    Attributes:
        schedule: order of the policy's and the regularisers' updates (EMNLP 2024). `sequential` refreshes R, then
            trains the policy, in turn; `parallel` does both at the same time, each from the other's last round.
        rounds: among which the policy's steps are divided evenly. The sequential schedule refreshes R in each, the
            parallel one in all but the last; with `anchor: initial` R is fitted once.
        rollouts_per_round: samples that each regulariser draws in a round, from the policy or its initial anchor.
        max_new_tokens: length in tokens at which a sample is cut.
        prompt_tokens: shortest and longest prompt taken from plain text, in tokens. None for the longest takes prompts
            from any depth of a row. The KL on the corpus leaves out, and counts, prefixes that no rollout can reach.
        rollout_batch_size: samples drawn at a time.
        targets: when q is built. `computed`: in the update, over the whole vocabulary; `precomputed`: ahead of a
            round's updates, and kept sparsely, so that the update runs no forward but its own. A
            row that occurs in several epochs of a round is computed once. Needs a frozen anchor; beside one, q of a
            `live` anchor is computed.
        target_tokens: k, how many tokens a precomputed target keeps; all others are one bucket.
        target_cache: folder that keeps precomputed targets of retention with `kl_on: corpus`: a row's is built once
            for a model and k, for all runs that name the folder. None keeps none.
        truncated: what R learns from a rollout cut at `max_new_tokens`. `label`: the constraint's answer to the
            text up to there, which is exact where outputs are evaluated up to the same length; `mask`: nothing, a
            complete-case analysis, unbiased only if whether an output ends says nothing about whether it complies;
            `bootstrap`: R's own estimate at the cut.
        max_missing: share of rollouts without a score above which the run stops.
        max_skipped_steps: updates in a row that are skipped, their loss or gradient not being finite, before the run
            stops.
        entropy_floor: share of the first round's entropy of the policy's samples below which the run stops, or λ of a
            target is lowered; 0 turns the guard off. It does not apply to a run without rollouts.
        calibration_bound: expected calibration error of R above which a round warns; 1 turns the guard off. It is not
            checked on fewer than 20 held-out rollouts.
        empty_bound: share of empty rollouts above which a round warns; 1 turns the guard off.
        clipped_bound: share of rollouts cut at `max_new_tokens` above which a round warns; 1 turns the guard off.
        keep_last: how many of the last checkpoints to keep; None for all. Half-written ones do not count.
        auxiliary: shape and fit of R.
        parallel: how and where the parallel schedule's roles run.
        sampler: what draws rollouts: `transformers`, or vLLM.

    Raises:
        UserError: a value of the wrong kind or outside its range, such as no round; an option of TRL or `transformers`
            that would have no effect, or that Bridle replaces. The message begins with the field.
    """

    variables = NO_VARIABLES  # a recipe's configuration has its own
    _VALID_DICT_FIELDS: ClassVar = [*SFTConfig._VALID_DICT_FIELDS, "auxiliary", "parallel", "sampler"]

    schedule: Literal["sequential", "parallel"] = field(default="sequential", metadata={"help": "Order of updates."})
    rounds: int = field(default=2, metadata={"help": "Rounds of sampling, fitting R and training."})
    rollouts_per_round: int = field(default=1024, metadata={"help": "Samples per regulariser and round."})
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens at which a sample is cut."})
    prompt_tokens: tuple[int, int | None] = field(default=(2, None), metadata={"help": "Prompt length, in tokens."})
    rollout_batch_size: int = field(default=256, metadata={"help": "Samples drawn at a time."})
    targets: Literal["computed", "precomputed"] = field(default="computed", metadata={"help": "When q is built."})
    target_cache: str | None = field(default=None, metadata={"help": "Folder that keeps targets for other runs."})
    target_tokens: int = field(default=128, metadata={"help": "Tokens that a precomputed target keeps."})
    truncated: Literal["label", "mask", "bootstrap"] = field(
        default="label", metadata={"help": "What cut samples teach."}
    )
    max_missing: float = field(default=0.1, metadata={"help": "Share of unscored rollouts that stops a run."})
    max_skipped_steps: int = field(default=10, metadata={"help": "Skipped updates in a row before a run stops."})
    entropy_floor: float = field(
        default=0.5, metadata={"help": "Share of the first entropy that stops a run, or lowers λ of a target."}
    )
    calibration_bound: float = field(default=0.15, metadata={"help": "R's calibration error that warns."})
    empty_bound: float = field(default=0.1, metadata={"help": "Share of empty rollouts that warns."})
    clipped_bound: float = field(default=0.9, metadata={"help": "Share of cut rollouts that warns."})
    keep_last: int | None = field(default=None, metadata={"help": "Checkpoints that stay."})
    auxiliary: AuxiliaryOptions = field(default_factory=AuxiliaryOptions, metadata={"help": "Shape and fit of R."})
    parallel: ParallelOptions = field(default_factory=ParallelOptions, metadata={"help": "How the roles run."})
    sampler: SamplerOptions = field(default_factory=SamplerOptions, metadata={"help": "What draws rollouts."})

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of matrix products under mixed precision; None without it."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)

    def __post_init__(self) -> None:
        check_fields(self, [f.name for f in fields(self) if f.name not in SFTConfig.__dataclass_fields__])
        self.bf16: bool | None
        self.fp16: bool
        if self.bf16 is None:  # TRL's default is true, which fails on a machine without such a GPU
            launched = os.environ.get("ACCELERATE_MIXED_PRECISION")  # from `accelerate launch`
            on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.fp16 = self.fp16 or launched == "fp16"
            self.bf16 = not self.fp16 and (on_gpu or launched == "bf16")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is None or not least <= value <= most:
                range_ = f"at least {least}" if most == inf else f"from {least} to {most}"
                raise UserError(f"{name}: must be {range_}, not {value}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(f"max_steps: must be at least 1, or -1 to go by num_train_epochs, not {self.max_steps}")
        if not 0 < self.num_train_epochs < inf:
            raise UserError(f"num_train_epochs: must be above 0, not {self.num_train_epochs}")
        if self.target_cache is not None and self.targets != "precomputed":
            raise UserError("target_cache: keeps precomputed targets; set targets: precomputed, or leave it out")
        shortest, longest = self.prompt_tokens
        if shortest < 0 or (longest is not None and longest < shortest):
            raise UserError(f"prompt_tokens: needs a shortest and a longest prompt, not {shortest} and {longest}")
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length: must be at least 1, or null for no limit, not {self.max_length}")
        check_refused(self)
        with in_one_line():
            super().__post_init__()
        if self.mixed_precision != "no" and not (self.bf16 or self.fp16):
            raise UserError(
                f"bf16: is false, but accelerate was launched with mixed precision {self.mixed_precision}; launch it "
                "with --mixed_precision no, or leave bf16 out"
            )
        check_needed(self)
        if self.torch_compile:
            # By blocks: a graph of the whole model would keep the first update's hooks.
            os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
        if self.keep_last is not None and self.keep_last < 1:
            raise UserError(f"keep_last: must be at least 1, or null for all, not {self.keep_last}")

    def to_dict(self) -> dict[str, Any]:
        """All fields for trackers: options by dotted keys, variables of a recipe by name."""
        found: dict[str, Any] = super().to_dict()
        for group in ("auxiliary", "parallel", "sampler"):
            found |= {f"{group}.{key}": value for key, value in asdict(found.pop(group)).items()}
        found |= {"eos_token": self.eos_token, "pad_token": self.pad_token}  # which are no secrets
        return self.variables.hidden(found)
