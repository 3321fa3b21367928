"""Files: written whole or not at all, checked before the work, one writer for a folder."""

import json
import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle.errors import UserError
from bridle.utils.files import append_text, atomic_files, cache_folder, check_output, only_writer, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


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


def test_caches_are_in_the_users_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("BRIDLE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BRIDLE_CACHE")
    assert "bridle" in str(cache_folder())


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
        with atomic_files(folder) as unfinished:
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
    with pytest.raises(OSError, match="full"), atomic_files(tmp_path) as unfinished:
        fail(unfinished)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "old"}


def test_what_a_dead_run_left_unfinished_is_no_file_of_the_next(tmp_path):
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "half.safetensors").touch()
    with atomic_files(tmp_path) as unfinished:
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
