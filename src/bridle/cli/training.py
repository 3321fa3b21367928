"""`bridle check`, `plan`, `train` and `watch`."""

from pathlib import Path
from typing import Annotated

import typer

from bridle.cli.common import RECIPE_KEYS, RecipeFile, check_resumed, read_recipe, say
from bridle.cli.keys import TrainingCommand

app = typer.Typer()

DOES_NOT_FIT = 1  # exit code of `bridle plan`


@app.command(
    context_settings=RECIPE_KEYS,
    epilog="Example: bridle check recipes/detox-mini.yaml --regularisers.toxigen.prompts.path prompts.txt",
)
def check(context: typer.Context, recipe: RecipeFile) -> None:
    """Try a recipe: its rows, prompts and labels, and what time and memory the run would take.

    This runs one short round of the recipe: 64 rollouts and three updates. Nothing is written, and no label is
    kept. Any key of the recipe can be set here, as in `bridle train`.
    """
    from bridle.comparison.plan import section_of
    from bridle.models.loading import load_tokenizer
    from bridle.recipes.dry_run import check as run

    loaded = read_recipe(recipe, context)
    if loaded.methods:
        from bridle.comparison.methods import check_options

        check_options(loaded)
    if loaded.evaluation:
        section_of(loaded).check_files(load_tokenizer(loaded.model))
    run(loaded, say)


@app.command(
    context_settings=RECIPE_KEYS,
    epilog="Example: bridle plan recipes/detox-llama-7b.yaml --gpus 8 --memory 80 --shard",
)
def plan(
    context: typer.Context,
    recipe: RecipeFile,
    gpus: Annotated[int, typer.Option(min=1, help="Processes that train the policy, a GPU each.")] = 1,
    memory: Annotated[float, typer.Option(min=0, help="GiB of each GPU.")] = 80.0,
    shard: Annotated[bool, typer.Option("--shard", help="FSDP2 shards the policy.")] = False,
    measured: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Also predict the time, from that of a run on the same machines."),
    ] = None,
) -> None:
    """Predict the memory that a recipe's run takes on each GPU; exit code 1 if it does not fit.

    Only the model's configuration is read. `bridle check` measures time and memory on the machine that it runs on. Any
    key of the recipe can be set here, as in `bridle train`.
    """
    from bridle.recipes.memory_plan import memory_plan
    from bridle.recipes.time_plan import time_plan

    asked = read_recipe(recipe, context)
    seconds = time_plan(asked, measured).lines() if measured else ()
    found = memory_plan(asked, gpus=gpus, memory=memory, shard=shard)
    for line in (*found.lines(gpus, memory), *seconds):
        say(line)
    if found.needed > memory:
        raise typer.Exit(DOES_NOT_FIT)


@app.command(
    cls=TrainingCommand,
    context_settings=RECIPE_KEYS,
    epilog="Example: bridle train recipes/detox-mini.yaml --regularisers.toxigen.weight 10 --max_steps 100",
)
def train(
    context: typer.Context,
    recipe: RecipeFile,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="Where the run goes. [default: runs/NAME OF RECIPE]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in the folder.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept_changes", help="Resume although the recipe or its files have changed.")
    ] = False,
) -> None:
    """Fine-tune a model as a recipe says.

    Any key of the recipe can be set here: --key value, or --group.name.key value.

    The folder then holds model/ and auxiliary/ (both loadable by from_pretrained), rollouts/, metrics.jsonl,
    recipe.yaml (as resolved) and environment.json (versions, git hash, seed).
    """
    from bridle.recipes.run import train as run
    from bridle.utils.distributed import is_main

    loaded = read_recipe(recipe, context)
    folder = output_dir or Path("runs") / recipe.stem
    check_resumed(folder, resume)
    if loaded.training.get("schedule") == "parallel":
        from bridle.recipes.ray_launcher import train_in_roles

        train_in_roles(loaded, folder, resume=resume, accept_changes=accept_changes)
    else:
        run(loaded, folder, resume=resume, accept_changes=accept_changes)
    if is_main():
        say(f"The model is in {folder / 'model'}, the metrics in {folder / 'metrics.jsonl'}.")


@app.command(epilog="Example: bridle watch runs/detox-mini")
def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of `bridle train` or `compare`, also while it runs.")
    ],
) -> None:
    """Show a run: its rounds, compliance with interval, λ, KL, R's skill, tokens a second, time left.

    It follows metrics.jsonl until the run ends, or until Ctrl-C, which leaves the run alone. If the output is not
    a terminal, it prints plain lines. For a comparison, it says how far each run is, and names the one to follow.
    """
    import signal

    from bridle.recipes.watch import watch as run
    from bridle.utils.interruption import Interrupted

    try:
        run(folder)
    except Interrupted as interrupted:
        if interrupted.signal != signal.SIGINT:
            raise
