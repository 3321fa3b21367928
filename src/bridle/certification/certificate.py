"""A certificate: what was shown of a model's violation rate, from which completions, and what it does not cover.

It is a JSON file; the completions lie beside it, and `verify` recomputes every number from them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from bridle.certification.goal import Goal
from bridle.certification.oracle import OracleErrors
from bridle.constraints import Constraint, Given
from bridle.constraints.cache import remove_caches
from bridle.errors import UserError
from bridle.models.card_text import public_name, setting_text
from bridle.utils.files import checked, digest, read_json, read_rows, read_text, write_json, write_rows
from bridle.utils.percent import percent, percent_up

FORMAT = 1
TOLERANCE = 1e-9  # between bounds that two machines compute


@dataclass(frozen=True)
class Observation:
    """One completion, as a row of the file beside the certificate.

    Attributes:
        candidate: the name of what drew it.
        row: of the prompts' source, from 1.
        prompt: its text, or the messages of a chat.
        completion: the text that was judged.
        value: the constraint's score, from 0 (violates) to 1 (complies); None if it is missing.
        complies: the verdict; None if it is missing.
        reason: why it is missing.
        weight: of a violation: 1, or an importance weight.
    """

    candidate: str
    row: int
    prompt: Any
    completion: str
    value: float | None
    complies: bool | None
    reason: str = ""
    weight: float = 1.0

    @property
    def counted(self) -> float:
        """Its weight if it violates or has no score, else 0."""
        return 0.0 if self.complies else self.weight


@dataclass(frozen=True)
class Tried:
    """What one candidate was shown to be.

    Attributes:
        candidate: its name.
        model: folder or hub name, or the URL of its server.
        weights: a hash of all of its weights, and of its guide's; "" where a server hides them.
        guide: of its decoding, and at which `guidance_scale` (η); None where it is unguided.
        n: number of completions, one for each prompt.
        violations: number of them that violate or have no score.
        missing: number of them without a score.
        bound: the upper bound on the rate that the constraint would find.
        true_bound: the upper bound on the true rate; None without labels for the oracle.
        passed: whether `bound` is at most the goal's rate.
    """

    candidate: str
    model: str
    weights: str
    guide: str | None
    guidance_scale: float
    n: int
    violations: int
    missing: int
    bound: float
    true_bound: float | None
    passed: bool


@dataclass(frozen=True)
class Ranked:
    """What the development prompts say of a candidate.

    Attributes:
        candidate: its name.
        rate: share of the completions of the development prompts that violate or have no score.
        violation: their mean violation, from 0 to 1.
        bits_per_byte: of held-out text under it; None where none was given.
    """

    candidate: str
    rate: float
    violation: float
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class PromptRecord:
    """Where prompts came from.

    Attributes:
        source: as given.
        prompts: how many it holds.
        sha256: of the prompts that were used.
    """

    source: str
    prompts: int
    sha256: str


@dataclass(frozen=True)
class Certificate:
    """What was shown, of which models, from which prompts, under which constraint and decoding.

    Attributes:
        goal: rate, confidence and method.
        tried: the candidates that were tested, in order, up to the first that did not pass.
        candidates: how many the order held.
        prompts: those of the completions.
        constraint: its settings.
        constraint_sha256: of what decides its verdicts, files by their content: its version.
        decoding: how prompts were completed.
        completions_sha256: of the file of `Observation`s.
        environment: versions, git commit, command, seed and time.
        development: the prompts that the order was chosen on; None for a single candidate.
        ranked: the order, and what it was chosen by.
        oracle: the constraint's errors on labelled texts; None without any.
        format: of the file.
    """

    goal: Goal
    tried: list[Tried]
    candidates: int
    prompts: PromptRecord
    constraint: dict[str, Any]
    constraint_sha256: str
    decoding: dict[str, Any]
    completions_sha256: str
    environment: dict[str, Any]
    development: PromptRecord | None = None
    ranked: list[Ranked] = field(default_factory=list)
    oracle: OracleErrors | None = None
    format: int = FORMAT

    @property
    def certified(self) -> Tried | None:
        """The last candidate that passed; None if none did."""
        return next((tried for tried in reversed(self.tried) if tried.passed), None)

    @property
    def statement(self) -> str:
        """What was shown, in words."""
        goal, found = self.goal, self.certified
        name = self.constraint.get("name", "the constraint")
        if found is None:
            return (
                f"Nothing is certified: no candidate was shown to violate '{name}' in at most {percent(goal.rate)} of "
                f"its completions, with {percent(goal.confidence)} confidence."
            )
        text = (
            f"With {percent(goal.confidence)} confidence, at most {percent(goal.rate)} of the completions of "
            f"{found.candidate} violate '{name}', after prompts drawn as those of {self.prompts.source} were "
            f"({found.violations} of {found.n:,}; {goal})."
        )
        if self.oracle is None or found.true_bound is None:
            return text
        if found.true_bound >= 1:
            return (
                f"{text} The labels of {self.oracle.source} bound no true rate: they do not show what the oracle finds."
            )
        return (
            f"{text} With {percent(goal.confidence)} confidence, at most {percent_up(found.true_bound)} violate in "
            f"truth, given the oracle's errors on the labels of {self.oracle.source}."
        )

    @property
    def limits(self) -> list[str]:
        """What it does not cover, in words."""
        decoding = ", ".join(f"{key} {value}" for key, value in self.decoding.items() if value is not None)
        errors = (
            "The oracle's errors. To violate means that the constraint says so; no text that people have labelled was "
            "given."
        )
        if self.oracle is not None:
            errors = (
                "An oracle that errs otherwise on these completions than on the labelled texts: the bound on the true "
                "rate takes its errors to be the same."
            )
        weights = "Other weights: any change to them, further tuning and quantisation included."
        if not all(tried.weights for tried in self.tried):
            weights = (
                "Another model behind the server's address. Its weights were not seen: the statement is about what "
                "answered then, with all that the server adds to a request."
            )
        return [
            "Other prompts. The statement is about prompts drawn, independently, as these were. It is void if the "
            "model was trained or chosen on them, or if they served an earlier certificate.",
            f"Other decoding than {decoding}.",
            weights,
            errors,
            "Any single output. A rate is no guarantee.",
        ]

    def table(self) -> Iterator[dict[str, str]]:
        """The tested candidates, in order, as cells by heading."""
        for tried in self.tried:
            true = {} if tried.true_bound is None else {"bound on the true rate": percent_up(tried.true_bound)}
            yield {
                "candidate": tried.candidate,
                "violations": f"{tried.violations} of {tried.n:,}",
                "without a score": str(tried.missing),
                "bound": percent_up(tried.bound),
                **true,
                "result": "passed" if tried.passed else "not shown",
            }

    def to_json(self) -> dict[str, Any]:
        """The fields, and the statement and its limits in words."""
        found = self.certified
        words = {
            "statement": self.statement,
            "certified": found and found.candidate,
            "not_covered": self.limits,
        }
        return words | asdict(self)

    def public(self) -> "Certificate":
        """The same for what `card` shows, with only the last part of each local path."""
        names = _short_names([one.model for one in self.tried])
        tried = [replace(one, candidate=_public_candidate(one, names[one.model])) for one in self.tried]
        prompts = replace(self.prompts, source=_public_source(self.prompts.source))
        oracle = self.oracle and replace(
            self.oracle, source=", ".join(map(public_name, self.oracle.source.split(", ")))
        )
        return replace(self, tried=tried, prompts=prompts, oracle=oracle)

    def card(self, file: str) -> dict[str, Any]:
        """What the block in a model card shows, for `add_certificate`; `file` is the name of the certificate's file."""
        git = self.environment.get("git") or {}
        found = self.certified
        details = {
            "Prompts": f"{self.prompts.prompts:,} of {self.prompts.source}; SHA-256 of the used {self.prompts.sha256}",
            "Constraint": f"{setting_text(self.constraint)}; version {self.constraint_sha256}",
            "Weights": found and found.weights,
            "Date": self.environment.get("time"),
            "Git": git and git["commit"] + " with local changes" * bool(git.get("dirty")),
            "File": f"{file}, SHA-256 of its completions {self.completions_sha256}",
        }
        return {
            "statement": self.statement,
            "limits": self.limits,
            "candidates": list(self.table()),
            "details": {name: value for name, value in details.items() if value},
        }

    def save(self, path: Path) -> None:
        """Writes the JSON file; `UserError` if it cannot be written."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "Certificate":
        """Reads what `save` wrote.

        Raises:
            UserError: the file cannot be read, or its words are not those of its numbers.
        """
        given = read_json(path, dict[str, Any])
        words = {key: given.pop(key, None) for key in ("statement", "certified", "not_covered")}
        certificate = checked(cls, given, str(path))
        if certificate.format != FORMAT:
            raise UserError(f"{path}: format {certificate.format} is not {FORMAT}; use the Bridle that wrote it")
        for key, value in words.items():
            if certificate.to_json()[key] != value:
                raise UserError(f"{path}: {key}: does not follow from the numbers; the file was changed")
        return certificate

    def verify(self, path: Path, constraint: Constraint | None = None) -> None:
        """Recomputes the certificate from the completions beside its file.

        Args:
            path: of its file.
            constraint: scores the completions again, without its label caches, which it loses; without a constraint the
                stored verdicts count. Importance weights are taken from the file, as only the model could compute
                them again.

        Raises:
            UserError: naming the first thing that does not agree.
        """
        place = completions_file(path)
        if sha256(read_text(place).encode()).hexdigest() != self.completions_sha256:
            raise UserError(f"{place}: is not the file that the certificate was made from; a completion was changed")
        seen = [self._observation(row, where) for where, row in read_rows(place)]
        if constraint is not None:
            if version_of(constraint) != self.constraint_sha256:
                raise UserError(
                    f"--constraint: is not the certificate's, {json.dumps(self.constraint)}, or a file of it has "
                    "changed"
                )
            _check_scores(seen, constraint, place)
        if prompts_hash([(one.row, one.prompt) for one in seen]) != self.prompts.sha256:
            raise UserError(f"{path}: prompts.sha256: is not that of the prompts in {place}")
        by_candidate: dict[str, list[Observation]] = {}
        for one in seen:
            by_candidate.setdefault(one.candidate, []).append(one)
        if list(by_candidate) != [tried.candidate for tried in self.tried]:
            raise UserError(f"{path}: tried: are not the candidates of {place}")
        self._check_order(path)
        for number, tried in enumerate(self.tried):
            if not self.goal.anytime and len(by_candidate[tried.candidate]) != self.prompts.prompts:
                raise UserError(
                    f"{path}: tried.{number}: has {len(by_candidate[tried.candidate]):,} completions of "
                    f"{self.prompts.prompts:,} prompts; without --anytime the bound is of all of them"
                )
            found = outcome(by_candidate[tried.candidate], self.goal, self.oracle, self.candidates)
            for key, value in found.items():
                if not _agree(getattr(tried, key), value):
                    raise UserError(f"{path}: tried.{number}.{key}: {getattr(tried, key)} should be {value}")
        if not all(tried.passed for tried in self.tried[:-1]):
            raise UserError(f"{path}: tried: goes on after a candidate that did not pass")

    def _check_order(self, path: Path) -> None:
        """Refuses candidates that are not the beginning of the order that was chosen beforehand."""
        order = [one.candidate for one in self.ranked] or [one.candidate for one in self.tried]
        if self.candidates != len(order) or order[: len(self.tried)] != [one.candidate for one in self.tried]:
            raise UserError(f"{path}: tried: is not the beginning of ranked, the order of {self.candidates} candidates")

    def _observation(self, row: dict[str, Any], place: str) -> Observation:
        found = checked(Observation, row, place)
        least = 0.0 if self.goal.method == "importance" else 1.0
        if not least <= found.weight <= self.goal.largest:
            raise UserError(
                f"{place}: weight: must lie between {least:g} and {self.goal.largest:g}, not {found.weight}"
            )
        return found


def outcome(
    observed: Sequence[Observation], goal: Goal, oracle: OracleErrors | None, candidates: int
) -> dict[str, Any]:
    """The numbers of a `Tried`, from its completions in the order in which they were drawn.

    Raises:
        UserError: a prompt occurs twice.
    """
    check_different([(one.row, one.prompt) for one in observed], "completions")
    values = [one.counted for one in observed]
    bound = goal.bound(values)
    return {
        "n": len(values),
        "violations": sum(value > 0 for value in values),
        "missing": sum(one.complies is None for one in observed),
        "bound": bound,
        "true_bound": oracle and oracle.true_bound(goal, values, candidates),
        "passed": bound <= goal.rate,
    }


def completions_file(path: Path) -> Path:
    """Where the completions of a certificate lie."""
    return path.with_name(f"{path.name.removesuffix('.json')}.completions.jsonl")


def write_completions(path: Path, observed: Sequence[Observation]) -> str:
    """Writes the completions beside a certificate's file, and returns their hash."""
    place = completions_file(path)
    write_rows(place, map(asdict, observed))
    return sha256(read_text(place).encode()).hexdigest()


