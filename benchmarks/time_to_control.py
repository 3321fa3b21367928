"""Wall-clock to half of the base's violation rate: constrained tuning against TRL's RLOO and GRPO.

    python benchmarks/time_to_control.py --json FILE [--KEY VALUE ...]

KEY is any key of the recipe, set for constrained tuning alone. All begin with the recipe's model and train on its first
constraint; reinforcement learning gets the prompts that constrained tuning samples from by the recipe, and the recipe's
`methods.rl`. Every few updates the rates of all constraints that the recipe evaluates by are measured on its first set
of held-out prompts, always with the same random numbers, and that time is not counted. `--constraint` names the one
that has to reach the goal, by default the first, which is independent where there is one. The goal is reached at the
first of two measurements in a row that are there; a run that does not reach it counts with the time it was given, and
its ratio is a bound. A repeat is a seed of its own. Constrained tuning learns the corpus meanwhile; reinforcement
learning never reads it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

from common import (
    Figures,
    cell,
    free_memory,
    interleaved,
    markdown,
    median,
    parsed,
    parser_of,
    spread,
    synchronize,
    write,
)
from subjects import QUIET, RECIPE
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from bridle.baselines.reinforcement import reinforce
from bridle.comparison.methods import options_of
from bridle.comparison.plan import evaluation_of
from bridle.constraints import Score
from bridle.data import read_prompts
from bridle.evaluation.generation import generate_completions
from bridle.models.loading import load_model, load_tokenizer
from bridle.recipes.recipe import Recipe, load_recipe
from bridle.recipes.run import build_trainer

CONSTRAINED = "constrained"
RIVALS = ("rloo", "grpo")
KEYS = ("seconds", "updates")
Rates = Callable[[PreTrainedModel], Figures]  # of violations, by constraint


class ControlClock(TrainerCallback):
    """Measures violation rates every few updates, and ends a run in which the one of `constraint` is at the goal."""

    def __init__(self, rates: Rates, constraint: str, goal: float, every: int, limit: float):
        self.rates, self.constraint, self.goal, self.every, self.limit = rates, constraint, goal, every, limit
        self.curve: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            synchronize(model.device)
            seconds = time.perf_counter() - self._began
            self.curve.append({"seconds": seconds, "updates": state.global_step, "violation": self.rates(model)})
            self._began = time.perf_counter() - seconds
            control.should_training_stop |= self.reached is not None or seconds > self.limit

    @property
    def reached(self) -> dict[str, Any] | None:
        """The measurement at which the goal was reached."""
        there = (first for first, second in pairwise(self.curve) if self._is_there(first) and self._is_there(second))
        return next(there, None)

    def _is_there(self, measured: dict[str, Any]) -> bool:
        return bool(measured["violation"][self.constraint] <= self.goal)


def rates_of(recipe: Recipe, options: argparse.Namespace) -> Rates:
    """Measures a model's violation rates on held-out prompts."""
    plan, tokenizer = evaluation_of(recipe), load_tokenizer(recipe.model)
    prompt_set = next(iter(plan.prompts.values()))
    how = prompt_set.generation
    held_out = read_prompts(prompt_set.source, tokenizer, prefix_tokens=how.prompt_tokens)
    prompts = [prompt.ids for prompt in held_out[: options.prompts]]

    def rates(model: PreTrainedModel) -> Figures:
        texts = generate_completions(
            model,
            tokenizer,
            prompts,
            samples=options.samples,
            max_new_tokens=how.max_new_tokens,
            batch_size=plan.batch_size,
            seed=0,
            decoding=how,
        )
        flat = [*chain.from_iterable(texts)]
        return {name: violation_rate(constraint.score(None, flat)) for name, constraint in plan.constraints.items()}

    return rates


def violation_rate(scores: Sequence[Score]) -> float:
    """The share of the texts with a verdict that violate."""
    return 1 - statistics.mean(score.complies for score in scores if score.complies is not None)


def constrained(recipe: Recipe, clock: ControlClock, folder: Path) -> None:
    trainer = build_trainer(recipe, folder, recipe.read_corpus())
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()


def reinforced(algorithm: str, recipe: Recipe, clock: ControlClock, folder: Path, updates: int) -> None:
    trainer = build_trainer(recipe, folder, recipe.read_corpus())  # for its prompts alone
    held = next(found for found in trainer.regularisers if not found.options.is_retention)
    reinforce(
        load_model(recipe.model, dtype=recipe.dtype, lora=recipe.lora),
        held.tokenizer,
        [prompt.ids for index in range(1, trainer.args.rounds + 1) for prompt in held.prompts(index)],
        held.constraint,
        replace(options_of("rl", recipe), algorithm=algorithm, max_steps=updates, save_every=updates),
        output_dir=folder,
        seed=trainer.args.seed,
        max_new_tokens=trainer.args.max_new_tokens,
        use_cpu=trainer.args.use_cpu,
        seconds=float("inf"),  # the clock ends it
        callbacks=[clock],
    )


