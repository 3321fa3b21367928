"""How a run's cost grows, with a picture: against corpus tokens, sequence length, vocabulary, domains and constraints.

    python benchmarks/growth.py --picture docs/images/growth.png --json FILE

Whole runs of one round, sampling included, and plain fine-tuning beside them, on a Llama with random weights. One size
varies at a time; the others stay small. Every domain has a regulariser of its own, and every constraint is one more
classifier that a text must please. The exponent is the slope of log seconds over log size: 1 is linear growth, and less
where part of the cost does not grow. "at the end" is that between the two largest sizes.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import Figures, cell, interleaved, markdown, over, parsed, parser_of, spread, write
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from subjects import LORA, QUIET, constrained, llama, random_recipe, sft

from bridle.recipes.recipe import load_recipe
from bridle.report.style import DPI, INK, STYLE, method_style

SFT, OURS = "sft", "constrained"
PARTS = ("all", "at_the_end")
BATCH = 8
NEW_TOKENS = 16
COLUMNS = 3  # of the picture
SHARE = 10  # trained tokens for a sampled one, in each domain


@dataclass(frozen=True)
class Size:
    """Of a run: rows of the corpus, and what its axes are called."""

    rows: int = 64
    length: int = 64
    vocabulary: int = 4096
    domains: int = 1
    constraints: int = 1


AXES: dict[str, Sequence[int]] = {
    "rows": (64, 128, 256, 512),
    "length": (64, 128, 256, 512, 1024),
    "vocabulary": (4096, 16384, 65536, 151936),
    "domains": (1, 2, 4, 8),
    "constraints": (1, 2, 4, 8),
}
LABELS = {
    "rows": "corpus tokens",
    "length": "sequence length",
    "vocabulary": "vocabulary",
    "domains": "domains",
    "constraints": "constraints",
}


def measure(size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both kinds of run at one size."""
    settings = {
        **QUIET,
        "use_cpu": options.device == "cpu",
        "gradient_checkpointing": False,
        "lora": LORA if options.training == "lora" else None,
        "per_device_train_batch_size": BATCH,
        "max_steps": -(-size.rows // BATCH),
        "rounds": 1,
        "max_new_tokens": NEW_TOKENS,
        "rollouts_per_round": max(32, size.rows * size.length // (SHARE * NEW_TOKENS)),
    }
    config = llama(options.hidden_size, options.layers, size.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        path = random_recipe(
            Path(folder),
            config,
            rows=size.rows,
            length=size.length,
            domains=size.domains,
            constraints=size.constraints,
        )
        ways = {way: lambda run=run: run(load_recipe(path, settings)) for way, run in ((SFT, sft), (OURS, constrained))}
        raw = interleaved(ways, options.repeats)
    seconds = {way: spread([run["total"] for run in runs]) for way, runs in raw.items()}
    return {"seconds": seconds, "over_sft": spread(over(raw[OURS], raw[SFT], "total")), "raw": raw}


def along(axis: str, options: argparse.Namespace) -> dict[str, Any]:
    """All sizes of one axis, and how fast both kinds of run grow along it."""
    smallest, sizes = Size(rows=options.rows, length=options.length), options.sizes or AXES[axis]
    runs = []
    for value in sizes:
        print(f"\n{axis} {value}")
        runs.append(measure(replace(smallest, **{axis: value}), options))
    factor = smallest.length if axis == "rows" else 1
    shown = [value * factor for value in sizes]
    exponents = {way: exponent(shown, [run["seconds"][way]["median"] for run in runs]) for way in (SFT, OURS)}
    return {"axis": LABELS[axis], "sizes": shown, "exponents": exponents, "runs": runs}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> Figures:
    """Slopes in logarithms: over all sizes, and between the two largest."""
    x, y = np.log(sizes), np.log(seconds)
    slopes = (np.polyfit(x, y, 1)[0], np.polyfit(x[-2:], y[-2:], 1)[0])
    return dict(zip(PARTS, map(float, slopes), strict=True))


@rc_context(STYLE)
def picture(axes: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds against each size, both in logarithms."""
    columns, rows = min(len(axes), COLUMNS), -(-len(axes) // COLUMNS)
    figure = Figure(figsize=(3.4 * columns, 3.8 * rows), layout="constrained")
    for place, found in enumerate(axes, start=1):
        _draw(figure.add_subplot(rows, columns, place), found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _draw(ax: Axes, found: dict[str, Any]) -> None:
    sizes = np.array(found["sizes"], dtype=float)
    for way in (SFT, OURS):
        seconds = [run["seconds"][way] for run in found["runs"]]
        median, low, high = (np.array([figures[key] for figures in seconds]) for key in ("median", "low", "high"))
        slopes = found["exponents"][way]
        label = f"{way}: {slopes['all']:.2f}, at the end {slopes['at_the_end']:.2f}"
        ax.errorbar(sizes, median, yerr=[median - low, high - median], label=label, **method_style(way).line)
    linear = median[-1] * sizes / sizes[-1]
    ax.plot(sizes, linear, color=INK, linestyle=":", linewidth=0.8, label="linear")
    ax.set(xscale="log", yscale="log", xlabel=found["axis"], ylabel="seconds of a run")
    ax.xaxis.set(major_locator=FixedLocator(found["sizes"]), minor_locator=NullLocator(), major_formatter="{x:,.0f}")
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    ax.legend(title="exponent", loc="lower center", bbox_to_anchor=(0.5, 1.0))


def table(axes: Sequence[dict[str, Any]]) -> str:
    rows = []
    for found in axes:
        for size, run in zip(found["sizes"], found["runs"], strict=True):
            seconds = [f"{run['seconds'][way]['median']:.2f}" for way in (SFT, OURS)]
            rows.append([found["axis"], size, *seconds, cell(run["over_sft"])])
    return markdown(["axis", "size", SFT, OURS, "over SFT"], rows)


def exponents_table(axes: Sequence[dict[str, Any]]) -> str:
    cells = [(way, part) for way in (SFT, OURS) for part in PARTS]
    rows = [[found["axis"], *(f"{found['exponents'][way][part]:.2f}" for way, part in cells)] for found in axes]
    return markdown(["exponent", *(f"{way}, {part.replace('_', ' ')}" for way, part in cells)], rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--picture", type=Path, help="write it here")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--sizes", nargs="+", type=int, help="of each of the axes, instead of their own")
    parser.add_argument("--rows", type=int, default=Size.rows, help="of the corpus, where another size varies")
    parser.add_argument("--length", type=int, default=Size.length, help="tokens of a row, where another size varies")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--training", choices=("full", "lora"), default="full")
    options = parsed(parser)
    axes = [along(axis, options) for axis in options.axes]
    print(f"\n{table(axes)}\n\n{exponents_table(axes)}")
    if options.picture:
        picture(axes, options.picture)
    write(options, {"axes": axes})


if __name__ == "__main__":
    main()
