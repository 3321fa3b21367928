"""`bridle compare`: makes and measures every method with every seed in turn, and summarises.

    DIR/recipe.yaml, results.json, verdicts.jsonl, guidance.json, examined.json
    DIR/unfinished.json   what is measured so far, of a call that has not ended
    DIR/METHOD/seed-N/    see `comparison.cell`

A cell with a `candidate.json` is not made again, and one with a `results.json` is not measured again. If the recipe has
changed, the affected cells lose both first, and DIR its `results.json`. Otherwise the results of the last call that
ended stay until those of this one take their place.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache

from bridle.comparison.cell import CANDIDATE, NEEDS, RESULTS, Candidate, Cell, CellFiles, needs_in, reason_of
from bridle.comparison.changes import affects, affects_all, affects_figures, changes, only_measures
from bridle.comparison.knobs import base_name
from bridle.comparison.measure import measure
from bridle.comparison.methods import chosen, description, method_named, methods
from bridle.comparison.plan import Evaluation, JudgeOptions, evaluation_of
from bridle.comparison.summary import Runs, comparisons, first_completions, over_seeds, transfers_of
from bridle.comparison.tracing import trace_guidance
from bridle.errors import RunStopped, UserError
from bridle.evaluation.examination import examine_all, remembered
from bridle.evaluation.judge_examination import JudgeExamination, examine_judge
from bridle.evaluation.judges import Judge
from bridle.evaluation.observations import Observations
from bridle.evaluation.statistics import Estimate
from bridle.evaluation.transfer import reference_of
from bridle.evaluation.win_rate import win_rates
from bridle.models.card import write_card
from bridle.models.hub import without_token
from bridle.models.loading import load_tokenizer
from bridle.recipes.inputs import check_inputs, write_inputs
from bridle.recipes.recipe import Recipe, load_recipe
from bridle.recipes.run import RECIPE_FILE, describe_run, write_recipe
from bridle.training.engine import release_engine
from bridle.utils.files import check_output, digest, only_writer, read_json, write_json
from bridle.utils.oom import is_disk_full, stopping_when_exhausted
from bridle.utils.progress import Progress
from bridle.utils.provenance import environment
from bridle.utils.settings import known_name, read_yaml

FORMAT = 1
UNFINISHED = "unfinished.json"
SHOWN = ("report.html", "guidance.json")
"""Files besides `plots` that show results, and are not theirs once the results are gone."""

Examined = Mapping[str, Mapping[str, Estimate]]  # the AUC of each constraint, by set of rows


@dataclass
class Ended:
    """What is kept of the last call that ended, from its `results.json`."""

    methods: dict[str, Any]
    seeds: list[int]
    win_rate: dict[str, Any] | None = None
    judged: str | None = None  # hash of the completions and of the judge's settings


@dataclass
class _Unfinished:
    """The same, from the `unfinished.json` of a later call, which may have removed `results.json`."""

    ended: Ended | None = None


@dataclass
class Comparison:
    """All methods on one recipe.

    Attributes:
        names: methods, in the order in which they run and are shown; all but unnamed optional ones if not given.
        seeds: each method runs with each of them.
        title: the recipe's name in the results.
        resume: make only what is missing, failed or affected by a change of the recipe.
        show: called with each line of progress.

    Raises:
        UserError: the recipe or a method cannot be used, or `folder` holds another comparison.
    """

    recipe: Recipe
    folder: Path
    names: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    title: str = "recipe"
    resume: bool = False
    show: Callable[[str], None] = field(default=lambda line: None)
    _failed: dict[CellFiles, str] = field(init=False, default_factory=dict)  # in this call: the reasons
    _changed: list[str] = field(init=False, default_factory=list)  # keys of the recipe, since an earlier call
    _recipes: tuple[Mapping[str, Any], ...] = field(init=False, default=())  # the earlier call's, and this one's
    _ended: Ended | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.plan: Evaluation = evaluation_of(self.recipe)
        self.names = chosen(self.names, self.recipe)
        if os.path.exists(self.folder / RECIPE_FILE):  # Path's own raises where a name is too long
            self._resume(self.folder / RECIPE_FILE)

    def _resume(self, path: Path) -> None:
        """Checks that `folder` holds this comparison, and adds its methods and seeds to the requested ones."""
        if not self.resume:
            raise UserError(f"{self.folder}: holds a comparison already; add --resume, or name another --output_dir")
        self._recipes = read_yaml(path), without_token(self.recipe.resolved)
        self._changed, may_name_files = changes(*self._recipes)
        if others := [key for key in self._changed if affects_all(key)]:
            raise UserError(f"{path}: holds another recipe: {', '.join(others)} differ; name another --output_dir")
        check_inputs(
            self.recipe,
            self.folder,
            "or name another --output_dir",
            tuple(self._changed),
            self.plan.files(),
            reads_the_same=not may_name_files,
        )
        if (self.folder / RESULTS).exists():
            self._ended = read_json(self.folder / RESULTS, Ended)
        elif (self.folder / UNFINISHED).exists():
            self._ended = read_json(self.folder / UNFINISHED, _Unfinished).ended
        if self._ended is not None:
            for name in self._ended.methods:
                known_name(base_name(name), methods(), f"{self.folder / RESULTS}: methods", "method")
            # An option may have several values by now.
            self.names = chosen([*self._ended.methods, *self.names], self.recipe)
            self.seeds = sorted({*self._ended.seeds, *self.seeds})

    def run(self) -> None:
        """Makes and measures what is missing, and writes `results.json`.

        Raises:
            UserError: the recipe, a constraint or a file of the plan cannot be used; or another process is writing to
                the folder.
            RunStopped: every method failed, or the disk is full.
        """
        check_output(self.folder / RESULTS)  # mistakes show now, not after an hour
        self.plan.check(load_tokenizer(self.recipe.model))
        with stopping_when_exhausted(self.folder), only_writer(self.folder):
            self._discard_outdated()  # before the recipe is overwritten, which shows what has changed
            write_recipe(self.recipe, self.folder)
            write_inputs(self.recipe, self.folder, self.plan.files())
            cells = [self._cell(name, seed) for seed in self.seeds for name in self.names]
            self._write_unfinished({}, None)
            keep = self.folder / "examined.json"
            examined = examine_all(self.plan.constraints, self.plan.examine, keep, self.show)
            judge = self._examine_judge(keep)
            with Progress("comparing", len(cells), "runs") as progress:
                for cell in cells:
                    if not cell.is_measured:
                        self._complete(cell)
                        self._write_unfinished(examined, judge)
                    progress.update()
            self._sum_up(examined, judge)

    def check_complete(self) -> None:
        """Raises a `RunStopped` that names the methods that failed; the others are in `results.json`."""
        cells = [self._cell(name, seed) for name in self.names for seed in self.seeds]
        if failed := [str(cell) for cell in cells if not cell.is_measured]:
            count = f"{len(failed)} of {len(cells)} runs failed"
            raise RunStopped(f"{self.folder}: {count}: {'; '.join(failed)}; fix the cause and add --resume")

    def _cell(self, method: str, seed: int) -> CellFiles:
        return CellFiles(self.folder, method, seed, self.recipe.variables)

    # ------------------------------------------------------------------ changes of the recipe

    def _discard_outdated(self) -> None:
        """Removes the results that the changed recipe affects, and what shows them."""
        if not self._changed:
            return
        outdated = False
        folders = [(folder.parent.name, folder) for folder in sorted(self.folder.glob("*/seed-*"))]
        cells = [(name, folder) for name, folder in folders if base_name(name) in methods()]
        builds_on = {folder: self._builds_on(name, folder.name) for name, folder in cells}  # before any is removed
        for name, folder in cells:
            # A run resumes from its checkpoint only with the recipe that it has written.
            reads_all = self.recipe.depends_on_evaluation or not (folder / CANDIDATE).exists()
            changed = [key for key in self._changed if affects(key, builds_on[folder], reads_all)]
            if changed := [key for key in changed if not only_measures(key, *self._recipes, reads_all=reads_all)]:
                self.show(f"{name}, {folder.name}: is made again, as {', '.join(changed)} differ")
                for file in (RESULTS, CANDIDATE):  # first, so that a half-removed cell does not look whole
                    (folder / file).unlink(missing_ok=True)
                shutil.rmtree(folder)
                outdated = True
            elif any(map(affects_figures, self._changed)):
                (folder / RESULTS).unlink(missing_ok=True)
                outdated = True
        if outdated:
            self._write_unfinished({}, None)  # first, since it keeps what the results say of the last call
            for file in (RESULTS, *SHOWN):
                (self.folder / file).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "plots", ignore_errors=True)

    def _builds_on(self, name: str, seed: str) -> set[str]:
        """A method and all that it builds on so far, by name."""
        found: set[str] = set()
        ahead = [name]
        while ahead:
            name = ahead.pop()
            found.add(name)
            ahead += {*needs_in(self.folder / name / seed)} - found
        return found

    # ------------------------------------------------------------------ one method, one seed

    def _complete(self, cell: CellFiles) -> None:
        """Makes a cell if needed, and measures it; writes a failure to its folder, which stops no other cell."""
        cell.forget_failure()
        try:
            candidate = self._candidate(cell)
            self.show(f"{cell}: measuring")
            base, dtype, seed = self.recipe.model, self.recipe.dtype, cell.seed
            results, observations = measure(
                candidate.model,
                self.plan,
                guide=candidate.guide,
                guidance_scale=candidate.guidance_scale,
                base=base,
                dtype=dtype,
                seed=seed,
            )
            observations.write(cell.folder)
            self._write_card(cell, candidate, results)
            cell.write_results(results)
        except Exception as error:
            if cell not in self._failed:
                self._fail(cell, error)
        finally:  # the next cell loads its own models
            release_engine()
            clear_device_cache(garbage_collection=True)

    def _candidate(self, cell: CellFiles) -> Candidate:
        """A method's model, made if needed."""
        if (known := cell.candidate()) is not None:
            return known
        if cell in self._failed:  # one attempt per call
            raise UserError(self._failed[cell])
        self.show(f"{cell}: making")
        cell.folder.mkdir(parents=True, exist_ok=True)
        needs: dict[str, None] = {}

        def candidate_of(method: str) -> Candidate:
            needs[method] = None
            write_json(cell.folder / NEEDS, list(needs))  # now, since this cell may stay incomplete
            try:
                return self._candidate(self._cell(method, cell.seed))
            except Exception as error:
                raise UserError(f"it needs {method}, which failed: {reason_of(error)}") from error

        work = Cell(cell.method, self.recipe, cell.seed, cell.folder, candidate_of, self.resume)
        try:
            candidate = replace(method_named(cell.method)(work), needs=list(needs))
        except Exception as error:
            self._fail(cell, error)
            raise
        cell.write_candidate(candidate)
        return candidate

    def _fail(self, cell: CellFiles, error: Exception) -> None:
        if is_disk_full(error):  # the other methods would have no space either
            raise error
        self._failed[cell] = reason_of(error)
        cell.write_failure(error)
        self.show(f"{cell}: failed: {self._failed[cell]}")

    def _write_card(self, cell: CellFiles, candidate: Candidate, results: dict[str, Any]) -> None:
        """Rewrites the model card with the results."""
        about: dict[str, Any] = {
            "method": cell.method,
            "description": description(cell.method),
            "results": results,
        }
        if (cell.folder / RECIPE_FILE).exists():  # it is a training run
            recipe = load_recipe(cell.folder / RECIPE_FILE)
            describe_run(recipe, cell.folder, rows=candidate.rows, about=candidate.about, **about)
        elif (cell.folder / "model").is_dir():
            options = self.recipe.variables.hidden(candidate.about)
            write_card(cell.folder / "model", options, environment=environment(cell.seed), **about)

    # ------------------------------------------------------------------ summary

    def _sum_up(self, examined: Examined, judge: JudgeExamination | None) -> None:
        measured = self._measured()
        if not measured:
            first = self._cell(self.names[0], self.seeds[0]).failure()
            raise RunStopped(f"{self.folder}: all methods failed; the first: {first}")
        observed = {name: {cell.seed: Observations.read(cell.folder) for cell in of} for name, of in measured.items()}
        results = self._results(examined, judge)
        figures = {name: results["methods"][name]["figures"] for name in observed}
        results["comparisons"] = comparisons(observed, figures)
        for name, ratios in transfers_of(observed, self.plan.main["trained_on"], self.plan.trained_on).items():
            results["methods"][name]["figures"] |= ratios
        write_json(self.folder / RESULTS, self.recipe.variables.hidden(results | self._win_rates(observed)))
        (self.folder / UNFINISHED).unlink()
        trace_guidance(self.folder, self.recipe, observed, self.plan)

    def _write_unfinished(self, examined: Examined, judge: JudgeExamination | None) -> None:
        """Writes what has been measured so far, without what needs all observations."""
        ended = self._ended and asdict(replace(self._ended, methods=dict.fromkeys(self._ended.methods)))
        results = self._results(examined, judge) | {"ended": ended}
        write_json(self.folder / UNFINISHED, self.recipe.variables.hidden(results))

    def _measured(self) -> dict[str, list[CellFiles]]:
        """The cells that are measured, by method."""
        cells = {name: [self._cell(name, seed) for seed in self.seeds] for name in self.names}
        found = {name: [cell for cell in of_name if cell.is_measured] for name, of_name in cells.items()}
        return {name: measured for name, measured in found.items() if measured}

    def _results(self, examined: Examined, judge: JudgeExamination | None) -> dict[str, Any]:
        """The figures of all methods, and how they were made; without comparisons."""
        measured = self._measured()
        reads = {name: constraint.reads for name, constraint in self.plan.constraints.items()}
        return {
            "format": FORMAT,
            "recipe": self.title,
            "seeds": list(self.seeds),
            "main": self.plan.main,
            "settings": {**self.recipe.resolved["evaluation"], "reads": reads},
            "prompt_sets": {name: prompts.describe() for name, prompts in self.plan.prompts.items()},
            "examined": {
                constraint: {name: auc.to_json() for name, auc in by_set.items()}
                for constraint, by_set in examined.items()
            },
            "judge_examined": judge and judge.to_json(),
            "methods": {
                name: {
                    "description": description(name),
                    "seeds": {str(seed): self._cell(name, seed).status() for seed in self.seeds},
                    "figures": over_seeds([cell.figures() for cell in measured.get(name, [])]),
                    "reference": reference_of(name, measured),
                }
                for name in self.names
            },
            "comparisons": [],
            "environment": environment(self.seeds[0]),
        }

    def _judge(self, options: JudgeOptions) -> Judge:
        return options.judge(self.recipe.dtype, name=self.recipe.variables.hidden(options.model))

    def _examine_judge(self, keep: Path) -> JudgeExamination | None:
        """The examination, also if the judge is not asked in the end; None without one."""
        options = self.plan.judge
        if options is None or (rows := options.continuations()) is None:
            return None
        key = [asdict(replace(options, prompts=1)), self.recipe.dtype]
        found = remembered(
            keep, key, JudgeExamination, lambda: examine_judge(self._judge(options), rows, seed=self.seeds[0])
        )
        self.show(str(found))
        return found

    def _win_rates(self, observed: Runs) -> dict[str, Any]:
        """`win_rate`, the earlier one if nothing is new, or `judge_failed` with the reason; empty without a judge."""
        options = self.plan.judge
        if options is None or len(observed) < 2:
            return {}
        prompts, completions = first_completions(observed, next(iter(self.plan.prompts)), options.prompts)
        settings = self.recipe.variables.hidden(self.recipe.resolved["evaluation"]["judge"])
        judged = digest([_judging(settings), self.seeds[0], prompts, completions])
        if self._ended is not None and self._ended.win_rate and self._ended.judged == judged:
            return {"win_rate": self._ended.win_rate, "judged": judged}
        verdicts = self.folder / "verdicts.jsonl"
        verdicts.unlink(missing_ok=True)  # `win_rates` appends
        try:
            found = win_rates(prompts, completions, self._judge(options), seed=self.seeds[0], keep=verdicts)
        except Exception as error:
            self.show(f"no win rates: {reason_of(error)}")
            return {"judge_failed": reason_of(error)}
        return {"win_rate": found.to_json(), "judged": judged}


def _judging(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a judge that its verdicts depend on; those of its examination are among them with examples."""
    return {key: value for key, value in settings.items() if key != "examine" or settings.get("examples")}
