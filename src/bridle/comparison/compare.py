"""`bridle compare`: every method with every seed, made and measured one after the other, and summed up.

    DIR/recipe.yaml, results.json, verdicts.jsonl, guidance.json
    DIR/METHOD/seed-N/   candidate.json, results.json, completions.jsonl, likelihoods.jsonl, answers.jsonl,
                         the method's own files, or failed.json

A run that has a `candidate.json` is not made again, and one with a `results.json` is not measured again. Where the
recipe has changed, the runs that it concerns lose both first.
"""

import os
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from bridle.comparison.measure import measure
from bridle.comparison.methods import (
    Candidate,
    Cell,
    description,
    free_memory,
    method_named,
    methods,
    rl_options,
    shapes,
)
from bridle.comparison.plan import Evaluation, evaluation_of
from bridle.comparison.summary import comparisons, figures_of, first_completions, over_seeds
from bridle.comparison.tracing import trace_guidance
from bridle.errors import RunStopped, UserError, one_line
from bridle.evaluation import read_results, win_rates, write_results
from bridle.evaluation.observations import Observations
from bridle.models.card import write_card
from bridle.models.hub import without_token
from bridle.recipes.inputs import check_inputs, write_inputs
from bridle.recipes.recipe import Recipe, load_recipe
from bridle.recipes.run import RECIPE_FILE, describe_run
from bridle.utils.files import only_writer, read_json, write_json, write_text
from bridle.utils.oom import is_disk_full, stopping_when_exhausted
from bridle.utils.progress import Progress
from bridle.utils.provenance import environment
from bridle.utils.settings import check_keys, different_keys, known_name, read_yaml

FORMAT = 1
RESULTS, CANDIDATE, FAILED = "results.json", "candidate.json", "failed.json"
COMMON = ("model", "dtype", "corpus")
"""Keys of a recipe without which figures do not go together."""
MEASURED = ("evaluation", "constraints", "max_new_tokens")
"""Keys of a recipe that say what is measured."""


@dataclass
class Earlier:
    """What an earlier call left in a comparison's `results.json`."""

    methods: dict[str, Any]
    seeds: list[int]
    win_rate: dict[str, Any] | None = None


@dataclass
class Failure:
    """Why a method was not made or measured."""

    reason: str


