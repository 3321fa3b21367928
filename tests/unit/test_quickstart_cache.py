"""The cache: whole folders only, made once, and anew when anything that shapes them changes."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bridle.errors import UserError
from bridle.quickstart import build
from bridle.quickstart.cache import cached


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path) -> None:
    with (folder / "made").open("a") as file:
        file.write(f"{os.getpid()}\n")


def test_made_once_and_anew_for_another_shape():
    folder = cached("x", {"seed": 0}, write)
    assert cached("x", {"seed": 0}, write) == folder
    assert len((folder / "made").read_text().splitlines()) == 1
    assert cached("x", {"seed": 1}, write) != folder


def test_the_folders_that_were_used_last_stay(cache):
    made = [cached("x", {"seed": seed}, write) for seed in range(4)]
    for age, folder in enumerate(made):
        os.utime(folder, (age, age))
    other = cached("y", {}, write)
    assert cached("x", {"seed": 0}, write) == made[0]  # used again
    new = cached("x", {"seed": 4}, write)
    assert {path for path in cache.iterdir() if path.is_dir()} == {made[0], made[2], made[3], new, other}


def test_an_interruption_leaves_nothing(cache):
    def interrupted(folder):
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("x", {}, interrupted)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    assert (cached("x", {}, write) / "made").exists()


def _make(queue):
    queue.put(str(cached("x", {}, write)))


def test_two_processes_make_it_once():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_make, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {queue.get(timeout=20) for _ in processes}
    for process in processes:
        process.join()
    (folder,) = folders
    assert len((Path(folder) / "made").read_text().splitlines()) == 1


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BRIDLE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="set BRIDLE_CACHE"):
        cached("x", {}, write)


def test_everything_that_shapes_the_world_is_in_its_name(tmp_path, monkeypatch):
    scale = build.Scale()
    shapes = [
        build._shape(scale, 0),
        build._shape(scale, 1),
        build._shape(replace(scale, temper=0.0), 0),
        build._shape(replace(scale, base=replace(scale.base, learning_rate=1.0)), 0),
    ]
    monkeypatch.setattr(build, "version", lambda name: "another")
    shapes.append(build._shape(scale, 0))
    assert all(one != other for index, one in enumerate(shapes) for other in shapes[:index])
    assert {"world.py", "truth.py", "base.py", "tasks/facts.yaml"} <= shapes[0]["sources"].keys()
    assert "recipe.yaml" not in shapes[0]["sources"]
