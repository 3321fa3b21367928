"""Control, utility and forgetting on real text: plain tuning, constrained tuning and NADO decoding, one table.

    python benchmarks/detox_mini.py --rows 80%:90%            # while choosing settings
    python benchmarks/detox_mini.py --rows 90%: --json FILE   # the final figures

Runs `bridle train` on recipes/detox-mini.yaml for each method that trains, and `bridle evaluate` for all, on
rows of ToxiGen and WikiText that were not trained on, and on novels, which are not in the mixture. Trained
models are kept in --work and used again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bridle.environment import environment, write_json

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "detox-mini.yaml"
RETENTION = "{constraint: retention, weight: 2}"

TRAINED = {  # method: overrides of the recipe
    "plain SFT": ["--regularisers", "{}"],
    "constrained, not adaptive": ["--regularisers", "{all: {constraint: non-toxic, weight: 10, on: both}}"],
    "constrained": [],
    "constrained, retention": ["--regularisers.wikitext", RETENTION],
}


def bridle(*arguments: str) -> float:
    """Runs a command and returns its seconds."""
    started = time.perf_counter()
    code = "from bridle.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def train(method: str, work: Path, seed: int) -> Path:
    folder = work / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}"
    if not (folder / "model").is_dir():
        seconds = bridle("train", str(RECIPE), "--output_dir", str(folder), "--seed", str(seed), *TRAINED[method])
        (folder / "seconds").write_text(f"{seconds:.0f}")
    return folder


def evaluate(model: Path, guide: Path | None, rows: str, shared: Path, result: Path) -> dict:
    toxigen, wikitext, novels = (shared / "data" / f"{name}.jsonl" for name in ("toxigen", "wikitext", "novels"))
    held_out = [f"{wikitext},rows={rows}", f"{toxigen},rows={rows},label=0", f"{toxigen},rows={rows},label=1"]
    held_out.append(f"{novels},rows=0:2%")
    bridle(
        *("evaluate", str(model), "--constraint", f"{RECIPE}:non-toxic", "--json", str(result)),
        *("--prompts", f"{toxigen},rows={rows}", "--prompt_tokens", "8", "--samples", "4"),
        *(part for name in held_out for part in ("--perplexity", name)),
        *(("--guide", str(guide)) if guide else ()),
    )
    measured = json.loads(result.read_text())
    perplexities = dict(
        zip(
            ("wikitext", "neutral", "hateful", "novels"),
            (measured["perplexity"][name]["per_token"]["value"] for name in held_out),
            strict=True,
        )
    )
    (prompts,) = measured["generation"]
    return {**measured["generation"][prompts]["non-toxic"], **measured["text"][prompts], "perplexity": perplexities}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="80%:90%", help="held-out rows: 80%%:90%% to choose, 90%%: to report")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark", help="where models are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--methods", nargs="+", choices=TRAINED, default=list(TRAINED), help="those to train")
    options = parser.parse_args()
    shared = Path(os.environ.get("BRIDLE_SHARED", ROOT.parent / "shared")).resolve()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    folders = {method: train(method, work, options.seed) for method in options.methods}
    base = shared / "models" / "mini-en"
    models: dict[str, tuple[Path, Path | None]] = {"base": (base, None)}
    if "constrained" in folders:  # its first R was fitted on the base
        models["base + NADO decoding"] = (base, folders["constrained"] / "auxiliary" / "round-1")
    models |= {method: (folder / "model", None) for method, folder in folders.items()}
    results = {}
    print("| | violation [95%] | distinct-2 | ppl wikitext | neutral | hateful | novels | train seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for method, (model, auxiliary) in models.items():
        found = evaluate(model, auxiliary, options.rows, shared, work / "result.json")
        timed = folders.get(method, work) / "seconds"
        seconds = timed.read_text() if timed.is_file() else ""
        results[method] = {**found, "train_seconds": seconds}
        rate = found["violation_rate"]
        cells = [
            f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]",
            f"{found['distinct_2']['value']:.2f}",
            *(f"{value:.1f}" for value in found["perplexity"].values()),
            seconds,
        ]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    if options.json:
        settings = {"rows": options.rows, "seed": options.seed}
        write_json(options.json, {**settings, "results": results, "environment": environment(options.seed)})


if __name__ == "__main__":
    main()
