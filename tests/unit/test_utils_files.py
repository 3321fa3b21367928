"""One writer for a folder."""

import subprocess
import sys

import pytest

from bridle.errors import UserError
from bridle.utils.files import only_writer

HOLDER = """
import sys, time
from bridle.utils.files import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run is writing here"), only_writer(tmp_path):
        pass
    holder.kill()  # SIGKILL: nothing is tidied up
    holder.wait()
    with only_writer(tmp_path):
        pass


def test_it_is_let_go_of_when_the_block_fails(tmp_path):
    with pytest.raises(RuntimeError), only_writer(tmp_path / "new"):
        raise RuntimeError
    with only_writer(tmp_path / "new"):
        pass
