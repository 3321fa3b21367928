import pytest

from bridle.utils.checkpoints import keep_last, last_whole, whole_checkpoints, whole_or_gone

LAST = "schedule.json"


def write(folder, step, *, whole):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    for file in ("model.safetensors", *([LAST] if whole else [])):
        (checkpoint / file).write_text("{}")
    return checkpoint


def steps(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


@pytest.fixture
def folder(tmp_path):
    """Whole checkpoints of steps 4, 12 and 100, and one of step 200 that was left half-written."""
    for step in (12, 100, 4):
        write(tmp_path, step, whole=True)
    write(tmp_path, 200, whole=False)
    return tmp_path


def test_they_come_by_their_steps_and_half_written_ones_are_passed_over(folder):
    assert [path.name for path in whole_checkpoints(folder, LAST)] == [f"checkpoint-{n}" for n in (4, 12, 100)]
    assert last_whole(folder, LAST).name == "checkpoint-100"
    assert last_whole(folder / "checkpoint-4", LAST) is None


@pytest.mark.parametrize(("count", "left"), [(None, [4, 12, 100]), (3, [4, 12, 100]), (2, [12, 100]), (1, [100])])
def test_only_whole_ones_are_counted_and_only_they_go(folder, count, left):
    keep_last(folder, LAST, count)
    assert steps(folder) == [*left, 200]


def test_the_best_one_is_spared(folder):
    keep_last(folder, LAST, 1, spared=str(folder / "checkpoint-4"))
    assert steps(folder) == [4, 100, 200]


def test_one_that_is_half_removed_does_not_look_whole(folder, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("bridle.utils.checkpoints.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        keep_last(folder, LAST, 1)
    assert (folder / "checkpoint-4" / "model.safetensors").exists()
    assert [path.name for path in whole_checkpoints(folder, LAST)] == ["checkpoint-12", "checkpoint-100"]


def test_one_that_cannot_be_written_is_removed(folder):
    def fail():
        write(folder, 300, whole=False)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), whole_or_gone(folder / "checkpoint-300", LAST):
        fail()
    assert steps(folder) == [4, 12, 100, 200]


def test_one_that_is_written_over_is_not_whole_meanwhile(folder):
    with whole_or_gone(folder / "checkpoint-100", LAST):
        assert last_whole(folder, LAST).name == "checkpoint-12"
