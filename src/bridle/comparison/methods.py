"""The methods that are compared, each a few lines over what exists. Others join by the entry point `bridle.methods`.

A method is a function of a `Cell` that makes a `Candidate`; the first line of its docstring describes it.
Every method learns the same corpus for the same number of updates. On top of that, reinforcement learning gets the
wall-clock time of `constrained-adaptive`, and `dpo` as many updates on pairs. Domains that are held and not learnt
(`learn: false`) are for `constrained-adaptive` alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat

from bridle.baselines.filtration import compliant_rows
from bridle.baselines.reinforcement import ReinforcementOptions, reinforce
from bridle.comparison import knobs, rivals
from bridle.comparison.cell import Candidate, Cell, one_regulariser, refuse_shares, used_constraints
from bridle.comparison.knobs import base_name
from bridle.constraints import AllOf, Constraint
from bridle.data import Prompt
from bridle.errors import RunStopped, UserError, prefixed
from bridle.models.loading import load_model, load_tokenizer
from bridle.recipes.recipe import Recipe
from bridle.recipes.run import build_trainer
from bridle.training.config import Regulariser
from bridle.utils.files import read_json, write_json
from bridle.utils.settings import build, check_keys, known_name
from bridle.utils.timing import timed

ENTRY_POINTS = "bridle.methods"
REPORT = "reinforcement.json"

Method = Callable[[Cell], Candidate]


@dataclass(frozen=True)
class NoOptions:
    """Most methods have none: the recipe says all."""


@dataclass(frozen=True)
class GuidanceOptions:
    """Options of guided decoding.

    Attributes:
        guidance_scale: η in q ∝ p·R^η; None: the regulariser's.
    """

    guidance_scale: NonNegativeFloat | None = None


OPTIONS: dict[str, type] = {
    "rl": ReinforcementOptions,
    "nado-decoding": GuidanceOptions,
    "nado-decoding-sft": GuidanceOptions,
    **knobs.OPTIONS,
}
"""By method, its options in a recipe."""


def base(cell: Cell) -> Candidate:
    """The model before tuning."""
    return Candidate(cell.recipe.model)


def sft(cell: Cell) -> Candidate:
    """Plain fine-tuning on the whole corpus."""
    return cell.train(cell.learnt(regularisers={}))


def filtration(cell: Cell) -> Candidate:
    """Fine-tuning on what is left of the corpus when the rows that violate are dropped.

    Raises:
        UserError: no learnt domain has a constraint, so that no row would be dropped.
    """
    refuse_shares(cell.recipe, "a share does not say which rows to drop")
    recipe = cell.learnt(regularisers={})
    rows, counts, seconds = recipe.read_corpus(), {}, dict[str, float]()
    for domain in rows:
        constraints = [
            regulariser.constraint
            for regulariser in cell.recipe.regularisers.values()
            if regulariser.constraint is not None and domain in regulariser.domains(cell.recipe.corpus)
        ]
        if constraints:
            constraint = constraints[0] if len(constraints) == 1 else AllOf(constraints)
            with timed(seconds, domain):
                rows[domain], counts[domain] = compliant_rows(rows[domain], constraint, domain)
    if not counts:
        raise UserError("regularisers: no learnt domain has a constraint, and filtration would be sft; leave it out")
    write_json(cell.folder / "filtered.json", {domain: asdict(count) for domain, count in counts.items()})
    made = cell.train(recipe, rows)
    cost = {**made.cost, "seconds": made.cost["seconds"] + sum(seconds.values())}
    return replace(made, cost=cost, about={"constraints": used_constraints(cell.recipe)})


def rl(cell: Cell) -> Candidate:
    """Reinforcement learning from the plainly tuned model, for as long as `constrained-adaptive` took."""
    return _reinforced(cell, seconds=cell.candidate("constrained-adaptive").cost["seconds"])


def rl_converged(cell: Cell) -> Candidate:
    """The same reinforcement learning, until the reward no longer rises."""
    folder = Path(cell.candidate("rl").model).parent
    return _reinforced(cell, resume_from=folder / read_json(folder / REPORT, dict[str, Any])["checkpoint"])


def nado_decoding(cell: Cell) -> Candidate:
    """The model before tuning, guided by R at decoding time."""
    return cell.guided(cell.recipe.model, options_of("nado-decoding", cell.recipe).guidance_scale)


def nado_decoding_sft(cell: Cell) -> Candidate:
    """The plainly tuned model, guided by R at decoding time."""
    scale = options_of("nado-decoding-sft", cell.recipe).guidance_scale
    return cell.guided(cell.candidate("sft").model, scale)


def constrained(cell: Cell) -> Candidate:
    """Constrained fine-tuning without adaptive: one regulariser on the whole corpus.

    Raises:
        UserError: the recipe has no regulariser with a constraint, or its λ is 0.
    """
    (options,) = one_regulariser(cell.recipe).values()
    name, one = next((name, one) for name, one in cell.recipe.regularisers.items() if one.constraint is not None)
    if one.weight == 0:
        raise UserError(f"regularisers.{name}.weight: is 0, and constrained would be sft; set one, or leave it out")
    return cell.train(cell.learnt(regularisers=[{**options, "domain": None}]))


def constrained_adaptive(cell: Cell) -> Candidate:
    """Constrained fine-tuning with a regulariser for each domain, as the recipe has it."""
    if cell.method == knobs.ADAPTIVE:
        return cell.train(cell.variant())
    factor, given = knobs.knob_of(cell), cell.recipe.resolved["regularisers"]
    scaled = {name: {**given[name], "weight": one.weight * factor} for name, one in _scaled(cell.recipe).items()}
    return cell.train(cell.variant(regularisers={**given, **scaled}))


BUILT_IN: dict[str, Method] = {
    "base": base,
    "sft": sft,
    "filtration": filtration,
    "rl": rl,
    "rl-converged": rl_converged,
    "nado-decoding": nado_decoding,
    "nado-decoding-sft": nado_decoding_sft,
    "constrained": constrained,
    "constrained-adaptive": constrained_adaptive,
}


def methods() -> list[str]:
    """The names of all methods: the built-in ones, the optional ones, then those of installed packages."""
    return [*BUILT_IN, *rivals.METHODS, *sorted(_plugged_in())]


def chosen(names: Sequence[str], recipe: Recipe) -> list[str]:
    """The names of the methods to compare; of an optional one with several values of an option, one name for each.

    Args:
        names: the requested ones; if none, all but the optional ones that the section `methods` does not name.
        recipe: has the options.

    Raises:
        UserError: a method is unknown, or an option is wrong.
    """
    check_options(recipe)
    wanted = list(names) or [name for name in methods() if name not in rivals.METHODS or name in recipe.methods]
    for name in wanted:
        method_named(name)
    found: dict[Any, str] = {}
    for one in (one for name in wanted for one in _each(name, recipe)):
        found.setdefault(knobs.same(one, recipe), one)
    return list(found.values())


def check_options(recipe: Recipe, installed: bool = True) -> None:
    """Raises a UserError if the section `methods` names an unknown method or option, or a wrong value.

    Without `installed`, methods that are not Bridle's own are passed over, and their packages not loaded.
    """
    own = BUILT_IN.keys() | rivals.METHODS.keys()
    with prefixed(f"{recipe.file}: "):
        if installed:
            check_keys(recipe.methods, methods(), "methods")
        for name in recipe.methods if installed else [name for name in recipe.methods if name in own]:
            method_named(name)
            options_of(name, recipe)


def _each(name: str, recipe: Recipe) -> list[str]:
    if base_name(name) not in knobs.OPTIONS:
        return [name]
    found = knobs.names(name, recipe)
    if scaled := [one for one in found if one.startswith(f"{knobs.ADAPTIVE}@")]:
        for domain, regulariser in _scaled(recipe).items():
            if regulariser.target is not None:
                raise UserError(f"regularisers.{domain}.target: λ follows it; leave {scaled[0]} out")
    return found


def _scaled(recipe: Recipe) -> dict[str, Regulariser]:
    """The regularisers whose λ the knob of `constrained-adaptive` multiplies, by name."""
    of = options_of(knobs.ADAPTIVE, recipe).of
    if of is None:
        return recipe.regularisers
    known_name(of, recipe.regularisers, f"methods.{knobs.ADAPTIVE}.of", "regulariser")
    return {of: recipe.regularisers[of]}


def method_named(name: str) -> Method:
    """The method of a name; a UserError if there is none, or its package does not load."""
    name = base_name(name)
    known_name(name, methods(), "methods", "method")
    if built_in := (BUILT_IN | rivals.METHODS).get(name):
        return built_in
    try:
        method: Method = _plugged_in()[name].load()
    except Exception as error:
        raise UserError(f"methods: {name}: its package does not load: {error}") from error
    return method


@cache
def installed(group: str) -> EntryPoints:
    """The entry points of a group, kept: to look them up reads the folders of all installed packages."""
    return entry_points(group=group)


def _plugged_in() -> dict[str, EntryPoint]:
    return {point.name: point for point in installed(ENTRY_POINTS) if point.name not in BUILT_IN}


def description(name: str) -> str:
    """What a method is, in a sentence."""
    said = (method_named(name).__doc__ or "").strip().split("\n")[0]
    if name == base_name(name):
        return said
    values = ", ".join(f"{option} {value}" for option, value in knobs.values_of(name).items())
    return f"{said.rstrip('.')}: {values}."


def _reinforced(cell: Cell, *, seconds: float | None = None, resume_from: Path | None = None) -> Candidate:
    """TRL's reinforcement learning from the plainly tuned model, on the prompts of the regulariser's rollouts."""
    refuse_shares(cell.recipe, "its reward would make all outputs comply")
    start, options = cell.candidate("sft").model, options_of("rl", cell.recipe)
    recipe = cell.sampling_from(start)
    prompts, constraint, max_new_tokens = _rollout_prompts(recipe, cell.folder)
    model, tokenizer = load_model(start, dtype=recipe.dtype), load_tokenizer(start)
    report = reinforce(
        model,
        tokenizer,
        [prompt.ids for prompt in prompts],
        constraint,
        options,
        output_dir=cell.folder,
        seed=cell.seed,
        max_new_tokens=max_new_tokens,
        use_cpu=bool(recipe.training.get("use_cpu")),
        seconds=seconds,
        messages=[prompt.messages for prompt in prompts],
        resume=cell.resume,
        resume_from=resume_from,
    )
    if report["stopped_because"] == "steps":
        end = "the reward stopped rising" if seconds is None else "the time was up"
        raise RunStopped(f"methods.rl.max_steps: {report['steps']} updates were made before {end}; raise it")
    folder = cell.save(model, tokenizer)
    write_json(cell.folder / REPORT, report)
    about = {
        **cell.origin,
        **asdict(options),
        "constraints": used_constraints(recipe),
        "seed": cell.seed,
        "max_steps": report["steps"],
        "max_completion_length": max_new_tokens,
    }
    cost = {"seconds": report["seconds"], "updates": report["steps"]}
    return Candidate(folder, cost=cost, about=about)


def options_of(name: str, recipe: Recipe) -> Any:
    """The recipe's options of a method, `methods.NAME`: of a plugged-in one the mapping, which it checks itself.

    Raises:
        UserError: a key is unknown, or a value is wrong.
    """
    if base_name(name) in knobs.OPTIONS:
        return knobs.options_of(name, recipe)
    given = recipe.methods.get(name)
    return build(OPTIONS.get(name, NoOptions), given, f"methods.{name}") if name in BUILT_IN else given


def _rollout_prompts(recipe: Recipe, folder: Path) -> tuple[list[Prompt], Constraint, int]:
    """The prompts of the recipe's regulariser in all rounds, its constraint, and the length of its completions."""
    trainer = build_trainer(recipe, folder, recipe.read_corpus())
    (regulariser,), args = trainer.regularisers, trainer.args
    prompts = [prompt for index in range(1, args.rounds + 1) for prompt in regulariser.prompts(index)]
    return prompts, regulariser.constraint, args.max_new_tokens