@dataclass
class Comparison:
    """All methods on one recipe.

    Attributes:
        recipe: what they have in common.
        folder: where everything goes.
        names: methods, in the order in which they are made and shown.
        seeds: each method is made with each of them.
        title: what the results call the recipe.
        resume: keep what `folder` holds already, and make only what is missing or failed, or what a change of the
            recipe concerns.
        show: is told what is being done, a line at a time.
    """

    recipe: Recipe
    folder: Path
    names: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    title: str = "recipe"
    resume: bool = False
    show: Callable[[str], None] = field(default=lambda line: None)
    _failed: dict[tuple[str, int], str] = field(init=False, default_factory=dict)  # in this call, and why
    _measured_now: bool = field(init=False, default=False)  # in this call
    _changed: list[str] = field(init=False, default_factory=list)  # keys of the recipe, since an earlier call

    def __post_init__(self) -> None:
        self.plan: Evaluation = evaluation_of(self.recipe)
        self.names = list(self.names or methods())
        check_keys(self.recipe.methods, methods(), "methods")
        rl_options(self.recipe)
        for name in self.names:
            method_named(name)
        self._take_up()

    def _take_up(self) -> None:
        """Goes on with what `folder` holds: the same model and corpus, and at least the same methods and seeds."""
        path = self.folder / RECIPE_FILE
        if not os.path.exists(path):  # Path's own raises where a name is too long
            return
        if not self.resume:
            raise UserError(f"{self.folder}: holds a comparison already; add --resume, or name another --output_dir")
        earlier, now = ({"methods": {}} | recipe for recipe in (read_yaml(path), without_token(self.recipe.resolved)))
        self._changed = different_keys(earlier, now)
        if others := [key for key in self._changed if _section(key) in COMMON]:
            raise UserError(f"{path}: was another recipe: {', '.join(others)} differ; name another --output_dir")
        check_inputs(self.recipe, self.folder, "or name another --output_dir", tuple(self._changed), self.plan.files())
        if (self.folder / RESULTS).exists():
            before = read_json(self.folder / RESULTS, Earlier)
            for name in before.methods:
                known_name(name, methods(), f"{self.folder / RESULTS}: methods", "method")
            self.names = list(dict.fromkeys([*before.methods, *self.names]))
            self.seeds = sorted({*before.seeds, *self.seeds})

    def run(self) -> None:
        """Makes and measures what is missing, and writes `results.json`.

        Raises:
            UserError: the recipe, a constraint or a file of the plan cannot be used at all; or another process is
                writing to the folder.
            RunStopped: no method could be carried out, or the disk is full.
        """
        self.plan.check()  # a mistake shows now and not after an hour
        with stopping_when_exhausted(self.folder), only_writer(self.folder):
            self._discard_outdated()  # before the recipe that shows what has changed is written over
            self._carry_out_all()
            self._sum_up()

    def _carry_out_all(self) -> None:
        resolved = without_token(self.recipe.resolved)
        write_text(self.folder / RECIPE_FILE, yaml.safe_dump(resolved, sort_keys=False))
        write_inputs(self.recipe, self.folder, self.plan.files())
        runs = [(name, seed) for seed in self.seeds for name in self.names]
        with Progress("comparing", len(runs), "runs") as progress:
            for name, seed in runs:
                self._carry_out(name, seed)
                progress.update()

    def check_complete(self) -> None:
        """Raises a `RunStopped` that names the methods that failed; the others are in `results.json`."""
        failed = [
            f"{name}, seed {seed}"
            for name in self.names
            for seed in self.seeds
            if not (self._folder(name, seed) / RESULTS).exists()
        ]
        if failed:
            count = f"{len(failed)} of {len(self.names) * len(self.seeds)} runs failed"
            raise RunStopped(f"{self.folder}: {count}: {'; '.join(failed)}; fix the cause and add --resume")

    def _discard_outdated(self) -> None:
        """Removes what the recipe, as it is now, would make or measure otherwise."""
        runs = [(name, folder) for name in methods() for folder in sorted((self.folder / name).glob("seed-*"))]
        for name, folder in runs if self._changed else []:
            if changed := [key for key in self._changed if shapes(key, self._builds_on(name, folder.name))]:
                self.show(f"{name}, {folder.name}: is made again, as {', '.join(changed)} differ")
                for file in (RESULTS, CANDIDATE):  # first, so that what is half removed does not look whole
                    (folder / file).unlink(missing_ok=True)
                shutil.rmtree(folder)
            elif any(_section(key) in MEASURED for key in self._changed):
                (folder / RESULTS).unlink(missing_ok=True)

    def _builds_on(self, name: str, seed: str) -> set[str]:
        """A method and all that it builds on, by name: any method, where it was not made to its end."""
        found: set[str] = set()
        ahead = [name]
        while ahead:
            name = ahead.pop()
            if not (self.folder / name / seed / CANDIDATE).exists():
                return set(methods())
            found.add(name)
            needs = read_json(self.folder / name / seed / CANDIDATE, Candidate).needs
            ahead += [other for other in needs if other not in found]
        return found

    # ------------------------------------------------------------------ one method, one seed

    def _carry_out(self, name: str, seed: int) -> None:
        """Makes and measures one method with one seed; what goes wrong is written down and stops no other."""
        folder = self._folder(name, seed)
        if (folder / RESULTS).exists():
            return
        try:
            candidate = self._candidate(name, seed)
            self.show(f"{name}, seed {seed}: measuring")
            base, dtype = self.recipe.model, self.recipe.dtype
            results, observations = measure(
                candidate.model, self.plan, guide=candidate.guide, base=base, dtype=dtype, seed=seed
            )
            observations.write(folder)
            self._write_card(name, seed, candidate, results)
            write_results(folder / RESULTS, self._hidden(results))  # last: it says that the run is complete
            (folder / FAILED).unlink(missing_ok=True)
            self._measured_now = True
        except Exception as error:
            if (name, seed) not in self._failed:
                self._note_failure(name, seed, error)
        finally:
            free_memory()

    def _candidate(self, name: str, seed: int) -> Candidate:
        """A method's model, made if it was not yet."""
        folder = self._folder(name, seed)
        if (folder / CANDIDATE).exists():
            known = Candidate(**self.recipe.variables.expanded(asdict(read_json(folder / CANDIDATE, Candidate))))
            return replace(known, model=self._found(known.model), guide=known.guide and self._found(known.guide))
        if (name, seed) in self._failed:  # not tried twice in one call
            raise UserError(self._failed[name, seed])
        self.show(f"{name}, seed {seed}: making")
        folder.mkdir(parents=True, exist_ok=True)
        needs: dict[str, None] = {}

        def needed(other: str) -> Candidate:
            needs[other] = None
            return self._needed(other, seed)

        cell = Cell(name, self.recipe, seed, folder, needed, self.resume)
        try:
            candidate = replace(method_named(name)(cell), needs=list(needs))
        except Exception as error:
            self._note_failure(name, seed, error)
            raise
        made = {"model": self._within(candidate.model), "guide": candidate.guide and self._within(candidate.guide)}
        write_json(folder / CANDIDATE, self._hidden(asdict(candidate) | made))
        return candidate

    def _within(self, path: str) -> str:
        """A path below the comparison's folder as seen from there, so that the folder may be moved."""
        return str(Path(path).relative_to(self.folder)) if Path(path).is_relative_to(self.folder) else path

    def _found(self, path: str) -> str:
        return str(self.folder / path) if (self.folder / path).exists() else path

    def _needed(self, name: str, seed: int) -> Candidate:
        """A model that another method builds on."""
        try:
            return self._candidate(name, seed)
        except Exception as error:
            raise UserError(f"it needs {name}, which failed: {_reason(error)}") from error

    def _note_failure(self, name: str, seed: int, error: Exception) -> None:
        if is_disk_full(error):  # nor would any other method find room
            raise error
        self._failed[name, seed] = reason = _reason(error)
        details = "".join(traceback.format_exception(error))
        write_json(self._folder(name, seed) / FAILED, self._hidden({"reason": reason, "traceback": details}))
        self.show(f"{name}, seed {seed}: failed: {reason}")

    def _write_card(self, name: str, seed: int, candidate: Candidate, results: dict[str, Any]) -> None:
        """The model card anew, now with what was measured."""
        folder = self._folder(name, seed)
        about: dict[str, Any] = {"method": name, "description": description(method_named(name)), "results": results}
        if (folder / RECIPE_FILE).exists():  # it is a training run
            recipe = load_recipe(folder / RECIPE_FILE)
            describe_run(recipe, folder, rows=candidate.rows, about=candidate.about, **about)
        elif (folder / "model").is_dir():
            write_card(folder / "model", self._hidden(candidate.about), environment=environment(seed), **about)

    def _hidden(self, written: Any) -> Any:
        return self.recipe.variables.hidden(written)

    def _folder(self, name: str, seed: int) -> Path:
        return self.folder / name / f"seed-{seed}"

    # ------------------------------------------------------------------ all together

    def _sum_up(self) -> None:
        measured = {name: [s for s in self.seeds if (self._folder(name, s) / RESULTS).exists()] for name in self.names}
        if not any(measured.values()):
            reason = read_json(self._folder(self.names[0], self.seeds[0]) / FAILED, Failure).reason
            raise RunStopped(f"{self.folder}: no method could be carried out; the first: {reason}")
        observed = {
            name: {seed: Observations.read(self._folder(name, seed)) for seed in seeds}
            for name, seeds in measured.items()
            if seeds
        }
        figures = {name: over_seeds([self._figures(name, seed) for seed in measured[name]]) for name in observed}
        reads = {name: constraint.reads for name, constraint in self.plan.constraints.items()}
        results = {
            "format": FORMAT,
            "recipe": self.title,
            "seeds": list(self.seeds),
            "main": self.plan.main,
            "settings": {**self.recipe.resolved["evaluation"], "reads": reads},
            "methods": {
                name: {
                    "description": description(method_named(name)),
                    "seeds": {str(seed): self._status(name, seed) for seed in self.seeds},
                    "figures": figures.get(name, {}),
                }
                for name in self.names
            },
            "comparisons": comparisons(observed, figures),
            "environment": environment(self.seeds[0]),
        }
        judged = self._judged(observed)  # before the file that may hold older win rates is written over
        write_json(self.folder / RESULTS, self._hidden(results | judged))
        trace_guidance(self.folder, self.recipe, observed, self.plan)

    def _figures(self, name: str, seed: int) -> dict[str, Any]:
        folder = self._folder(name, seed)
        return figures_of(read_results(folder / RESULTS), read_json(folder / CANDIDATE, Candidate).cost)

    def _status(self, name: str, seed: int) -> dict[str, Any]:
        folder = self._folder(name, seed)
        where = {"folder": str(folder.relative_to(self.folder))}
        if (folder / RESULTS).exists():
            return {"status": "complete", **where}
        return {"status": "failed", "reason": read_json(folder / FAILED, Failure).reason, **where}

    def _judged(self, observed: dict[str, dict[int, Observations]]) -> dict[str, Any]:
        """`win_rate`, the known one where nothing is new, or `judge_failed` with the reason; empty without a judge."""
        options, results = self.plan.judge, self.folder / RESULTS
        if options is None or len(observed) < 2:
            return {}
        known = read_json(results, Earlier).win_rate if results.exists() else None
        if known and not self._measured_now:
            return {"win_rate": known}
        prompts, said = first_completions(observed, next(iter(self.plan.prompts)), options.prompts)
        verdicts = self.folder / "verdicts.jsonl"
        verdicts.unlink(missing_ok=True)  # they are added to
        try:
            judge = options.judge(self.recipe.dtype, name=self._hidden(options.model))
            return {"win_rate": win_rates(prompts, said, judge, seed=self.seeds[0], keep=verdicts).to_json()}
        except Exception as error:
            self.show(f"no win rates: {_reason(error)}")
            return {"judge_failed": _reason(error)}


def _section(key: str) -> str:
    return key.partition(".")[0]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError | RunStopped) else one_line(f"{type(error).__name__}: {error}")
