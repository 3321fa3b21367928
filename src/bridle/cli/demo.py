"""`bridle demo`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bridle.cli import common
from bridle.cli.common import load_constraints, say
from bridle.utils.extras import needs_extra
from bridle.utils.quiet import quiet_libraries

app = typer.Typer()


@app.command(epilog="Example: bridle demo runs/compare-detox-mini")
def demo(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="RUN|COMPARISON|MODEL",
            help="Folder of `bridle train` or `bridle compare`, or a model's folder, GGUF file or hub name.",
        ),
    ],
    guide: Annotated[
        str | None,
        typer.Option(
            metavar="AUXILIARY",
            help="An R that guides the model before tuning, and reads what has no R of its own.",
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="Judges the texts, besides a recipe's own: as in `evaluate`; repeatable."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="To show. [default: certificate.json of the folder, if any]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    device: common.Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights: float32, bfloat16, float16. [default: the recipe's]")
    ] = None,
) -> None:
    """Serve a page on which to try methods side by side: texts as they are written, with R, p and q of each token.

    Needs the extra `demo`: pip install ".[demo]" in the copy of the repository. The page answers on this machine only,
    unless --host says otherwise, and loads nothing from elsewhere.
    """
    with needs_extra("demo", "bridle demo"):
        from bridle.demo.server import serve
    from bridle.demo.session import Session
    from bridle.demo.subject import subject_of
    from bridle.utils.http import is_loopback

    quiet_libraries()
    judges = load_constraints(constraint or [])
    show = partial(say, err=True)
    session = Session(subject_of(subject, guide, judges, certificate, dtype), device, show)
    session.load()
    if not is_loopback(host):
        show(f"Anyone who can reach {host} can use this page and its models.")
    serve(session, host, port, lambda address: say(f"The page is at {address}. Ctrl-C ends it."))