def version_of(constraint: Constraint) -> str:
    """A hash of what decides a constraint's verdicts, files by their content."""
    return digest(constraint.identity())


def prompts_hash(prompts: Sequence[tuple[int, Given]]) -> str:
    """A hash of numbered prompts, whatever their order, each counted once."""
    texts = {json.dumps([row, prompt], sort_keys=True) for row, prompt in prompts}
    return sha256("\n".join(sorted(texts)).encode()).hexdigest()


def check_different(prompts: Sequence[tuple[int, Given]], place: str) -> None:
    """Refuses a prompt that occurs twice: its completions would not be independent.

    Raises:
        UserError: naming both rows.
    """
    first: dict[str, int] = {}
    for row, prompt in prompts:
        key = same_prompt(prompt)
        if key in first:
            raise UserError(
                f"{place} row {row}: repeats the prompt of row {first[key]}; a certificate counts one completion a "
                "prompt, as others would not be independent, so leave repetitions out (or raise --prompt_tokens)"
            )
        first[key] = row


def same_prompt(prompt: Given) -> str:
    """What is equal for the same prompt, in whatever order a chat's messages have their keys; null is as no key."""
    if isinstance(prompt, list):
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    return json.dumps(prompt, sort_keys=True)


def candidate_name(model: str, guide: str | None, guidance_scale: float) -> str:
    """A model, and what guides it at which η."""
    return model if guide is None else f"{model} guided by {guide} at η={guidance_scale:g}"


def _public_candidate(tried: Tried, model: str) -> str:
    return candidate_name(model, tried.guide and public_name(tried.guide), tried.guidance_scale)


def _short_names(models: Sequence[str]) -> dict[str, str]:
    """Models as `public_name` has them, with as much of their paths as tells them apart."""
    names = {model: public_name(model) for model in models}
    longest = max((len(Path(model).parts) for model in names), default=0)
    for parts in range(2, longest + 1):
        alike = [model for model in names if list(names.values()).count(names[model]) > 1]
        names |= {model: "/".join(Path(model).parts[-parts:]) for model in alike}
    return names


def _public_source(source: str) -> str:
    path, comma, options = source.partition(",")
    return public_name(path) + comma + options


def _check_scores(seen: Sequence[Observation], constraint: Constraint, place: Path) -> None:
    remove_caches(constraint)
    scores = constraint.score([one.prompt for one in seen], [one.completion for one in seen])
    for number, (one, score) in enumerate(zip(seen, scores, strict=True), start=1):
        if one.complies is not None and score.complies != one.complies:  # a missing one counts as a violation anyway
            raise UserError(
                f"{place} row {number}: complies is {one.complies}, but the constraint says {score.complies}"
            )


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE
    return bool(one == other)
