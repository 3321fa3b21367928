"""One method with one seed: the input of its function, its result, and its files.

DIR/METHOD/seed-N/   candidate.json, results.json, completions.jsonl, likelihoods.jsonl, answers.jsonl,
                     the method's own files; needs.json or failed.json if it is incomplete
"""

import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from bridle.comparison.summary import Figures, figures_of
from bridle.errors import RunStopped, UserError, one_line
from bridle.evaluation.results import read_results, write_results
from bridle.recipes.recipe import Recipe, build_recipe
from bridle.recipes.run import fit_guide, train
from bridle.training.config import ALL
from bridle.training.options import EVALUATION, NEEDED
from bridle.utils.files import read_json, read_rows, write_json
from bridle.utils.variables import Variables

RESULTS, CANDIDATE, NEEDS, FAILED = "results.json", "candidate.json", "needs.json", "failed.json"

OF_EVALUATION = EVALUATION | {name for name, needed in NEEDED.items() if needed == "eval_strategy"}
"""Options of the held-out evaluation of a run."""


@dataclass
class Candidate:
    """A model to measure.

    Attributes:
        model: folder or hub name.
        guide: folder of the auxiliary that guides its decoding; None for plain sampling.
        guidance_scale: η of that guidance.
        cost: `seconds` of training, sampling, scoring and fitting, without loading; `updates` of the policy;
            `tokens_trained` and `tokens_sampled`. Unknown entries are left out.
        rows: number of rows of each domain of the corpus.
        about: further entries of its model card, besides the run's recipe, if any.
        needs: the methods whose candidates it was built from; set by the comparison.
    """

    model: str
    guide: str | None = None
    guidance_scale: float = 1.0
    cost: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)


