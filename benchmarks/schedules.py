"""Wall-clock of the schedules over plain fine-tuning, for the same corpus tokens: one thread a role, on one machine.

    python benchmarks/schedules.py --json FILE

The corpus, model and oracle of recipes/detox-mini.yaml; every way to train runs once in every repeat, one after the
other, so that a noisy machine troubles all alike. Plain fine-tuning is TRL's `SFTTrainer` on the same rows. What a
run pays once, starting the regulariser's process, is timed apart: a long run does not feel it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from bridle.data import mix, tokenize_domain
from bridle.environment import environment, write_json
from bridle.models.loading import load_model, load_tokenizer
from bridle.training.build import build_trainer
from bridle.training.ray_worker import RayWorker
from bridle.training.recipe import Recipe, load_recipe
from bridle.training.reporting import MetricsFile

RECIPE = Path(__file__).parents[1] / "recipes" / "detox-mini.yaml"
SFT = "sft"
LORA = {"r": 16, "alpha": 32}
ADAPTIVE = "regularisers.toxigen."
WAYS: dict[str, dict[str, Any]] = {
    "sequential": {"schedule": "sequential", f"{ADAPTIVE}anchor": "live", f"{ADAPTIVE}on": "corpus"},
    "parallel": {
        "schedule": "parallel",
        "targets": "shipped",
        f"{ADAPTIVE}anchor": "previous",
        f"{ADAPTIVE}on": "corpus",
    },
    "parallel_live": {"schedule": "parallel", f"{ADAPTIVE}anchor": "live", f"{ADAPTIVE}on": "corpus"},
}
PHASES = ("sampling", "scoring", "fitting", "targets", "policy", "waiting")

Seconds = dict[str, float]


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain(recipe: Recipe, folder: Path) -> Seconds:
    """TRL's own trainer, on the rows that Bridle's would see."""
    tokenizer = load_tokenizer(recipe.model)
    args = recipe.config(folder)
    rows = {
        name: tokenize_domain(domain.read(), tokenizer, max_length=args.max_length)
        for name, domain in recipe.corpus.items()
    }
    trainer = SFTTrainer(
        model=load_model(recipe.model, lora=recipe.lora),
        args=args,
        train_dataset=mix(rows, dict.fromkeys(rows, 1.0), args.seed),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer.pad_token_id),
    )
    return {"total": timed(trainer.train)}


def constrained(recipe: Recipe, folder: Path) -> Seconds:
    """A schedule's whole run, and the phases it reports; those of the worker overlap with the policy's steps."""
    trainer = build_trainer(recipe, folder, recipe.read_corpus())
    trainer.add_callback(MetricsFile(folder / "metrics.jsonl"))
    start = 0.0
    if trainer.args.schedule == "parallel":
        began = time.perf_counter()
        trainer.schedule.worker = RayWorker(trainer.regularisers, trainer.args.parallel, folder)
        start = time.perf_counter() - began
    seconds = {"total": timed(trainer.train), "start": start} | dict.fromkeys(PHASES, 0.0)
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        for key, value in json.loads(line).items():
            phase = key.rpartition("seconds_")[2]
            if "seconds_" in key and phase in PHASES:
                seconds[phase] += value
    return seconds


def measure(recipe_of: Callable[[dict[str, Any]], Recipe], repeats: int) -> dict[str, Any]:
    """Every way, `repeats` times, in turn."""
    raw: dict[str, list[Seconds]] = {name: [] for name in (SFT, *WAYS)}
    for repeat in range(repeats):
        for name in raw:
            with tempfile.TemporaryDirectory() as folder:
                run = plain if name == SFT else constrained
                raw[name].append(run(recipe_of(WAYS.get(name, {})), Path(folder)))
            print(f"{repeat + 1}/{repeats} {name}: {raw[name][-1]['total']:.1f} s", flush=True)
    ratios = {
        f"{name}_over_sft": [run["total"] / base["total"] for run, base in zip(raw[name], raw[SFT], strict=True)]
        for name in WAYS
    }
    return {key: statistics.median(values) for key, values in ratios.items()} | {"ratios": ratios, "seconds": raw}


def table(results: dict[str, Any]) -> str:
    """Medians, as markdown."""
    lines = [f"| training | schedule | over SFT | spread | seconds | {' | '.join(PHASES)} |"]
    lines.append("|---" * (5 + len(PHASES)) + "|")
    for kind, measured in results.items():
        for name, runs in measured["seconds"].items():
            ratios = measured["ratios"].get(f"{name}_over_sft", [1.0])
            median = {key: statistics.median(run.get(key, 0.0) for run in runs) for key in ("total", *PHASES)}
            cells = " | ".join(f"{median[phase]:.1f}" for phase in PHASES)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            middle = statistics.median(ratios)
            lines.append(f"| {kind} | {name} | {middle:.2f} | {spread} | {median['total']:.1f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--steps", type=int, default=60, help="policy steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=300, help="a round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--training", choices=("full", "lora", "both"), default="both")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the regulariser's process takes as many
    settings = {"max_steps": options.steps, "rounds": options.rounds, "rollouts_per_round": options.rollouts}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
    results = {}
    for kind in ("full", "lora") if options.training == "both" else (options.training,):
        lora = {"lora": LORA} if kind == "lora" else {}
        results[kind] = measure(
            lambda way, lora=lora: load_recipe(RECIPE, {**settings, **quiet, **lora, **way}), options.repeats
        )
    print("\n" + table(results))
    if options.json:
        main_result = results.get("full") or results["lora"]
        medians = {key: main_result[key] for key in ("sequential_over_sft", "parallel_over_sft")}
        write_json(options.json, {**medians, "settings": settings, **results, "environment": environment(0)})


if __name__ == "__main__":
    main()
