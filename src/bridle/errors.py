"""The two kinds of bad news Bridle gives on purpose; anything else that is raised is a bug."""


class UserError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a row, an option.

    The message is one line that names the file, row or key and says what to do. The command line
    prints it without a traceback and exits with 2.
    """


class RunStopped(RuntimeError):  # noqa: N818 - an event of the run, more than an error
    """A run that cannot go on usefully, with everything done so far kept on disk.

    The message is one line: what was seen, where the kept work is, what to try. The command line
    prints it without a traceback and exits with 3.
    """
