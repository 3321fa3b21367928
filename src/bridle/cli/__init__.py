"""The command line: one file for each group of commands."""

import io
import logging
import os
import shlex
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from bridle.cli import certification, comparison, conversion, demo, evaluation, generation, schema, training
from bridle.cli.common import PlainFormatter
from bridle.errors import RunStopped, UserError
from bridle.utils.interruption import Interrupted, catching_signals

app = typer.Typer(
    name="bridle",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0, done; 1, a plan that does not fit, or nothing certified; 2, a mistake in what was given; 3, "
    "a run that stopped, or a comparison of which a method failed, with its work kept; 130 or 143, ended by Ctrl-C or "
    "SIGTERM.",
)
for group in (training, generation, demo, evaluation, certification, comparison, conversion, schema):
    app.add_typer(group.app)

USER_ERROR, RUN_STOPPED, SIGNALLED = 2, 3, 128  # exit codes; a signal's number is added
RESUMABLE = ("train", "compare")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo("  ".join(f"{name} {version(name)}" for name in ("bridle", "torch", "transformers", "trl")))
        raise typer.Exit


@app.callback()
def options(
    versions: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show Bridle's version, and libraries'."),
    ] = False,
) -> None:
    """Fine-tune a language model on a corpus while holding its outputs to a policy."""


def main() -> None:
    """Entry point: one line on stderr; exit code 2 for a user's mistake, 3 for a stopped run, 130 or 143 by signal."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message="Could not find a config file in")  # of peft, about a GGUF file
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model or a file may contain any character
    try:
        with catching_signals():
            app(prog_name="bridle")
    except Interrupted as interrupted:
        print("bridle: " + "; ".join([str(interrupted), *_how_to_resume(interrupted)]), file=sys.stderr)
        sys.exit(SIGNALLED + interrupted.signal)
    except (UserError, RunStopped) as error:
        print(f"bridle: {error}", file=sys.stderr)
        sys.exit(USER_ERROR if isinstance(error, UserError) else RUN_STOPPED)


def _how_to_resume(interrupted: Interrupted) -> list[str]:
    """The work that a command keeps, and the command that resumes it."""
    from bridle.utils.provenance import redacted

    command, *rest = sys.argv[1:] or [""]
    resume = ["bridle", command, *rest, *([] if "--resume" in rest else ["--resume"])]
    hint = [f"resume with: {shlex.join(redacted(resume))}"] if command in RESUMABLE else []
    return [*filter(None, [interrupted.kept]), *hint]
