import json
import os
import resource
import subprocess
import sys
from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle.errors import UserError
from bridle.utils.files import append_text, check_output, whole_files, write_json
from bridle.utils.provenance import PACKAGES, environment

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    for command in (
        ["init", "--quiet"],
        ["add", "recipe.yaml"],
        ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "first"],
    ):
        subprocess.run(["git", *command], check=True)
    return tmp_path


def test_environment_names_what_the_result_was_made_with(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bridle", "evaluate", "model", "--samples", "4"])
    found = environment(seed=7)
    assert set(found["versions"]) == {"python", *PACKAGES}
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["seed"] == 7
    assert found["command"] == ["bridle", "evaluate", "model", "--samples", "4"]
    assert found["threads"] == torch.get_num_threads()
    age = datetime.now(UTC) - datetime.fromisoformat(found["time"])
    assert 0 <= age.total_seconds() < 60


def test_environment_is_json(tmp_path):
    write_json(tmp_path / "environment.json", environment(seed=0))
    assert json.loads((tmp_path / "environment.json").read_text())["seed"] == 0


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr("bridle.utils.provenance.PACKAGES", ("torch", "no-such-package-here"))
    versions = environment(seed=0)["versions"]
    assert versions["no-such-package-here"] is None
    assert versions["torch"] is not None


def test_git_state_follows_the_repository(repository):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert environment(seed=0)["git"] == {"commit": commit, "dirty": False}
    (repository / "untracked.json").write_text("{}")
    assert environment(seed=0)["git"]["dirty"] is False
    (repository / "recipe.yaml").write_text("seed: 2\n")
    assert environment(seed=0)["git"] == {"commit": commit, "dirty": True}


def test_no_git_state_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert environment(seed=0)["git"] is None


def test_no_git_state_without_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    assert environment(seed=0)["git"] is None


@settings(max_examples=30)
@given(obj=JSON)
def test_what_is_written_reads_back(obj, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json(path, obj)
    assert json.loads(path.read_text(encoding="utf-8")) == obj


def test_missing_folders_are_made_and_nothing_else_is_left(tmp_path):
    write_json(tmp_path / "a" / "b" / "result.json", {"rate": 0.5})
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result.json"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, bad):
    path = tmp_path / "result.json"
    write_json(path, {"rate": 0.5})
    with pytest.raises(ValueError, match=r"result\.json: not written"):
        write_json(path, {"rates": [0.1, {"deep": bad}]})
    assert json.loads(path.read_text()) == {"rate": 0.5}


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch, step):
    path = tmp_path / "result.json"
    write_json(path, {"rate": 0.5})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(UserError, match=r"result\.json: cannot be written \(No space left on device\)"):
        write_json(path, {"rate": 0.6})
    assert json.loads(path.read_text()) == {"rate": 0.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_file_where_a_folder_should_be_is_a_users_mistake(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"result\.json: cannot be written"):
        write_json(tmp_path / "taken" / "result.json", {})


@pytest.fixture
def largest_file():
    """Files may have ten bytes: what is written beyond them is cut off, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_added_is_added_whole_or_not_at_all(tmp_path, largest_file):
    path = tmp_path / "metrics.jsonl"
    append_text(path, "{}\n")
    append_text(path, "{é}\n")
    with pytest.raises(OSError, match="No space left on device"):
        append_text(path, "{1234}\n")
    assert path.read_text(encoding="utf-8") == "{}\n{é}\n"


def test_files_of_a_folder_take_their_places_whole(tmp_path):
    folder = tmp_path / "auxiliary"
    for version in ("old", "new"):
        with whole_files(folder) as unfinished:
            (unfinished / "part").mkdir()
            for name in ("config.json", "part/model.safetensors"):
                (unfinished / name).write_text(version)
        (folder / f"{version}.txt").touch()
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json": "new", "part/model.safetensors": "new", "old.txt": "", "new.txt": ""}
    assert {path.name for path in folder.iterdir()} == {"config.json", "part", "old.txt", "new.txt"}


def test_files_of_a_folder_stay_when_newer_ones_cannot_be_written(tmp_path):
    def fail(folder):
        (folder / "config.json").write_text("ne")
        raise OSError("full")

    (tmp_path / "config.json").write_text("old")
    with pytest.raises(OSError, match="full"), whole_files(tmp_path) as unfinished:
        fail(unfinished)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "old"}


def test_what_a_dead_run_left_unfinished_is_no_file_of_the_next(tmp_path):
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "half.safetensors").touch()
    with whole_files(tmp_path) as unfinished:
        (unfinished / "config.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_outputs_are_checked_before_the_work(tmp_path):
    check_output(None, tmp_path / "new" / "deeper" / "file.json", tmp_path / "file.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.json").touch()
    for path, said in {
        tmp_path: "is a folder; name a file",
        tmp_path / "file.json" / "a": r"cannot be written \(Not a directory\)",
        tmp_path / ("x" * 300): r"cannot be written \(File name too long\)",
    }.items():
        with pytest.raises(UserError, match=said):
            check_output(path)
