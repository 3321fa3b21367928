"""`bridle generate`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bridle.cli import common
from bridle.cli.common import refuse, say
from bridle.utils.quiet import quiet_libraries

app = typer.Typer()

Prompts = Annotated[
    str | None, typer.Option(metavar="FILE", help="Prompts: JSONL, CSV, Parquet, one a line in a .txt, or a known set.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Ask --prompt as a user's turn, by the model's chat template.")]
Output = Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON lines here instead of printing.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option("--max_new_tokens", min=1, help="Tokens at which a completion is cut. [default: the set's, or 64]"),
]
Stream = Annotated[bool, typer.Option("--stream", help="Print the text of --prompt as it is drawn.")]
StopBelow = Annotated[
    float | None,
    typer.Option(
        "--stop_below",
        metavar="P",
        help="Stop a completion once the R of --guide says that it will comply with less than this probability.",
    ),
]
Redraw = Annotated[
    int | None, typer.Option(min=0, help="How often to draw a stopped completion again; after that it is withheld.")
]


@app.command(epilog="Example: bridle generate runs/detox-mini/model --prompt 'The weather in' --samples 3")
def generate(
    model: common.Model,
    prompts: Prompts = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="A single prompt.")] = None,
    chat: Chat = False,
    guide: common.Guide = None,
    output: Output = None,
    prompt_tokens: common.PromptTokens = None,
    samples: common.Samples = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: common.Temperature = None,
    top_p: common.TopP = None,
    greedy: common.Greedy = False,
    stream: Stream = False,
    batch_size: common.BatchSize = 64,
    guidance_scale: common.GuidanceScale = 1.0,
    stop_below: StopBelow = None,
    redraw: Redraw = None,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
) -> None:
    """Draw text from a model, guided or not: by default at temperature 1, from its whole distribution."""
    from bridle.evaluation.evaluator import Evaluator
    from bridle.evaluation.prompt_sets import GenerationOptions, combined, prompt_set
    from bridle.models.guidance import guided
    from bridle.models.loading import load_for_inference
    from bridle.utils.files import check_output

    is_single = prompt is not None and output is None and samples in (None, 1)
    refuse(
        ((prompts is None) == (prompt is None), "give either --prompts FILE or --prompt TEXT"),
        (prompt is not None and prompt_tokens, "--prompt_tokens is for --prompts; cut the --prompt yourself"),
        (chat and prompt is None, "--chat is for a --prompt; a file's prompts are chats by their columns"),
        (guide is None and guidance_scale != 1, common.SCALE_WITHOUT_GUIDE),
        (guide is None and stop_below is not None, "--stop_below watches the R of a --guide; name one"),
        (stop_below is None and redraw is not None, "--redraw draws again what --stop_below stops; give both"),
        (stop_below is not None and stream, "--stream prints what --stop_below might withhold; leave one out"),
        (stream and not is_single, "--stream is for one --prompt, not --samples or --output"),
    )
    check_output(output)
    defaults = {"samples": 1, "max_new_tokens": 64}
    options = common.given(prompt_tokens=prompt_tokens, samples=samples, max_new_tokens=max_new_tokens)
    options |= common.given(temperature=temperature, top_p=top_p, greedy=greedy)
    asked_of = prompt_set(prompts, defaults=defaults, **options) if prompts is not None else None
    how = asked_of.generation if asked_of else GenerationOptions(**combined(defaults, options))
    quiet_libraries()
    lm, tokenizer = load_for_inference(model, dtype, device)
    with guided(lm, guide, guidance_scale) as guidance:
        monitor = _monitor(guidance, stop_below, redraw)
        evaluator = Evaluator(lm, tokenizer, guidance, batch_size, seed, monitor=monitor)
        asked = evaluator.read(asked_of) if asked_of else [evaluator.prompt(prompt or "", how.max_new_tokens, chat)]
        streamer = _streamer(tokenizer, asked[0].ids) if stream else None
        drawn = evaluator.draw(asked, how, streamer.put if streamer is not None else None)
    if streamer is not None:
        return streamer.end()
    _show([(one.text, text) for one, texts in zip(asked, drawn, strict=True) for text in texts], output)
    if monitor is not None:
        say(f"{monitor.watched}; what was withheld is empty.", err=True)


def _monitor(guide: Any, stop_below: float | None, redraw: int | None) -> Any:
    from bridle.models.monitor import Monitor

    return None if stop_below is None else Monitor(guide, stop_below, redraw or 0)


def _show(texts: list[tuple[str, str]], output: Path | None) -> None:
    """Writes prompts and completions to a file, or prints them."""
    from bridle.utils.files import write_rows

    if output is None:
        for prompt, completion in texts:
            say(prompt + completion + "\n")
    else:
        write_rows(output, [{"prompt": prompt, "completion": completion} for prompt, completion in texts])
        say(f"{len(texts)} completions are in {output}.")


def _streamer(tokenizer: Any, prompt: list[int]) -> Any:
    """Prints the prompt at once, then tokens as words are completed."""
    import torch
    from transformers import TextStreamer

    class ToTerminal(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text, nl=stream_end)
            sys.stdout.flush()

    streamer = ToTerminal(tokenizer, skip_special_tokens=True)
    streamer.put(torch.tensor(prompt))
    return streamer
