"""The methods that are compared, each a few lines over what exists. Others join by the entry point `bridle.methods`.

A method is a function of a `Cell` that makes a `Candidate`; the first line of its docstring describes it.
Every method sees the same corpus for the same number of updates, except reinforcement learning, which
gets the wall-clock time of `constrained-adaptive` on top of the plain fine-tuning that it starts from.
"""

import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from bridle.baselines.filtration import compliant_rows
from bridle.baselines.reinforcement import ReinforcementOptions, reinforce
from bridle.constraints import AllOf, Constraint
from bridle.data import Prompt
from bridle.errors import RunStopped, UserError
from bridle.models.loading import load_model, load_tokenizer
from bridle.recipes.recipe import Recipe, build_recipe
from bridle.recipes.run import SHAPES_NOTHING, build_trainer, fit_guide, train
from bridle.training.config import ALL
from bridle.utils.files import read_json, read_rows, write_json
from bridle.utils.settings import build, known_name

ENTRY_POINTS = "bridle.methods"
REPORT = "reinforcement.json"


@dataclass
class Candidate:
    """A model that is measured.

    Attributes:
        model: folder or hub name.
        guide: folder of the auxiliary that guides its decoding; None for plain sampling.
        cost: what making it took: `seconds` of training, sampling, scoring and fitting, without loading;
            `updates` of the policy; `tokens_trained` and `tokens_sampled`. What is unknown is left out.
        rows: how many rows each domain of the corpus gave.
        about: what its model card tells besides the recipe that was carried out, or where none was.
        needs: the methods whose candidates it was made from; noted where they are asked for.
    """

    model: str
    guide: str | None = None
    cost: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)


@dataclass
class Cell:
    """One method with one seed: what its function works with.

    Attributes:
        method: its name.
        recipe: what all methods have in common; `constrained-adaptive` as it stands.
        seed: of this run; the recipe's own is replaced by it.
        folder: the method's own, for whatever it makes.
        candidate: what another method made with the same seed, by name; made now if it was not yet.
        resume: whether to go on from checkpoints in `folder`.
    """

    method: str
    recipe: Recipe
    seed: int
    folder: Path
    candidate: Callable[[str], Candidate]
    resume: bool = False

    def variant(self, **changes: Any) -> Recipe:
        """The recipe with this cell's seed and with other values for some of its keys; nothing of it is pushed."""
        return build_recipe({**self.recipe.resolved, "seed": self.seed, "push_to_hub": False, **changes})

    def train(self, recipe: Recipe, corpus: Mapping[str, Dataset] | None = None) -> Candidate:
        """Carries a recipe out in this cell's folder, on other rows than its own if `corpus` has them."""
        rows = corpus or recipe.read_corpus()
        train(recipe, self.folder, resume=self.resume, corpus=rows)
        counts = {name: len(domain) for name, domain in rows.items()}
        return Candidate(str(self.folder / "model"), cost=training_cost(self.folder), rows=counts)

    def sampling_from(self, model: str) -> Recipe:
        """The recipe with another model, and one regulariser to sample and judge for."""
        regularisers = one_regulariser(self.recipe)
        return self.variant(model=model, lora=None, schedule="sequential", regularisers=regularisers)

    def guided(self, model: str) -> Candidate:
        """A model guided by an R that is fitted on its own samples."""
        measured = fit_guide(self.sampling_from(model), self.folder)
        cost = {"seconds": _total(measured, "seconds_"), "tokens_sampled": _total(measured, "tokens_sampled")}
        return Candidate(model, str(self.folder / "auxiliary"), cost)


Method = Callable[[Cell], Candidate]


def base(cell: Cell) -> Candidate:
    """The model before tuning."""
    return Candidate(cell.recipe.model)


def sft(cell: Cell) -> Candidate:
    """Plain fine-tuning on the whole corpus."""
    return cell.train(cell.variant(regularisers={}))


def filtration(cell: Cell) -> Candidate:
    """Fine-tuning on what is left of the corpus when the rows that violate are dropped."""
    recipe = cell.variant(regularisers={})
    rows, counts = recipe.read_corpus(), {}
    for domain in rows:
        held_to = [
            regulariser.constraint
            for regulariser in cell.recipe.regularisers.values()
            if regulariser.constraint is not None and domain in regulariser.domains(rows)
        ]
        if held_to:
            constraint = held_to[0] if len(held_to) == 1 else AllOf(held_to)
            rows[domain], counts[domain] = compliant_rows(rows[domain], constraint, domain)
    write_json(cell.folder / "filtered.json", {domain: asdict(count) for domain, count in counts.items()})
    return replace(cell.train(recipe, rows), about={"constraints": _used_constraints(cell.recipe)})


def rl(cell: Cell) -> Candidate:
    """Reinforcement learning from the plainly tuned model, for as long as `constrained-adaptive` took."""
    return _reinforced(cell, seconds=cell.candidate("constrained-adaptive").cost["seconds"])


def rl_converged(cell: Cell) -> Candidate:
    """The same reinforcement learning, until the reward no longer rises."""
    begun = Path(cell.candidate("rl").model).parent
    return _reinforced(cell, resume_from=begun / _report(begun)["checkpoint"])


def nado_decoding(cell: Cell) -> Candidate:
    """The model before tuning, guided by R at decoding time."""
    return cell.guided(cell.recipe.model)


