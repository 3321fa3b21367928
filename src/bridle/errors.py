"""The two kinds of bad news Bridle gives on purpose, and text that a terminal shows without obeying it.

Anything else that is raised is a bug.
"""

from unicodedata import category

LONGEST = 1000  # characters of a message: what it quotes may be a whole file
KEPT = "\n\t\u200c\u200d"  # the last two join letters, and emoji


class _OneLine(Exception):  # noqa: N818 - what both kinds have in common
    """Keeps its message to one line that a terminal shows as it is, whatever names, rows and errors it quotes."""

    def __init__(self, message: object):
        super().__init__(one_line(str(message)))


class UserError(_OneLine, ValueError):
    """A mistake in what the user gave: a recipe, a file, a row, an option.

    The message is one line that names the file, row or key and says what to do. The command line
    prints it without a traceback and exits with 2.
    """


class RunStopped(_OneLine, RuntimeError):  # noqa: N818 - an event of the run, more than an error
    """A run that cannot go on usefully, with everything done so far kept on disk.

    The message is one line: what was seen, where the kept work is, what to try. The command line
    prints it without a traceback and exits with 3.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a message of one line; without its path where it is the system's."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(said).splitlines()[0]


def one_line(text: str) -> str:
    """A text on one line of some `LONGEST` characters: breaks become spaces, and what is not printable is escaped."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}"
    line = " ".join(filter(None, map(str.strip, text.splitlines())))
    return "".join(c if c.isprintable() else _escape(c) for c in line)


def plain(text: str) -> str:
    """A text of several lines with everything escaped that a terminal obeys instead of showing it.

    These are control characters but line feeds and tabs, and what turns the direction of writing or hides: a model or
    a file may write what sets a terminal's title, its clipboard or its colours, or what reads otherwise than it is.
    """
    return "".join(c if c.isprintable() or c in KEPT or category(c) == "Zs" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
