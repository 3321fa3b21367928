"""Wall-clock of the schedules over plain fine-tuning, for the same corpus tokens: one thread a role, on one machine.

    python benchmarks/schedules.py --json FILE

The corpus, model and oracle of recipes/detox-mini.yaml. Plain fine-tuning is TRL's `SFTTrainer` on the same rows. What
a run pays once, starting the regulariser's process, is timed apart: a long run does not feel it.
"""

from typing import Any

from common import cell, interleaved, markdown, median, over, parsed, parser_of, spread, write
from subjects import LORA, PHASES, QUIET, RECIPE, constrained, sft

from bridle.recipes.recipe import load_recipe

SFT = "sft"
ADAPTIVE = "regularisers.toxigen."
WAYS: dict[str, dict[str, Any]] = {
    "sequential": {"schedule": "sequential", f"{ADAPTIVE}anchor": "live", f"{ADAPTIVE}kl_on": "corpus"},
    "parallel": {
        "schedule": "parallel",
        "targets": "precomputed",
        f"{ADAPTIVE}anchor": "previous",
        f"{ADAPTIVE}kl_on": "corpus",
    },
    "parallel_live": {"schedule": "parallel", f"{ADAPTIVE}anchor": "live", f"{ADAPTIVE}kl_on": "corpus"},
}


def measure(settings: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Every way, `repeats` times."""
    ways = {SFT: lambda: sft(load_recipe(RECIPE, settings))}
    for name, way in WAYS.items():
        ways[name] = lambda way=way: constrained(load_recipe(RECIPE, {**settings, **way}))
    raw = interleaved(ways, repeats)
    ratios = {f"{name}_over_sft": over(raw[name], raw[SFT], "total") for name in WAYS}
    medians = {key: spread(values)["median"] for key, values in ratios.items()}
    return {**medians, "ratios": ratios, "seconds": raw}


def table(results: dict[str, Any]) -> str:
    """Medians, as markdown."""
    rows = []
    for kind, measured in results.items():
        for name, runs in measured["seconds"].items():
            ratio = cell(spread(measured["ratios"].get(f"{name}_over_sft", [1.0])))
            rows.append([kind, name, ratio, *(f"{median(runs, phase):.1f}" for phase in ("total", *PHASES))])
    return markdown(["training", "schedule", "over SFT", "seconds", *PHASES], rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=60, help="policy steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=300, help="a round")
    parser.add_argument("--training", choices=("full", "lora", "both"), default="both")
    options = parsed(parser)
    settings = {"max_steps": options.steps, "rounds": options.rounds, "rollouts_per_round": options.rollouts}
    settings |= {**QUIET, "use_cpu": options.device == "cpu"}
    results = {}
    for kind in ("full", "lora") if options.training == "both" else (options.training,):
        results[kind] = measure({**settings, "lora": LORA} if kind == "lora" else settings, options.repeats)
    print("\n" + table(results))
    main_result = results.get("full") or results["lora"]
    medians = {key: main_result[key] for key in ("sequential_over_sft", "parallel_over_sft")}
    write(options, {**medians, **results})


if __name__ == "__main__":
    main()
