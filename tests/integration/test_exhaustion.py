"""Runs whose disk is full or whose memory runs out: nothing is lost, and the result is what it would have been."""

import json
import os
import shutil

import pytest
import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file
from test_training import StopAt

from bridle.data.target_cache import row_keys
from bridle.errors import RunStopped
from bridle.models.hidden import causal_lm
from bridle.recipes.recipe import load_recipe
from bridle.recipes.run import train
from bridle.training.batches import rollout_rows
from bridle.training.checkpointing import last_checkpoint
from bridle.training.config import Regulariser
from bridle.training.examples import encode
from bridle.training.precomputed import Upcoming, make_targets
from bridle.training.schedule import SequentialSchedule
from bridle.utils.oom import stopping_when_exhausted
from exhaustion import room_for, used
from trainers import NO_E, logged, trainer_of, weights

FULL = OSError(28, "No space left on device")
ROUNDS = {"anchor": "previous", "kl_on": "both"}


@pytest.fixture
def path(recipe):
    regulariser = {"constraint": "no e", "weight": 4.0, **ROUNDS}
    return recipe(max_steps=8, regularisers={"rude": regulariser}, save_strategy="steps", save_steps=3)


def written(folder):
    files = ("model", "auxiliary", "auxiliary/round-1")
    return {(file, k): v for file in files for k, v in load_file(folder / file / "model.safetensors").items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def assert_whole(folder):
    """Every weight and every row that has its name can be read, and no checkpoint is half-written."""
    for weight in folder.rglob("*.safetensors"):
        load_file(weight)
    for rows in folder.rglob("*.jsonl"):
        assert all(json.loads(line) for line in rows.read_text().splitlines()), rows
    checkpoints = list(folder.glob("checkpoint-*"))
    assert all((checkpoint / "schedule.json").exists() for checkpoint in checkpoints)
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == ".unfinished"]


