import errno
import os

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridle.constraints.cache import ScoreCache
from bridle.core.sparse import sparse_target
from bridle.data import Rollout, read_rollouts, write_rollouts
from bridle.data.target_cache import TargetCache, TargetWriter
from bridle.errors import RunStopped, UserError
from bridle.utils import oom
from bridle.utils.files import append_text, write_json
from bridle.utils.oom import RowLimit, is_disk_full, is_out_of_memory, stopping_when_exhausted

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class TestRowLimit:
    def squares(self, limit, rows, fits, most):
        """Squares of rows, of which so many fit into memory at once; notes how many each attempt had."""

        def work(part):
            fits.append(len(part))
            if len(part) > most:
                raise torch.OutOfMemoryError(CUDA)
            return [row**2 for row in part]

        return [square for part in limit.run(work, rows) for square in part]

    def test_rows_that_need_more_than_half_of_the_free_memory_are_cut_at_once(self, monkeypatch):
        monkeypatch.setattr(oom, "free_memory", lambda device: 1000)
        known = {"row_bytes": 100, "device": torch.device("cpu")}
        assert RowLimit("counting", **known).run(list, range(12)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
        assert RowLimit("counting", row_bytes=10_000, device=torch.device("cpu")).rows == 1
        assert RowLimit("counting", can_cut=False, **known).rows is None

    def test_free_memory_is_the_machine_s(self):
        assert 2**20 < oom.free_memory(torch.device("cpu")) < psutil.virtual_memory().total

    @pytest.mark.parametrize("rows", [list(range(10)), range(10), torch.arange(10)])
    def test_work_is_halved_until_it_fits_and_stays_so(self, rows, caplog):
        limit, tried = RowLimit("counting"), []
        assert self.squares(limit, rows, tried, 3) == [n**2 for n in range(10)]
        assert tried == [10, 5, 3, 3, 3, 1]
        assert self.squares(limit, rows, tried, 3) == [n**2 for n in range(10)]
        assert tried[6:] == [3, 3, 3, 1]
        assert [record.getMessage() for record in caplog.records] == [
            "counting: memory ran out with 10 rows at once; the limit is now 5",
            "counting: memory ran out with 5 rows at once; the limit is now 3",
        ]

    def test_what_fits_is_not_cut(self):
        limit, tried = RowLimit("counting"), []
        assert self.squares(limit, range(10), tried, 10) == [n**2 for n in range(10)]
        assert tried == [10]
        assert limit.run(len, []) == []

    def test_memory_that_does_not_do_for_one_row_is_an_error(self):
        with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
            self.squares(RowLimit("counting"), range(4), tried := [], 0)
        assert tried == [4, 2, 1]

    def test_nothing_is_cut_where_other_processes_take_part(self):
        with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
            self.squares(RowLimit("counting", can_cut=False), range(4), tried := [], 2)
        assert tried == [4]

    def test_other_errors_are_as_they_were(self):
        def work(part):
            raise RuntimeError("shapes do not match")

        with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
            RowLimit("counting").run(work, range(4))

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (torch.OutOfMemoryError("no words"), True),
            (RuntimeError(CUDA), True),
            (RuntimeError(CPU), True),
            (RuntimeError("shapes do not match"), False),
            (RunStopped("runs/a: memory ran out where no batch could be smaller"), False),
        ],
    )
    def test_out_of_memory_is_distinguished_from_other_errors(self, error, expected):
        assert is_out_of_memory(error) is expected

    def test_a_cpu_that_has_no_memory_says_so(self):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**60)
        assert is_out_of_memory(caught.value)


def rollout(text):
    ids = [1, 2, 3]
    about = {"round": 1, "regulariser": "rude", "model_hash": "ab", "constraint": "no e"}
    return Rollout(prompt_ids=ids, completion_ids=ids, prompt=text, completion=text, **about)


def write_targets(path, prefixes):
    mask = torch.ones(1, prefixes, dtype=torch.bool)
    with TargetWriter(path, 64, 64) as writer:
        writer.add([1], sparse_target(torch.zeros(prefixes, 64).log_softmax(-1), 64), mask)


def label(path, count):
    texts = [f"text {number}" for number in range(count)]
    for _ in ScoreCache(path).through({}, texts, lambda asked: [(text, (0.5,) * 20) for text in asked]):
        pass


WRITERS = {
    "result.json": (lambda path, size: write_json(path, "x" * size), lambda path: path.read_text()[:2] == '"x'),
    "metrics.jsonl": (lambda path, size: append_text(path, "x" * size), lambda path: path.read_text() == "x"),
    "rollouts.jsonl": (lambda path, size: write_rollouts(path, [rollout("x" * size)]), read_rollouts),
    "weights.safetensors": (lambda path, size: save_file({"x": torch.zeros(size // 4)}, path), load_file),
    "targets.arrow": (lambda path, size: write_targets(path, size // 256 + 1), TargetCache.open),
    "scores.sqlite": (lambda path, size: label(path, size // 128 + 1), lambda path: not label(path, 1)),
    "optimizer.pt": (lambda path, size: torch.save(torch.zeros(size // 4), path), None),
}


@pytest.mark.parametrize("name", [*WRITERS])
def test_every_writer_reports_a_full_disk_and_keeps_earlier_files(disk, name):
    write, read = WRITERS[name]
    path = disk.folder / name
    write(path, 1)
    before = {entry.name for entry in disk.folder.iterdir()}
    with (
        pytest.raises(RunStopped, match=r"^runs/a: the disk is full \(.*\); free some space, and --resume continues"),
        stopping_when_exhausted("runs/a"),
    ):
        write(path, 2**18)
    if read is not None:
        assert {entry.name for entry in disk.folder.iterdir()} == before
        assert read(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_and_a_quota_may_be_full(code):
    assert is_disk_full(OSError(code, os.strerror(code), "somewhere"))
    assert is_disk_full(UserError(f"result.json: cannot be written ({os.strerror(code)})"))
    assert not is_disk_full(OSError(errno.EACCES, os.strerror(errno.EACCES), "somewhere"))


@pytest.mark.parametrize("error", [UserError("recipe: no"), ValueError("no"), RunStopped("runs/b: stopped")])
def test_all_else_passes_as_it_is(error):
    with pytest.raises(type(error)) as caught, stopping_when_exhausted("runs/a"):
        raise error
    assert caught.value is error


def test_memory_that_cannot_be_spared_stops_the_run():
    with (
        pytest.raises(RunStopped, match=r"^runs/a: memory ran out where no batch could be smaller; .* --resume"),
        stopping_when_exhausted("runs/a"),
    ):
        raise torch.OutOfMemoryError(CUDA)