def nado_decoding_sft(cell: Cell) -> Candidate:
    """The plainly tuned model, guided by R at decoding time."""
    return cell.guided(cell.candidate("sft").model)


def constrained(cell: Cell) -> Candidate:
    """Constrained fine-tuning without adaptive: one regulariser on the whole corpus."""
    (options,) = one_regulariser(cell.recipe).values()
    return cell.train(cell.variant(regularisers=[{**options, "domain": None}]))


def constrained_adaptive(cell: Cell) -> Candidate:
    """Constrained fine-tuning with a regulariser for each domain, as the recipe has it."""
    return cell.train(cell.variant())


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


UNSEEN: dict[str, tuple[str, ...]] = {"sft": ("constraints", "regularisers")}
"""By method, the sections of a recipe that it leaves out."""


def shapes(key: str, names: Collection[str]) -> bool:
    """Whether a key of the recipe, as "regularisers.forum.weight", has a part in what any of these methods makes.

    A method goes by its own options, `methods.NAME`, and by all other keys, but for those of its `UNSEEN`; the model
    and the seed are the cell's.
    """
    section, _, rest = key.partition(".")
    if section == "methods":
        return rest.partition(".")[0] in names
    if key.startswith(SHAPES_NOTHING) or section == "seed":
        return False
    return any(name != "base" and section not in UNSEEN.get(name, ()) for name in names)


def methods() -> list[str]:
    """The names of all methods: the built-in ones, then those of installed packages."""
    return [*BUILT_IN, *sorted(_plugged_in())]


def method_named(name: str) -> Method:
    """The method of a name; a UserError that names the nearest one if there is none, or says why it does not load."""
    known_name(name, methods(), "methods", "method")
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        method: Method = _plugged_in()[name].load()
    except Exception as error:
        raise UserError(f"methods: {name}: its package does not load: {error}") from error
    return method


def _plugged_in() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in BUILT_IN}


def description(method: Method) -> str:
    """What a method is, in a sentence."""
    return (method.__doc__ or "").strip().split("\n")[0]


def one_regulariser(recipe: Recipe) -> dict[str, Any]:
    """The recipe's only regulariser with a constraint, by name, as its mapping; the first one on everything if several.

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


def training_cost(folder: Path) -> dict[str, float]:
    """What a training run took, from the round records of its `metrics.jsonl`."""
    records = [record for _, record in read_rows(folder / "metrics.jsonl")]
    rounds = [record for record in records if "round" in record]
    return {
        "seconds": sum(_total(record, "seconds_") for record in rounds),
        "updates": max((record["step"] for record in records), default=0),
        "tokens_trained": sum(record["tokens_trained"] for record in rounds),
        "tokens_sampled": sum(_total(record, "tokens_sampled") for record in rounds),
    }


def _total(record: Mapping[str, Any], what: str) -> float:
    """The sum over regularisers of the entries "NAME/what...", and of "what..." itself."""
    return sum(value for key, value in record.items() if key.rpartition("/")[2].startswith(what))


def _reinforced(cell: Cell, *, seconds: float | None = None, resume_from: Path | None = None) -> Candidate:
    """TRL's reinforcement learning from the plainly tuned model, on the prompts of the regulariser's rollouts."""
    start, options = cell.candidate("sft").model, rl_options(cell.recipe)
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
        seconds=seconds,
        messages=[prompt.messages for prompt in prompts],
        resume=cell.resume,
        resume_from=resume_from,
    )
    if report["stopped_because"] == "steps":
        wanted = "the reward stopped rising" if seconds is None else "the time was up"
        raise RunStopped(f"methods.rl.max_steps: {report['steps']} updates were made before {wanted}; raise it")
    for part in (model, tokenizer):
        part.save_pretrained(cell.folder / "model")
    write_json(cell.folder / REPORT, report)
    told = {key: cell.recipe.resolved[key] for key in ("model", "corpus")} | asdict(options)
    told |= {"constraints": _used_constraints(recipe), "seed": cell.seed}
    told |= {"max_steps": report["steps"], "max_completion_length": max_new_tokens}
    cost = {"seconds": report["seconds"], "updates": report["steps"]}
    return Candidate(str(cell.folder / "model"), cost=cost, about=told)


def rl_options(recipe: Recipe) -> ReinforcementOptions:
    """The recipe's `methods.rl`."""
    options: ReinforcementOptions = build(ReinforcementOptions, recipe.methods.get("rl"), "methods.rl")
    return options


def _rollout_prompts(recipe: Recipe, folder: Path) -> tuple[list[Prompt], Constraint, int]:
    """What the recipe's regulariser would sample from in all its rounds, its constraint, and how long it samples."""
    trainer = build_trainer(recipe, folder, recipe.read_corpus())
    (regulariser,), args = trainer.regularisers, trainer.args
    prompts = [prompt for index in range(1, args.rounds + 1) for prompt in regulariser.prompts(index)]
    return prompts, regulariser.constraint, args.max_new_tokens


def _used_constraints(recipe: Recipe) -> dict[str, Any]:
    used = (regulariser.constraint for regulariser in recipe.regularisers.values())
    return {constraint.name: constraint.describe() for constraint in used if constraint is not None}


def _report(folder: Path) -> dict[str, Any]:
    return read_json(folder / REPORT, dict[str, Any])


def free_memory() -> None:
    """Lets go of a method's models before the next one's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
