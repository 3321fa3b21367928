"""Python processes that begin with everything imported: libraries take longer than what tests do with tiny models.

`python tests/warm.py` imports them and then forks for each request, a line of JSON on its standard input. What is read
at import, such as the address of a hub, is that of the process's own environment.
"""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


class Warm:
    """Starts Python commands, as `subprocess.Popen` and `subprocess.run` do.

    Args:
        env: the environment of all its commands.
    """

    def __init__(self, env=None):
        self.server = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *arguments, folder):
        """Begins `python ARGUMENTS`; its output goes to files in a folder."""
        out, err = folder / "stdout", folder / "stderr"
        request = {"arguments": [str(one) for one in arguments], "out": str(out), "err": str(err), "cwd": os.getcwd()}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return Started(int(self.server.stdout.readline()), self.server, out, err)

    def run(self, *arguments, folder):
        """Runs `python ARGUMENTS` to its end."""
        return self.start(*arguments, folder=folder).wait()

    def close(self):
        self.server.stdin.close()
        self.server.wait()


@dataclass
class Started:
    """A process that was started; one at a time."""

    pid: int
    server: subprocess.Popen
    out: Path
    err: Path

    def wait(self):
        code = int(self.server.stdout.readline())
        return subprocess.CompletedProcess([], code, self.out.read_text(), self.err.read_text())


def serve():
    """Forks for each request and answers with the process's number and, once it has ended, its exit code."""
    import bridle.comparison.compare  # noqa: F401

    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            return become(**request)
        answer(pid)
        answer(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def answer(number):
    print(number, flush=True)


def become(arguments, out, err, cwd):
    """Does as `python -m MODULE …` or `python -c CODE …` would."""
    for descriptor, path, how in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(path, how | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(cwd)
    kind, what, *rest = arguments
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})


if __name__ == "__main__":
    serve()
