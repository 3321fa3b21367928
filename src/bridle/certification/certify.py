"""Candidates are ordered on development prompts, then tested one by one on prompts that are used for nothing else."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import inf
from statistics import fmean
from typing import Any

import numpy as np

from bridle.certification.bounds import fixed_sequence
from bridle.certification.certificate import (
    Certificate,
    Observation,
    PromptRecord,
    Ranked,
    Tried,
    candidate_name,
    check_different,
    outcome,
    prompts_hash,
    same_prompt,
    version_of,
)
from bridle.certification.goal import Goal
from bridle.certification.importance import Seeker, draw, seeking
from bridle.certification.oracle import OracleErrors, errors_of
from bridle.constraints import Constraint
from bridle.data import DataSource, Prompt, texts_of
from bridle.errors import UserError
from bridle.evaluation.evaluator import COMPLETIONS_PER_ROW, Evaluator
from bridle.evaluation.examination import LabelledRows
from bridle.evaluation.prompt_sets import PromptSet
from bridle.evaluation.served import ServedModel
from bridle.models.guidance import check_scale, guided
from bridle.models.loading import load_for_inference, load_tokenizer
from bridle.models.sharding import weights_digest
from bridle.utils.percent import percent_up

DEVELOPMENT, CERTIFICATION, ORDER = range(3)  # purposes, each with its own random numbers


@dataclass(frozen=True)
class Candidate:
    """A model with its decoding, which may be certified.

    Attributes:
        model: folder or hub name, or the URL of a server.
        guide: folder of the auxiliary model; None for none.
        guidance_scale: η.
        served: what the server calls its model; None for a model that is loaded here.

    Raises:
        UserError: the guidance scale is below 0 or not finite.
    """

    model: str
    guide: str | None = None
    guidance_scale: float = 1.0
    served: str | None = None

    def __post_init__(self) -> None:
        check_scale(self.guidance_scale)

    @property
    def is_guided(self) -> bool:
        """Whether R changes what it says."""
        return self.guide is not None and self.guidance_scale > 0

    @property
    def name(self) -> str:
        """The model, and where it is guided, by what and at which η."""
        if self.served is not None:
            return f"{self.served} at {self.model}"
        return candidate_name(self.model, self.guide if self.is_guided else None, self.guidance_scale)


@dataclass
class Certification:
    """A certification before it runs.

    Attributes:
        goal: what is to be shown.
        candidates: in any order.
        prompts: used for nothing else; `generation` says how each is completed.
        constraint: decides what violates.
        development: prompts that order the candidates; needed for several. None of `prompts` may be among them.
        perplexity: held-out text, whose likelihood is how well each candidate writes. One that violates more often than
            another on the development prompts and writes no better is then left out.
        oracle_labels: texts with human labels.
        batch_size, seed, device, dtype: as in `bridle evaluate`.
        tokenizer, api_key_env: of models behind servers, as in `measure_served`.
        show: called with lines of text.

    Raises:
        UserError: the candidates need development prompts or repeat each other, or an option does not go with
            importance sampling.
    """

    goal: Goal
    candidates: Sequence[Candidate]
    prompts: PromptSet
    constraint: Constraint
    development: PromptSet | None = None
    perplexity: DataSource | None = None
    oracle_labels: LabelledRows | None = None
    batch_size: int = 64
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"
    tokenizer: str | None = None
    api_key_env: str | None = None
    show: Callable[[str], None] = field(default=lambda line: None)
    _loaded: tuple[str, Any, Any] | None = field(default=None, init=False, repr=False)
    _texts: Sequence[str] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        names = [candidate.name for candidate in self.candidates]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{repeated[0]}: is given twice; name each candidate once")
        if len(names) > 1 and self.development is None:
            raise UserError(
                f"{len(names)} candidates need --development prompts, which order them before the others are seen"
            )
        for option in ("perplexity", "development"):
            if len(names) == 1 and getattr(self, option) is not None:
                raise UserError(f"--{option} orders several candidates; leave it out for one")
        if self.development is not None:  # the order is of what is then tested: prompts of the same kind
            self.development = replace(self.development, generation=self.prompts.generation)
        if self.goal.method == "importance":
            self._check_importance()

    def _check_importance(self) -> None:
        if any(candidate.guide is None for candidate in self.candidates):
            raise UserError(
                "--method importance needs a --guide, whose R seeks violations; --guidance_scale 0 only seeks"
            )
        how = self.prompts.generation
        if how.greedy or how.top_p != 1:
            raise UserError("--method importance draws from the whole distribution; leave out --top_p and --greedy")
        if self.dtype not in ("float32", "fp32"):
            raise UserError("--method importance weighs by exact probabilities; leave --dtype at float32")

    def run(self) -> tuple[Certificate, list[Observation]]:
        """Orders the candidates, tests them up to the first that fails, and returns the certificate.

        Returns:
            The certificate, whose `completions_sha256` is empty until its completions are written, and these.

        Raises:
            UserError: a model or a file cannot be used, a prompt occurs twice or is also a development prompt, or there
                are too few prompts for any result.
        """
        from bridle.utils.provenance import environment

        self.show(self.goal.plan())
        self._texts = [] if self.perplexity is None else texts_of(self.perplexity)
        oracle = None if self.oracle_labels is None else errors_of(self.constraint, self.oracle_labels)
        if oracle is not None and oracle.missing:
            self.show(f"{oracle.missing:,} of the labelled texts got no score, and count as not flagged")
        with self._opened(self.candidates[0]) as (evaluator, _):
            prompts = self._read(evaluator)
            development = [] if self.development is None else evaluator.read(self.development)
        self._check(prompts, development)
        ordered, ranked = self._ordered() if len(self.candidates) > 1 else ([*self.candidates], [])
        observed: list[Observation] = []
        tried = fixed_sequence(self._test(one, observed, oracle, len(ordered)) for one in ordered)
        used = prompts_hash([(one.row, one.prompt) for one in observed])
        certificate = Certificate(
            goal=self.goal,
            tried=tried,
            candidates=len(ordered),
            prompts=PromptRecord(self.prompts.name, len(prompts), used),
            constraint=self.constraint.describe(),
            constraint_sha256=version_of(self.constraint),
            decoding=asdict(self.prompts.generation),
            completions_sha256="",
            environment=environment(self.seed),
            development=self._record(development) if development else None,
            ranked=ranked,
            oracle=oracle,
        )
        return certificate, observed

    # ------------------------------------------------------------------ prompts

    def _read(self, evaluator: Evaluator | ServedModel) -> list[Prompt]:
        """The prompts in a random order, as a file may be sorted."""
        prompts = evaluator.read(self.prompts)
        order = np.random.default_rng(self._seed(ORDER)).permutation(len(prompts))
        return [prompts[index] for index in order]

    def _check(self, prompts: Sequence[Prompt], development: Sequence[Prompt]) -> None:
        place, prompts = self.prompts.source.place, sorted(prompts, key=lambda prompt: prompt.row)
        check_different([(prompt.row, prompt.given) for prompt in prompts], place)
        known = {same_prompt(prompt.given): prompt.row for prompt in development}
        for prompt in prompts:
            if (row := known.get(same_prompt(prompt.given))) is not None:
                raise UserError(
                    f"{place} row {prompt.row}: is also row {row} of the development prompts; a certificate needs "
                    "prompts that were used for nothing else"
                )
        if len(prompts) < (needed := self.goal.needed()):
            raise UserError(
                f"{place}: holds {len(prompts):,} prompts, but {needed:,} are needed even if nothing violates; give "
                "more, or ask for a higher --rate or a lower --confidence"
            )
        self.show(f"{self.prompts.name} holds {len(prompts):,} prompts; {self.prompts.generation}")

    def _record(self, development: Sequence[Prompt]) -> PromptRecord:
        assert self.development is not None
        digest = prompts_hash([(prompt.row, prompt.given) for prompt in development])
        return PromptRecord(self.development.name, len(development), digest)

    def _seed(self, purpose: int, chunk: int = 0) -> int:
        return int(np.random.SeedSequence([self.seed, purpose, chunk]).generate_state(1)[0])

    # ------------------------------------------------------------------ candidates

    @contextmanager
    def _opened(self, candidate: Candidate) -> Iterator[tuple[Evaluator | ServedModel, Seeker | None]]:
        """A candidate, ready to draw from, and what seeks its violations."""
        if candidate.served is not None:
            counting = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
            yield ServedModel(candidate.model, candidate.served, counting, self.api_key_env, self.seed), None
            return
        if self._loaded is None or self._loaded[0] != candidate.model:
            self._loaded = None  # so that two models are never in memory
            self._loaded = candidate.model, *load_for_inference(candidate.model, self.dtype, self.device)
        _, model, tokenizer = self._loaded
        guide = candidate.guide if candidate.is_guided else None
        with ExitStack() as stack:
            guidance = stack.enter_context(guided(model, guide, candidate.guidance_scale))
            evaluator = Evaluator(model, tokenizer, guidance, self.batch_size, self.seed)
            seeker = None
            if self.goal.method == "importance" and candidate.guide is not None:
                seeker = stack.enter_context(seeking(evaluator, candidate.guide, self.goal.seek))
            yield evaluator, seeker

    def _ordered(self) -> tuple[list[Candidate], list[Ranked]]:
        """The candidates from the safest on, and what the development prompts say of them."""
        ranked = {candidate: self._rank(candidate) for candidate in self.candidates}
        order = safest_first(list(ranked.values()))
        by_name = {candidate.name: candidate for candidate in self.candidates}
        left_out = [one.candidate for one in ranked.values() if one not in order]
        if left_out:
            self.show(f"left out, since others violate no more and write no worse: {', '.join(left_out)}")
        return [by_name[one.candidate] for one in order], order

    def _rank(self, candidate: Candidate) -> Ranked:
        assert self.development is not None
        with self._opened(candidate) as (evaluator, _):
            prompts = evaluator.read(self.development)
            drawn = draw(evaluator, prompts, self.prompts.generation, self._seed(DEVELOPMENT))
            scores = self.constraint.score([prompt.given for prompt in prompts], [text for text, _ in drawn])
            bits = None
            if self.perplexity is not None and isinstance(evaluator, Evaluator):
                place = self.perplexity.place
                bits = evaluator.perplexity({place: self._texts})[place]["bits_per_byte"]["value"]
        rate = fmean(not score.complies for score in scores)
        violation = fmean(1.0 if score.violation is None else score.violation for score in scores)
        text = "" if bits is None else f", {bits:.4g} bits per byte"
        self.show(f"development: {candidate.name}: {100 * rate:.4g}% of {len(scores):,} violate{text}")
        return Ranked(candidate.name, rate, violation, bits)

    def _test(
        self, candidate: Candidate, observed: list[Observation], oracle: OracleErrors | None, candidates: int
    ) -> Tried:
        """Draws and scores completions until the result is settled; adds them to `observed`."""
        with self._opened(candidate) as (evaluator, seeker):
            prompts = self._read(evaluator)
            if isinstance(evaluator, ServedModel):
                evaluator.check_sampling(prompts, self.prompts.generation)
            own = list(self._observations(candidate, evaluator, seeker, prompts))
            weights = weights_of(evaluator)
        observed += own
        tried = Tried(
            candidate=candidate.name,
            model=candidate.model,
            weights=weights,
            guide=candidate.guide if candidate.is_guided else None,
            guidance_scale=candidate.guidance_scale if candidate.is_guided else 0.0,
            **outcome(own, self.goal, oracle, candidates),
        )
        result = "passed" if tried.passed else "not shown"
        self.show(
            f"{candidate.name}: {tried.violations} of {tried.n:,} violate, bound {percent_up(tried.bound)}: {result}"
        )
        return tried

    def _observations(
        self, candidate: Candidate, evaluator: Evaluator | ServedModel, seeker: Seeker | None, prompts: Sequence[Prompt]
    ) -> Iterator[Observation]:
        """The completions in the order of the prompts, of all or until the result is settled."""
        size = COMPLETIONS_PER_ROW * self.batch_size if self.goal.anytime else len(prompts)
        values: list[float] = []
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            drawn = draw(evaluator, some, self.prompts.generation, self._seed(CERTIFICATION, start), seeker)
            scores = self.constraint.score([prompt.given for prompt in some], [text for text, _ in drawn])
            for prompt, (text, weight), score in zip(some, drawn, scores, strict=True):
                found = Observation(candidate.name, prompt.row, prompt.given, text, **vars(score), weight=weight)
                values.append(found.counted)
                yield found
            if self.goal.anytime and (
                self.goal.bound(values) <= self.goal.rate
                or not self.goal.can_be_reached(values, len(prompts) - len(values))
            ):
                return


def weights_of(evaluator: Evaluator | ServedModel) -> str:
    """A short hash of all weights that decide what a model says, its guide's included; "" where a server hides them."""
    if isinstance(evaluator, ServedModel):
        return ""
    parts = [evaluator.model, *([evaluator.guide.auxiliary] if evaluator.guide else [])]
    return weights_digest((name, tensor.detach()) for part in parts for name, tensor in part.state_dict().items())


def safest_first(ranked: Sequence[Ranked]) -> list[Ranked]:
    """From the candidate that violates least to the one that writes best.

    Where it is known how well they write, a candidate that writes no better than a safer one is left out.
    """
    best, kept = inf, []
    for one in sorted(ranked, key=lambda one: (one.rate, one.violation, one.bits_per_byte or 0.0)):
        if one.bits_per_byte is None:
            kept.append(one)
        elif one.bits_per_byte < best:
            best = one.bits_per_byte
            kept.append(one)
    return kept
