"""`bridle generate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bridle.cli.common import (
    BatchSize,
    Device,
    Dtype,
    Guide,
    GuidePower,
    MaxNewTokens,
    Model,
    PromptTokens,
    Samples,
    Seed,
    load,
)
from bridle.errors import UserError

app = typer.Typer()


@app.command(epilog="Example: bridle generate runs/detox-mini/model --prompt 'The weather in' --samples 3")
def generate(
    model: Model,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts: JSONL, CSV, Parquet, or one a line in a .txt."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="A single prompt.")] = None,
    guide: Guide = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write JSON lines here instead of printing.")
    ] = None,
    prompt_tokens: PromptTokens = None,
    samples: Samples = 1,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 64,
    guide_power: GuidePower = 1.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Draw text from a model, guided or not, at temperature 1 from its whole distribution."""
    from bridle.environment import write_text
    from bridle.evaluation import Evaluator, prompt_set
    from bridle.models.guidance import guided

    if (prompts is None) == (prompt is None):
        raise UserError("give either --prompts FILE or --prompt TEXT")
    lm, tokenizer = load(model, device, dtype)
    with guided(lm, guide, guide_power) as guidance:
        evaluator = Evaluator(lm, tokenizer, guidance, batch_size, seed)
        if prompts is not None:
            asked = evaluator.read(prompt_set(prompts), max_new_tokens, prompt_tokens)
        else:
            asked = [evaluator.prompt(prompt or "", max_new_tokens)]
        drawn = evaluator.draw([one.ids for one in asked], samples=samples, max_new_tokens=max_new_tokens)
    rows = [{"prompt": one.text, "completion": text} for one, texts in zip(asked, drawn, strict=True) for text in texts]
    if output is None:
        for row in rows:
            typer.echo(row["prompt"] + row["completion"] + "\n")
        return
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    typer.echo(f"{len(rows)} completions are in {output}.")