def run(method: str, options: argparse.Namespace, goal: float, seed: int) -> dict[str, Any]:
    """One method with one seed: when it reached the goal, if it did, and how it came there."""
    free_memory()
    given = options.overrides if method == CONSTRAINED else {}
    recipe = load_recipe(options.recipe, {**QUIET, "use_cpu": options.device == "cpu", **given, "seed": seed})
    rates = rates_of(load_recipe(options.recipe), options)
    clock = ControlClock(rates, options.constraint, goal, options.every, options.limit)
    with tempfile.TemporaryDirectory() as folder:
        if method == CONSTRAINED:
            constrained(recipe, clock, Path(folder))
        else:
            reinforced(method, recipe, clock, Path(folder), options.updates)
    return {"seed": seed, "reached": clock.reached, "curve": clock.curve}


def base_rates(options: argparse.Namespace) -> Figures:
    recipe = load_recipe(options.recipe)
    model = load_model(recipe.model, dtype=recipe.dtype, device=options.device)
    return rates_of(recipe, options)(model)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    base = base_rates(options)
    goal = options.share * base[options.constraint]
    seeds = {method: count() for method in (CONSTRAINED, *options.rivals)}
    ways = {method: lambda method=method: run(method, options, goal, next(seeds[method])) for method in seeds}
    raw = interleaved(ways, options.repeats)
    ratios = {f"{rival}_over_constrained": _ratios(raw[rival], raw[CONSTRAINED]) for rival in options.rivals}
    return {
        **{key: found and found["median"] for key, found in ratios.items()},
        "violation_of_base": base,
        "goal": goal,
        "over_constrained": ratios,
        "raw": raw,
    }


def _ratios(rival: list[dict[str, Any]], ours: list[dict[str, Any]]) -> Figures | None:
    """Seconds over ours, of the seeds with which one of both reached the goal; and how many of these are bounds."""
    pairs = [pair for pair in zip(rival, ours, strict=True) if any(one["reached"] for one in pair)]
    if not pairs:
        return None
    at_least, at_most = (sum(pair[place]["reached"] is None for pair in pairs) for place in (0, 1))
    return spread([_seconds(one) / _seconds(other) for one, other in pairs]) | {
        "at_least": at_least,
        "at_most": at_most,
    }


def _seconds(run: dict[str, Any]) -> float:
    return float((run["reached"] or run["curve"][-1])["seconds"])


def _ratio_cell(ratio: Figures) -> str:
    bounds = (f"{ratio[kind]:g} {kind.replace('_', ' ')}" for kind in ("at_least", "at_most") if ratio[kind])
    return "; ".join([cell(ratio), *bounds])


def table(results: dict[str, Any]) -> str:
    rows = []
    for method, runs in results["raw"].items():
        reached = [run["reached"] for run in runs if run["reached"]]
        medians = [f"{median(reached, key):.1f}" if reached else "" for key in KEYS]
        ratio = results["over_constrained"].get(f"{method}_over_constrained")
        rows.append([method, f"{len(reached)} of {len(runs)}", *medians, _ratio_cell(ratio) if ratio else ""])
    return markdown(["method", "reached", *KEYS, "seconds over constrained"], rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="with a section `evaluation`")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--constraint", help="of the recipe's evaluation, whose rate has to reach the goal")
    parser.add_argument("--share", type=float, default=0.5, help="of the base's violation rate that is the goal")
    parser.add_argument("--every", type=int, default=5, help="updates between two measurements")
    parser.add_argument("--prompts", type=int, default=300, help="held-out ones, at most")
    parser.add_argument("--samples", type=int, default=4, help="a prompt")
    parser.add_argument("--updates", type=int, default=500, help="of reinforcement learning, at most")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of a run, at most")
    options = parsed(parser, recipe_keys=True)
    if "seed" in options.overrides:
        parser.error("--seed: a repeat is a seed of its own; set --repeats")
    known = evaluation_of(load_recipe(options.recipe)).constraints
    options.constraint = options.constraint or next(iter(known))
    if options.constraint not in known:
        parser.error(f"--constraint {options.constraint}: the recipe evaluates by {', '.join(known)}")
    results = measure(options)
    base = results["violation_of_base"][options.constraint]
    print(f"\n{options.constraint}: base {base:.3f}, goal {results['goal']:.3f}\n\n{table(results)}")
    write(options, results)


if __name__ == "__main__":
    main()
