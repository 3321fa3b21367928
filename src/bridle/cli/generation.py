"""`bridle generate`."""

import sys
from pathlib import Path
from typing import Annotated, Any

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
    say,
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
    temperature: Annotated[
        float, typer.Option("--temperature", help="Divides the log-probabilities, after guidance; 1 is the model.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top_p", help="Draw from the likeliest tokens that have this probability together.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead of drawing one.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text of --prompt as it is drawn.")] = False,
    batch_size: BatchSize = 64,
    guide_power: GuidePower = 1.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Draw text from a model, guided or not: by default at temperature 1, from its whole distribution."""
    from bridle.evaluation import Evaluator, prompt_set
    from bridle.models.guidance import guided
    from bridle.models.sampling import Decoding
    from bridle.utils.files import check_output, write_rows

    if (prompts is None) == (prompt is None):
        raise UserError("give either --prompts FILE or --prompt TEXT")
    if prompt is not None and prompt_tokens is not None:
        raise UserError("--prompt_tokens cuts the rows of --prompts; write the --prompt as long as it should be")
    if guide is None and guide_power != 1:
        raise UserError("--guide_power is the strength of a --guide; name one, or leave it out")
    if greedy and samples > 1:
        raise UserError("--greedy has one completion for each prompt; leave out --samples")
    if stream and (prompts is not None or samples > 1 or output is not None):
        raise UserError("--stream prints one text; give it one --prompt, and neither --samples nor --output")
    check_output(output)
    options: dict[str, Any] = {"decoding": Decoding(temperature, top_p, greedy)}
    lm, tokenizer = load(model, device, dtype)
    with guided(lm, guide, guide_power) as guidance:
        evaluator = Evaluator(lm, tokenizer, guidance, batch_size, seed)
        if prompts is not None:
            asked = evaluator.read(prompt_set(prompts), max_new_tokens, prompt_tokens)
        else:
            asked = [evaluator.prompt(prompt or "", max_new_tokens)]
        if stream:
            streamer = _streamer(tokenizer, asked[0].ids)
            options["on_token"] = streamer.put
        drawn = evaluator.draw([one.ids for one in asked], samples=samples, max_new_tokens=max_new_tokens, **options)
    rows = [{"prompt": one.text, "completion": text} for one, texts in zip(asked, drawn, strict=True) for text in texts]
    if stream:
        streamer.end()
    elif output is not None:
        write_rows(output, rows)
        say(f"{len(rows)} completions are in {output}.")
    else:
        for row in rows:
            say(row["prompt"] + row["completion"] + "\n")


def _streamer(tokenizer: Any, prompt: list[int]) -> Any:
    """Prints tokens as soon as they are whole words; the prompt's at once."""
    import torch
    from transformers import TextStreamer

    class ToTerminal(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text, nl=stream_end)
            sys.stdout.flush()

    streamer = ToTerminal(tokenizer, skip_special_tokens=True)
    streamer.put(torch.tensor(prompt))
    return streamer