class TestDisk:
    @pytest.mark.timeout(300)
    def test_a_full_disk_stops_the_run_and_with_room_it_goes_on(self, path, disk, tmp_path):
        """However much fits: the rollouts alone, or all but the model."""
        train(load_recipe(path), tmp_path / "whole")
        expected, size = written(tmp_path / "whole"), used(tmp_path / "whole")
        reached = set()
        for share in (0.02, 0.5, 0.8, 0.95):
            folder = disk.folder / "run"
            disk.resize(share * size)
            with pytest.raises(RunStopped, match=rf"^{folder}: the disk is full .* --resume continues"):
                train(load_recipe(path), folder)
            assert_whole(folder)
            reached.add(last_checkpoint(folder) and last_checkpoint(folder).name)
            disk.resize(2 * size)
            train(load_recipe(path), folder, resume=True)
            assert_same(written(folder), expected)
            shutil.rmtree(folder)
        assert len(reached) > 2, "the disk was full in one place only"

    def test_the_command_line_says_it_in_one_line(self, bridle, path, disk):
        disk.resize(2**14)
        code, _, err = bridle("train", path, "--output_dir", disk.folder / "run")
        assert code == 3
        assert err.splitlines()[-1].startswith(f"bridle: {disk.folder / 'run'}: the disk is full")
        assert "Traceback" not in err

    @pytest.mark.timeout(300)
    def test_whatever_write_fails_the_run_goes_on_to_the_same_weights(self, path, tmp_path, monkeypatch):
        calls, fsync = [], os.fsync

        def failing_at(call):
            calls.clear()

            def sync(file):
                calls.append(file)
                if len(calls) == call:
                    raise FULL
                fsync(file)

            monkeypatch.setattr(os, "fsync", sync)

        failing_at(None)
        train(load_recipe(path), tmp_path / "whole")
        expected, writes = written(tmp_path / "whole"), len(calls)
        for call in range(1, writes + 1, writes // 4):
            folder = tmp_path / f"failed-{call}"
            failing_at(call)
            with pytest.raises(RunStopped, match="the disk is full"):
                train(load_recipe(path), folder)
            assert_whole(folder)
            failing_at(None)
            train(load_recipe(path), folder, resume=True)
            assert_same(written(folder), expected)

    def test_a_comparison_stops_where_no_method_would_find_room(
        self, bridle, recipe, tmp_path, corpus_files, monkeypatch
    ):
        measured = []

        def full(model, *_, **__):
            measured.append(model)
            raise FULL

        monkeypatch.setattr("bridle.comparison.compare.measure", full)
        rows = {"path": str(corpus_files["rude"]), "rows": "0:6", "prompt_tokens": 2}
        path = recipe(evaluation={"prompts": {"rude": rows}})
        code, _, err = bridle("compare", path, "--methods", "base,sft", "--output_dir", tmp_path / "out")
        assert code == 3
        assert err.splitlines()[-1].startswith(f"bridle: {tmp_path / 'out'}: the disk is full")
        assert len(measured) == 1
        assert not list((tmp_path / "out").rglob("failed.json"))


class TestKeepLast:
    def steps(self, folder):
        return sorted(int(path.parent.name.removeprefix("checkpoint-")) for path in folder.glob("*/schedule.json"))

    @pytest.mark.parametrize(("keep", "kept"), [(None, list(range(1, 9))), (3, [6, 7, 8]), (1, [8])])
    def test_the_last_checkpoints_stay(self, bridle, path, tmp_path, keep, kept):
        options = ("--save_steps", 1) + (("--keep_last", keep) if keep else ())
        folder = tmp_path / "run"
        foreign = folder / "checkpoint-500"
        foreign.mkdir(parents=True)
        code, _, err = bridle("train", path, "--output_dir", folder, *options)
        assert code == 0, err
        assert self.steps(folder) == kept
        assert foreign.is_dir(), "only whole checkpoints of ours are ours to remove"

    def test_the_only_whole_one_stays_until_the_next_is_whole(self, path, tmp_path, monkeypatch):
        recipe, folder = load_recipe(path, {"keep_last": 1, "save_steps": 2}), tmp_path / "run"
        train(recipe, tmp_path / "whole")
        save = SequentialSchedule.save

        def killed(schedule, checkpoint):
            if checkpoint.name == "checkpoint-6":
                raise KeyboardInterrupt
            return save(schedule, checkpoint)

        monkeypatch.setattr(SequentialSchedule, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder)
        monkeypatch.undo()
        assert (folder / "checkpoint-6" / "model.safetensors").exists()
        assert self.steps(folder) == [4]
        train(recipe, folder, resume=True)
        assert self.steps(folder) == [8]
        assert_same(written(folder), written(tmp_path / "whole"))


def embedding(trainer):
    return causal_lm(trainer.model).get_input_embeddings()


def regulariser():
    return {"rude": Regulariser(NO_E, weight=4.0, anchor="previous", kl_on="both")}


class TestMemory:
    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize(
        ("batch", "room", "after"),
        [
            ((8, 1), 5, 0),
            ((4, 2), 4, 3),  # in the second micro-batch of the second update
        ],
    )
    def test_an_update_in_parts_is_the_same_update(self, tiny_folder, tmp_path, caplog, batch, room, after, backward):
        rows, accumulated = batch
        options = {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": accumulated,
            "optim": "sgd",  # AdamW makes whole steps out of gradients that are only rounding
            "learning_rate": 0.5,
        }
        folder = tiny_folder()
        whole = trainer_of(folder, tmp_path / "whole", regulariser(), **options)
        whole.train()
        cut = trainer_of(folder, tmp_path / "cut", regulariser(), **options)
        before = weights(cut)
        with room_for(embedding(cut), room, training=True, backward=backward, after=after) as refused:
            cut.train()
        assert refused
        assert len(refused) == caplog.text.count("training the policy: memory ran out with")
        assert cut.row_limit.rows == (refused[-1] + 1) // 2
        assert max((weight - before[name]).abs().max() for name, weight in weights(cut).items()) > 0.01
        for name, weight in weights(whole).items():
            torch.testing.assert_close(weights(cut)[name], weight, atol=2e-5, rtol=1e-4)
        for key in ("loss", "ce", "kl/rude", "grad_norm"):
            assert logged(cut, key) == pytest.approx(logged(whole, key), abs=1e-4), key
        for key in ("num_tokens", "tokens_trained", "learning_rate"):
            assert logged(cut, key) == logged(whole, key), key
        assert cut.regularisers[0].rollout_cursor == whole.regularisers[0].rollout_cursor

    def test_a_resumed_run_goes_on_in_the_same_parts(self, tiny_folder, tmp_path):
        folder, options = tiny_folder(), {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
        whole = trainer_of(folder, tmp_path / "whole", regulariser(), **options)
        with room_for(embedding(whole), 5, training=True):
            whole.train()
        died = trainer_of(folder, tmp_path / "died", regulariser(), **options)
        died.add_callback(StopAt(5))
        with room_for(embedding(died), 5, training=True), pytest.raises(KeyboardInterrupt):
            died.train()
        resumed = trainer_of(folder, tmp_path / "died", regulariser(), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "died" / "checkpoint-4"))
        assert resumed.row_limit.rows == whole.row_limit.rows < 8
        for name, weight in weights(whole).items():
            assert torch.equal(weights(resumed)[name], weight), name

    def test_a_row_that_does_not_fit_alone_stops_the_run(self, tiny_folder, tmp_path):
        trainer = trainer_of(tiny_folder(), tmp_path, regulariser())
        with (
            room_for(embedding(trainer), 0, training=True) as refused,
            pytest.raises(RunStopped, match=f"^{tmp_path}: memory ran out where no batch could be smaller"),
            stopping_when_exhausted(tmp_path),
        ):
            trainer.train()
        assert min(refused) <= 2, "a row and the rollout that rides along"

    def test_what_several_processes_do_together_is_not_cut(self, tiny_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_CPU)
        assert not trainer_of(tiny_folder(), tmp_path, regulariser()).row_limit.can_cut

    def test_a_round_in_parts_is_the_same_round(self, tiny_folder, tmp_path, caplog):
        """Sampling, reading the rollouts, and making targets of them."""
        folder, rounds = tiny_folder(), []
        for room in (100, 3):
            trainer = trainer_of(folder, tmp_path / str(room), regulariser())
            (rude,) = trainer.regularisers
            with room_for(embedding(trainer), room) as refused:
                trainer.schedule.begin_round(1)
                examples = encode(trainer.model, rude.rollouts, trainer.processing_class.pad_token_id)
                targets = make_targets(rude, Upcoming(rollouts=len(rude.rollouts)), 1)
            rows = rollout_rows(rude.rollouts, trainer.processing_class.pad_token_id)
            rounds.append((rude.rollouts, examples, targets.gather(row_keys(*rows), rows[-1])))
            assert bool(refused) == (room == 3)
        for work in ("round 1: sampling for rude", "reading the rollouts", "targets for rude"):
            assert f"{work}: memory ran out with 32 rows at once; the limit is now 16" in caplog.text
        (drawn, read, made), (drawn_in_parts, read_in_parts, made_in_parts) = rounds
        assert [rollout.completion_ids for rollout in drawn_in_parts] == [rollout.completion_ids for rollout in drawn]
        assert [rollout.complies for rollout in drawn_in_parts] == [rollout.complies for rollout in drawn]
        torch.testing.assert_close(read_in_parts.hidden[read.mask], read.hidden[read.mask], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(made_in_parts.log_rest, made.log_rest, atol=1e-2, rtol=1e-2)
