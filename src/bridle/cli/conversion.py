"""`bridle convert`."""

from pathlib import Path
from typing import Annotated

import typer

from bridle.cli import common
from bridle.cli.common import quiet_libraries, say

app = typer.Typer()


@app.command(epilog="Example: bridle convert SmolLM2-135M.Q4_1.gguf models/smollm2 --dtype bfloat16")
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A GGUF file, or hub/name:file.gguf.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model's folder, which must not exist or be empty.")],
    dtype: common.Dtype = "float32",
) -> None:
    """Write a GGUF file as a folder of save_pretrained: its weights dequantised, and its tokenizer.

    Every command takes a GGUF file itself as a model. A folder loads faster, and other programs take it, too.
    """
    from bridle.models.loading import convert_gguf

    quiet_libraries()
    convert_gguf(file, out, dtype)
    say(f"The model is in {out}.")
