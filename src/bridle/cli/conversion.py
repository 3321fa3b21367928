"""`bridle export` and `convert`."""

from pathlib import Path
from typing import Annotated

import typer

from bridle.cli import common
from bridle.cli.common import refuse, say
from bridle.utils.quiet import quiet_libraries

app = typer.Typer()


@app.command(epilog="Example: bridle export runs/detox-mini models/detox --dtype bfloat16")
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, whose model/ is taken, or a model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder, which must not exist or be empty; or a file.")],
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold the run's R into the output layer, if its form is log-linear.")
    ] = False,
    guide: Annotated[str | None, typer.Option(metavar="AUXILIARY", help="Fold this R and not the run's.")] = None,
    guidance_scale: common.GuidanceScale = 1.0,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write the file OUT.gguf, of a Llama model.")] = False,
    dtype: common.Dtype = "float32",
) -> None:
    """Write a run's model for other programs, its adapters merged: a folder of save_pretrained, or a GGUF file.

    With --fold, what the model draws is what NADO decoding draws: guidance at the price of an ordinary model.
    """
    from bridle.models.export import export as write

    refuse(
        (guide is not None and not fold, "--guide names the R that --fold folds; add --fold, or leave it out"),
        (guidance_scale != 1 and not fold, "--guidance_scale is the strength of what --fold folds; leave it out"),
    )
    quiet_libraries()
    auxiliary = (guide or Path(run) / "auxiliary") if fold else None
    write(run, out, auxiliary=auxiliary, guidance_scale=guidance_scale, gguf=gguf, dtype=dtype)
    say(f"The model is in {out}.")


@app.command(epilog="Example: bridle convert SmolLM2-135M.Q4_1.gguf models/smollm2 --dtype bfloat16")
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A GGUF file, or hub/name:file.gguf.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model's folder, which must not exist or be empty.")],
    dtype: common.Dtype = "float32",
) -> None:
    """Write a GGUF file as a folder of save_pretrained: its weights dequantised, and its tokenizer.

    Every command takes a GGUF file itself as a model. A folder loads faster, and other programs take it, too.
    """
    from bridle.models.export import convert_gguf

    quiet_libraries()
    convert_gguf(file, out, dtype)
    say(f"The model is in {out}.")
