"""`bridle compare`, `quickstart` and `report`."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bridle.cli.common import RECIPE_KEYS, check_resumed, read_recipe, say
from bridle.cli.keys import ComparisonCommand
from bridle.utils.quiet import quiet_libraries

app = typer.Typer()


@app.command(
    cls=ComparisonCommand,
    context_settings=RECIPE_KEYS,
    epilog="Example: bridle compare recipes/detox-mini.yaml --methods base,sft,constrained-adaptive --seeds 3",
)
def compare(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML file, with a section `evaluation` that says what is measured.")],
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="By comma: base, sft, filtration, rl, rl-converged, nado-decoding, nado-decoding-sft, constrained, "
            "constrained-adaptive, or one of an installed package; sft-kl, l2-sp, lora-small, wise-ft, interleave, dpo "
            "only if named here or in the recipe's methods. [default: all others]",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the recipe's own on.")] = 1,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="Where everything goes. [default: runs/compare-NAME OF RECIPE]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Make only what is missing, failed or set otherwise.")
    ] = False,
) -> None:
    """Train and measure several methods on a recipe's corpus and constraint, and show the trade-off.

    Any key of the recipe can be set here, as in `bridle train`. The folder then holds results.json, a report to
    open in a browser, and for each method and seed its model, figures and completions. Where a method failed, the exit
    code is 3.
    """
    from bridle.comparison.compare import Comparison
    from bridle.report.html import write_report
    from bridle.report.reading import read_report
    from bridle.report.terminal import tables

    loaded = read_recipe(recipe, context)
    folder = output_dir or Path("runs") / f"compare-{recipe.stem}"
    check_resumed(folder, resume)
    first = loaded.training.get("seed", 0)
    comparison = Comparison(
        loaded,
        folder,
        names=_names(methods),
        seeds=range(first, first + seeds),
        title=recipe.stem,
        resume=resume,
        show=partial(say, err=True),
    )
    comparison.run()
    say(tables(read_report(folder)))
    say(f"Every figure is in {folder / 'results.json'}; look at {write_report(folder)} in a browser.")
    say(f"Try the methods side by side: {shlex.join(['bridle', 'demo', str(folder)])}")
    comparison.check_complete()


@app.command(
    context_settings=RECIPE_KEYS,
    epilog="Example: bridle quickstart --corpus comments.jsonl --constraint words:insults.txt",
)
def quickstart(
    context: typer.Context,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows of your own instead of the embedded forum; needs --constraint."),
    ] = None,
    constraint: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="What a text must not be: words:FILE | regex:PATTERN | python:module:function | "
            "classifier:MODEL,label=toxic",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A folder, GGUF file or hub name instead of the embedded one.")
    ] = None,
    real: Annotated[
        bool,
        typer.Option(
            "--real",
            help="Take a real pretrained model, SmolLM2-135M-Instruct or --model, with settings for its size; 40 "
            "minutes of one core. It is fetched once, unless BRIDLE_SMOLLM2 is its folder.",
        ),
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="By comma, as in `bridle compare`. [default: those of the paper's table]"),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir",
            help="Where everything goes. [default: runs/quickstart, or -real with --real, or -own with your own]",
        ),
    ] = None,
) -> None:
    """Compare methods on a small embedded world whose truth is known, or on a corpus of your own.

    Nothing is downloaded, except with --real: the world's texts, a model of a million parameters that has read them and
    a classifier are made at first use and kept in the user's cache (BRIDLE_CACHE). Any key of the recipe can be set, as
    in `bridle compare`. A tour that was cut short resumes where it was.
    """
    from bridle.comparison.methods import method_named
    from bridle.quickstart.tour import take_tour, tour_recipe
    from bridle.recipes.recipe import parse_overrides

    quiet_libraries()
    names = _names(methods)
    for name in names:
        method_named(name)  # before anything is made
    progress = partial(say, err=True)
    recipe = tour_recipe(corpus, constraint, model, parse_overrides(context.args), real=real, progress=progress)
    own = bool(corpus or constraint or (model and not real))
    folder = output_dir or Path("runs") / ("quickstart" + "-real" * real + "-own" * own)
    take_tour(recipe, folder, show=say, progress=progress, real=real, names=names)


def _names(methods: str | None) -> list[str]:
    return [name.strip() for name in methods.split(",")] if methods else []


@app.command(epilog="Example: bridle report runs/compare-detox-mini")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `bridle compare` or `bridle train` wrote.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The page. [default: DIR/report.html]")] = None,
    tables: Annotated[
        Path | None,
        typer.Option("--tables", metavar="FOLDER", help="Write every table here as LaTeX, Markdown and CSV."),
    ] = None,
) -> None:
    """Write one HTML page with tables, plots and texts, and every plot as PNG, SVG and PDF.

    The page needs no network and opens from the file system.
    """
    from bridle.report.html import write_report

    say(f"The report is {write_report(folder, output, tables)}.")
    if tables is not None:
        say(f"The tables are in {tables}.")
