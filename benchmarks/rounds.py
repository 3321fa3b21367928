"""A whole run's cost over plain fine-tuning, and where its seconds go, at one sampled token for ten trained ones.

    python benchmarks/rounds.py --json FILE
    python benchmarks/rounds.py --shape llama-7b --training lora --length 1024 --batch 8 --steps 20

The sequential schedule, with each anchor in turn; plain fine-tuning is TRL's `SFTTrainer` on the same rows. A first
run, which is not counted, shows how long rollouts are, and so how many make up the share. `encoding` is the policy's
forward over the rollouts, before R is fitted on them.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import Figures, cell, interleaved, markdown, median, over, parsed, parser_of, spread, write
from subjects import (
    ANCHORS,
    LORA,
    QUIET,
    RECIPE,
    add_sizes,
    constrained,
    dtype_of,
    every_regulariser,
    random_config,
    random_recipe,
    sft,
)

from bridle.recipes.recipe import Recipe, load_recipe
from bridle.training import regulariser

SFT = "sft"
PHASES = ("sampling", "scoring", "encoding", "fitting", "targets", "policy")


@contextmanager
def clocked(module: Any, name: str) -> Iterator[list[float]]:
    """Inside the block the seconds of every call of a module's function are added to a list."""
    seconds, work = [], getattr(module, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = work(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return result

    with patch.object(module, name, timed):
        yield seconds


def run(recipe: Recipe) -> Figures:
    """A constrained run, with encoding told apart from fitting."""
    with clocked(regulariser, "encode") as seconds:
        found = constrained(recipe)
    return found | {"encoding": sum(seconds), "fitting": found["fitting"] - sum(seconds)}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        **QUIET,
        "use_cpu": options.device == "cpu",
        "gradient_checkpointing": options.checkpointing,
        "schedule": "sequential",
        "max_steps": options.steps,
        "rounds": options.rounds,
        "per_device_train_batch_size": options.batch,
        "max_length": options.length,
        "max_new_tokens": options.new_tokens,
        "lora": LORA if options.training == "lora" else None,
        "auxiliary.corpus_outputs": 0,  # too many for so few updates
    }


def constrained_recipe(path: Path, options: argparse.Namespace, anchor: str, rollouts: int) -> Recipe:
    kind, targets = ANCHORS[anchor]
    held = every_regulariser(path, anchor=kind, kl_on=options.on)
    return load_recipe(path, {**settings_of(options), **held, "targets": targets, "rollouts_per_round": rollouts})


def rollouts_for(path: Path, options: argparse.Namespace, first: int = 16) -> int:
    """How many rollouts a round make one sampled token for `--share` trained ones, by a run with a few."""
    found = run(constrained_recipe(path, options, "live", first))
    return max(2, round(first * found["tokens_trained"] / (options.share * found["tokens_sampled"])))


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    rollouts = rollouts_for(path, options)
    ways = {SFT: lambda: sft(load_recipe(path, settings_of(options)))}
    for anchor in options.anchors:
        ways[anchor] = lambda anchor=anchor: run(constrained_recipe(path, options, anchor, rollouts))
    raw = interleaved(ways, options.repeats)
    ratios = {anchor: spread(over(raw[anchor], raw[SFT], "total")) for anchor in options.anchors}
    shares = {
        anchor: median(raw[anchor], "tokens_trained") / median(raw[anchor], "tokens_sampled")
        for anchor in options.anchors
    }
    return {
        **{f"{anchor}_over_sft": found["median"] for anchor, found in ratios.items()},
        "rollouts_per_round": rollouts,
        "trained_per_sampled_token": shares,
        "over_sft": ratios,
        "raw": raw,
    }


def table(results: dict[str, Any]) -> str:
    rows = []
    for way, runs in results["raw"].items():
        ratio = results["over_sft"].get(way)
        share = results["trained_per_sampled_token"].get(way)
        seconds = [f"{median(runs, key):.1f}" for key in ("total", *PHASES)]
        rows.append([way, cell(ratio) if ratio else "1", f"{share:.1f}" if share else "", *seconds])
    return markdown(["run", "over SFT", "trained per sampled token", "seconds", *PHASES], rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="where no size is given")
    add_sizes(parser)
    parser.add_argument("--anchors", nargs="+", choices=ANCHORS, default=list(ANCHORS))
    parser.add_argument("--training", choices=("full", "lora"), default="full")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations anew in the backward")
    parser.add_argument("--on", choices=("corpus", "rollouts", "both"), default="rollouts")
    parser.add_argument("--share", type=float, default=10, help="trained tokens for one sampled token")
    parser.add_argument("--steps", type=int, default=60, help="policy steps of a run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=64, help="tokens at which a row is cut")
    parser.add_argument("--new_tokens", type=int, default=32)
    options = parsed(parser)
    config = random_config(options)
    with tempfile.TemporaryDirectory() as folder:
        path = options.recipe
        if config is not None:
            rows = options.steps * options.batch
            path = random_recipe(Path(folder), config, dtype_of(options), rows=rows, length=options.length)
        results = measure(path, options)
    print("\n" + table(results))
    write(options, results)


if __name__ == "__main__":
    main()
