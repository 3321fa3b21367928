"""The two errors that Bridle raises on purpose, and text made safe for a terminal. Any other exception is a bug."""

from collections.abc import Iterator
from contextlib import contextmanager
from unicodedata import category

LONGEST = 1000  # characters of a message, which may quote a whole file
KEPT = "\n\t\u200c\u200d"  # the last two join letters, and emoji


class _OneLine(Exception):  # noqa: N818 - the base of both errors
    """Keeps its message to one printable line, whatever names, rows and errors it quotes."""

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))


class UserError(_OneLine, ValueError):
    """A mistake in what the user gave: a recipe, a file, a row, an option.

    The message is one line that names the file, row or key and says what to do. The command line prints it without a
    traceback and exits with 2.
    """


class RunStopped(_OneLine, RuntimeError):  # noqa: N818 - an event of the run, more than an error
    """A run that cannot usefully continue; everything done so far is on disk.

    The message is one line: what happened, where the work is, what to try. The command line prints it without a
    traceback and exits with 3.
    """


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Puts a prefix, as "corpus.toxigen: ", before the message of a UserError that the block raises."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; of the system's errors, without the path."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(said).splitlines()[0]


def one_line(text: str) -> str:
    """Joins a text to one line of about `LONGEST` characters and escapes what is not printable."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}"
    line = " ".join(filter(None, map(str.strip, text.splitlines())))
    return "".join(c if c.isprintable() else _escape(c) for c in line)


def plain(text: str) -> str:
    """Escapes everything in a text of several lines that a terminal obeys instead of showing it.

    These are control characters except line feeds and tabs, and characters that hide text or turn its direction: a
    model or a file may write what sets a terminal's title, clipboard or colours.
    """
    return "".join(c if c.isprintable() or c in KEPT or category(c) == "Zs" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