@dataclass
class Cell:
    """The input of a method's function.

    Attributes:
        recipe: common to all methods; `constrained-adaptive` uses it unchanged.
        seed: replaces the recipe's own.
        folder: for the method's own files.
        candidate: returns another method's candidate with the same seed, and makes it if needed.
        resume: whether to resume from checkpoints in `folder`.
    """

    method: str
    recipe: Recipe
    seed: int
    folder: Path
    candidate: Callable[[str], Candidate]
    resume: bool = False

    def variant(self, **changes: Any) -> Recipe:
        """The recipe with this cell's seed and some changed keys; nothing is pushed."""
        mapping = {**self.recipe.resolved, "seed": self.seed, "push_to_hub": False, **changes}
        if evaluated := mapping.get("eval"):
            mapping["eval"] = evaluated = self._evaluated(evaluated, mapping["corpus"])
            if not evaluated["corpus"] and not evaluated.get("share"):  # all held-out rows were of held domains
                mapping = {key: value for key, value in mapping.items() if key not in {"eval", *OF_EVALUATION}}
        recipe = self._recipe(mapping)
        # A method without some of the regularisers may have nothing to build ahead, or to keep.
        regularisers = recipe.regularisers.values()
        idle = {"target_cache"} if not any(one.keeps_targets for one in regularisers) else set()
        idle |= {"targets", "target_cache"} if all(one.anchor == "live" for one in regularisers) else set()
        return self._recipe({key: value for key, value in mapping.items() if key not in idle}) if idle else recipe

    def _evaluated(self, options: Mapping[str, Any], corpus: Collection[str]) -> dict[str, Any]:
        """The section `eval` on some domains, judged as the recipe is, whatever regularisers a method has."""
        return {
            **options,
            "corpus": {name: rows for name, rows in (options.get("corpus") or {}).items() if name in corpus},
            "constraints": options.get("constraints") or list(used_constraints(self.recipe) or self.recipe.constraints),
            "domains": [] if options.get("prompts") else [one for one in self.recipe.judged_domains if one in corpus],
        }

    def _recipe(self, mapping: Mapping[str, Any]) -> Recipe:
        return replace(build_recipe(mapping), file=self.recipe.file)

    def learnt(self, **changes: Any) -> Recipe:
        """As `variant`, without the domains that are held and not learnt, which only `constrained-adaptive` has."""
        return self._on([], changes)

    def _on(self, held: Collection[str], changes: Mapping[str, Any]) -> Recipe:
        """The variant on the domains that are learnt, and on these held ones."""
        kept = {name for name, domain in self.recipe.corpus.items() if domain.learn or name in held}
        if not kept:
            raise UserError(f"corpus: no domain is learnt, so {self.method} has nothing to learn from")
        corpus = {name: rows for name, rows in self.recipe.resolved["corpus"].items() if name in kept}
        return self.variant(corpus=corpus, **changes)

    def train(
        self,
        recipe: Recipe,
        corpus: Mapping[str, Dataset] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Candidate:
        """Runs a recipe in this cell's folder, on the rows of `corpus` if given."""
        rows = corpus or recipe.read_corpus()
        train(recipe, self.folder, resume=self.resume, corpus=rows, callbacks=callbacks)
        counts = {name: len(domain) for name, domain in rows.items()}
        return Candidate(str(self.folder / "model"), cost=_training_cost(self.folder), rows=counts)

    def save(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> str:
        """Writes a model that no recipe's run has made, and its tokenizer; returns their folder."""
        folder = self.folder / "model"
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        return str(folder)

    @property
    def origin(self) -> dict[str, Any]:
        """Model and corpus as the recipe has them, for the card of a saved model."""
        return {key: self.recipe.resolved[key] for key in ("model", "corpus")}

    def sampling_from(self, model: str) -> Recipe:
        """The recipe with another model, and one regulariser whose prompts and constraint are used, on all domains that
        have a constraint."""
        # No method that samples reads kl_on or λ, but a regulariser that never acts cannot hold a domain.
        found = {
            name: options | {"kl_on": "rollouts"} | ({"weight": 1.0} if options.get("weight") == 0 else {})
            for name, options in one_regulariser(self.recipe).items()
        }
        constrained = [one for one in self.recipe.regularisers.values() if one.constraint is not None]
        domains = {domain for one in constrained for domain in one.domains(self.recipe.corpus)}
        one_process = {"schedule": "sequential", "parallel": {}}
        return self._on(domains, {"model": model, "lora": None, "regularisers": found, **one_process})

    def guided(self, model: str, guidance_scale: float | None = None) -> Candidate:
        """A model guided by an R fitted on its own samples, at η of the regulariser if not given."""
        recipe = self.sampling_from(model)
        if guidance_scale is None:
            (guidance_scale,) = (one.guidance_scale for one in recipe.regularisers.values())
        measured = fit_guide(recipe, self.folder)
        cost = {"seconds": _total(measured, "seconds_"), "tokens_sampled": _total(measured, "tokens_sampled")}
        return Candidate(model, str(self.folder / "auxiliary"), guidance_scale, cost)


@dataclass(frozen=True)
class CellFiles:
    """The files of a cell below `root`, the comparison's folder, which may be moved."""

    root: Path
    method: str
    seed: int
    variables: Variables  # no file shows their values

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The cell's own."""
        return self.root / self.method / f"seed-{self.seed}"

    @property
    def is_measured(self) -> bool:
        """Whether the cell is complete."""
        return (self.folder / RESULTS).exists()

    def candidate(self) -> Candidate | None:
        """The method's candidate; None if it is not complete."""
        if not (self.folder / CANDIDATE).exists():
            return None
        found = Candidate(**self.variables.expanded(asdict(read_json(self.folder / CANDIDATE, Candidate))))
        return replace(found, model=self._absolute(found.model), guide=found.guide and self._absolute(found.guide))

    def write_candidate(self, candidate: Candidate) -> None:
        """Marks the cell as made."""
        moved = {"model": self._relative(candidate.model), "guide": candidate.guide and self._relative(candidate.guide)}
        write_json(self.folder / CANDIDATE, self.variables.hidden(asdict(candidate) | moved))
        (self.folder / NEEDS).unlink(missing_ok=True)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Marks the cell as measured; call this last."""
        write_results(self.folder / RESULTS, self.variables.hidden(results))
        (self.folder / FAILED).unlink(missing_ok=True)

    def write_failure(self, error: Exception) -> None:
        """Writes why making or measuring failed."""
        details = "".join(traceback.format_exception(error))
        failure = {"reason": reason_of(error), "traceback": details}
        write_json(self.folder / FAILED, self.variables.hidden(failure))

    def forget_failure(self) -> None:
        """Forgets why an earlier attempt failed, as the cell starts again."""
        (self.folder / FAILED).unlink(missing_ok=True)

    def failure(self) -> str:
        """The reason that `write_failure` wrote."""
        return read_json(self.folder / FAILED, _Failure).reason

    def status(self) -> dict[str, str]:
        """The status in the comparison's `results.json`."""
        found = {"status": "missing", "reason": "it is not measured yet"}
        if self.is_measured:
            found = {"status": "complete"}
        elif (self.folder / FAILED).exists():
            found = {"status": "failed", "reason": self.failure()}
        return found | {"folder": str(self.folder.relative_to(self.root))}

    def figures(self) -> Figures:
        """The figures of a measured cell, its cost included."""
        candidate = self.candidate()
        return figures_of(read_results(self.folder / RESULTS), candidate.cost if candidate else {})

    def _relative(self, path: str) -> str:
        return str(Path(path).relative_to(self.root)) if Path(path).is_relative_to(self.root) else path

    def _absolute(self, path: str) -> str:
        return str(self.root / path) if (self.root / path).exists() else path


@dataclass
class _Failure:
    reason: str


def needs_in(folder: Path) -> list[str]:
    """The methods whose candidates the cell in a folder was built from, or, if it is incomplete, has asked for."""
    if (folder / CANDIDATE).exists():
        return read_json(folder / CANDIDATE, Candidate).needs
    return read_json(folder / NEEDS, list[str]) if (folder / NEEDS).exists() else []


def reason_of(error: Exception) -> str:
    """An error in one line, with its type unless it is Bridle's own."""
    return str(error) if isinstance(error, UserError | RunStopped) else one_line(f"{type(error).__name__}: {error}")


def one_regulariser(recipe: Recipe) -> dict[str, Any]:
    """The recipe's regulariser with a constraint, as a mapping by name; of several, the first, on the whole corpus.

    Raises:
        UserError: the recipe has none.
    """
    constrained = {
        name: recipe.resolved["regularisers"][name]
        for name, regulariser in recipe.regularisers.items()
        if regulariser.constraint is not None
    }
    if not constrained:
        raise UserError("regularisers: a comparison needs one with a constraint")
    return constrained if len(constrained) == 1 else {ALL: {**next(iter(constrained.values())), "domain": None}}


def refuse_shares(recipe: Recipe, reason: str) -> None:
    """Raises a UserError, with the reason, for a recipe with a regulariser that asks for a share."""
    for name, regulariser in recipe.regularisers.items():
        if regulariser.share is not None:
            raise UserError(f"regularisers.{name}.share: {reason}; leave the method out")


def used_constraints(recipe: Recipe) -> dict[str, Any]:
    """The descriptions of the regularisers' constraints by name, for a model card."""
    used = (regulariser.constraint for regulariser in recipe.regularisers.values())
    return {constraint.name: constraint.describe() for constraint in used if constraint is not None}


def _training_cost(folder: Path) -> dict[str, float]:
    """The cost of a training run, from the round records of its `metrics.jsonl`."""
    records = [record for _, record in read_rows(folder / "metrics.jsonl")]
    rounds = [record for record in records if "round" in record]
    return {
        "seconds": sum(_total(record, "seconds_") for record in rounds),
        "updates": max((record["step"] for record in records), default=0),
        "tokens_trained": sum(record["tokens_trained"] for record in rounds),
        "tokens_sampled": sum(_total(record, "tokens_sampled") for record in rounds),
    }


def _total(record: Mapping[str, Any], prefix: str) -> float:
    """The sum of a record's entries "REGULARISER/prefix..." and "prefix..."."""
    return sum(value for key, value in record.items() if key.rpartition("/")[2].startswith(prefix))
