"""Targets against fixed λ, at the same cost: is the target reached, by how much is it missed, and what is lost in text?

    python benchmarks/steering.py RECIPE DIR --rates 0.1 0.05 0.02 --weights 3 6 12 24 --seeds 3 --json FILE

Each setting is a comparison of `constrained-adaptive` alone in a folder of its own below DIR, and goes on where an
earlier call stopped. A target has a confidence: its bound is the one-sided Clopper–Pearson bound of the trained model's
fresh rollouts under the regulariser's constraint. With several regularisers λ is their mean and the bound the largest,
since each has to meet the target; retention keeps the recipe's λ. The rate and the perplexity are those of the recipe's
`evaluation`; `over_sweep` is the perplexity over that which the fixed λ have at the same rate, by log-linear
interpolation.
"""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from common import markdown, parsed, parser_of, write

from bridle.comparison.compare import Comparison
from bridle.recipes.recipe import load_recipe
from bridle.utils.files import read_json

METHOD = "constrained-adaptive"


def compared(options: Namespace, name: str, regulariser: dict[str, Any]) -> list[dict[str, Any]]:
    """What every seed that is not stopped reaches with some settings of every regulariser that has a constraint."""
    base = load_recipe(options.recipe)
    domains = [domain for domain, one in base.regularisers.items() if one.constraint is not None]
    changes = {f"regularisers.{domain}.{key}": value for domain in domains for key, value in regulariser.items()}
    changes |= {"rounds": options.rounds, "evaluation.tasks": [], "evaluation.judge": None}
    folder = options.folder / name
    recipe = load_recipe(options.recipe, changes)
    Comparison(recipe, folder, [METHOD], range(options.seeds), resume=folder.exists(), show=print).run()
    made = [folder / METHOD / f"seed-{seed}" for seed in range(options.seeds)]
    return [reached(one, domains, options.held_out) for one in made if (one / "results.json").exists()]


def reached(folder: Path, domains: Sequence[str], held_out: str) -> dict[str, Any]:
    """The figures of one trained model."""
    results = read_json(folder / "results.json", dict[str, Any])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    log = {key: value for row in rows for key, value in row.items()}  # the last values
    rates = next(iter(results["generation"].values()))
    return {
        "weight": fmean(log[f"{domain}/lambda"] for domain in domains),
        "bound": _largest(log, domains, "violation_bound"),
        "reached": _largest(log, domains, "violation_reached"),
        "rates": {name: found["violation_rate"]["value"] for name, found in rates.items()},
        "perplexity": results["perplexity"][held_out]["per_token"]["value"],
    }


def _largest(log: Mapping[str, Any], domains: Sequence[str], key: str) -> float | None:
    """The largest of all domains; None if one of them was not measured."""
    found = [log.get(f"{domain}/{key}") for domain in domains]
    return None if None in found else max(found)


def of_sweep(sweep: Sequence[dict[str, Any]], constraint: str, rate: float) -> float | None:
    """The perplexity that fixed λ have at a rate; None outside what they reach."""
    if not sweep:
        return None
    points = sorted((one["rates"][constraint], np.log(one["perplexity"])) for one in sweep)
    rates, logs = zip(*points, strict=True)
    return float(np.exp(np.interp(rate, rates, logs))) if rates[0] <= rate <= rates[-1] else None


def summary(runs: Sequence[dict[str, Any]], constraint: str) -> dict[str, Any]:
    """The means over the seeds."""
    return {
        "weight": fmean(run["weight"] for run in runs),
        "rates": {name: fmean(run["rates"][name] for run in runs) for name in runs[0]["rates"]},
        "perplexity": fmean(run["perplexity"] for run in runs),
    }


def figures(found: dict[str, Any]) -> list[str]:
    """Rates and perplexity, for the table."""
    return [*(f"{value:.1%}" for value in found["rates"].values()), f"{found['perplexity']:.2f}"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path, help="of the comparisons")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.1, 0.05, 0.02])
    parser.add_argument("--weights", type=float, nargs="*", default=[3, 6, 12, 24], help="λ")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--step", type=float, default=1.0, help="η of the targets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6, help="of every run")
    parser.add_argument("--held_out", help="whose perplexity; the recipe's first by default")
    parser.add_argument("--constraint", help="whose rate meets the sweep; the first by default")
    options = parsed(parser)
    plan = load_recipe(options.recipe).evaluation
    options.held_out = options.held_out or next(iter(plan["perplexity"]))
    fixed = {weight: compared(options, f"weight-{weight:g}", {"weight": weight}) for weight in options.weights}
    steered = {}
    for rate in options.rates:
        target = {"rate": rate, "confidence": options.confidence, "step": options.step}
        steered[rate] = compared(options, f"rate-{rate:g}", {"target": target})
    constraint = options.constraint or next(iter(next(iter([*fixed.values(), *steered.values()]))[0]["rates"]))
    sweep = [summary(runs, constraint) for runs in fixed.values()]
    rows, results = [], {"constraint": constraint, "held_out": options.held_out, "fixed": {}, "targets": {}}
    for weight, runs in fixed.items():
        found = summary(runs, constraint)
        results["fixed"][f"{weight:g}"] = {"seeds": runs, **found}
        stopped = f"{options.seeds - len(runs)} of {options.seeds} stopped" * (len(runs) < options.seeds)
        rows.append([f"λ {weight:g}", f"{weight:g}", stopped, *figures(found), ""])
    for rate, runs in steered.items():
        found = summary(runs, constraint)
        best = of_sweep(sweep, constraint, found["rates"][constraint])
        found["met"] = sum(run["bound"] is not None and run["bound"] <= rate for run in runs)
        found["over_sweep"] = None if best is None else found["perplexity"] / best
        results["targets"][f"{rate:g}"] = {"seeds": runs, **found}
        bounds = f"{found['met']} of {options.seeds}: " + ", ".join(
            "none" if run["bound"] is None else f"{run['bound']:.1%}" for run in runs
        )
        over = "outside" if best is None else f"{found['over_sweep']:.3f}"
        rows.append([f"at most {rate:.0%}", f"{found['weight']:.1f}", bounds, *figures(found), over])
    names = list(sweep[0]["rates"]) if sweep else []
    print("\n" + markdown(["", "λ at the end", "bounds met", *names, options.held_out, "over the sweep"], rows))
    write(options, results)


if __name__ == "__main__":
    main()
