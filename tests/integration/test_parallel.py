"""The parallel schedule: the same recurrence wherever R is fitted, and what happens when a role dies."""

import json
import threading
import time

import pytest
import torch

from bridle.constraints import WordList
from bridle.errors import RunStopped, UserError
from bridle.training import guards
from bridle.training.checkpointing import last_checkpoint
from bridle.training.config import AuxiliaryOptions, ParallelOptions, Regulariser
from bridle.training.state import RegulariserState
from conftest import INSULTS
from trainers import NO_E, Letters, LocalWorker, logged, processes, ray_with, trainer_of, weights

ROUNDS = {"schedule": "parallel", "rounds": 4, "max_steps": 8}
FIRST_ROUNDS = pytest.mark.parametrize("first_round", ["wait", "train"])


@pytest.fixture(scope="module")
def ray():
    """Ray with two CPUs, for all tests of this file."""
    yield from ray_with(2)


def in_turns(trainer):
    """A trainer whose worker fits R while the policy waits."""
    trainer.schedule.worker = LocalWorker(trainer.regularisers)
    return trainer


@pytest.mark.parametrize(
    ("first_round", "options"),
    [("wait", {"anchor": "live", "kl_on": "both"}), ("train", {"anchor": "previous", "kl_on": "corpus"})],
)
def test_ray_gives_what_a_plain_loop_gives_bit_for_bit(ray, tiny_folder, tmp_path, first_round, options):
    folder, ends, losses = tiny_folder(), [], []
    for name in ("plain", "ray"):
        largest = 0.0 if options["anchor"] == "previous" else 512.0  # everything large through files
        settings = {**ROUNDS, "parallel": ParallelOptions(first_round=first_round, largest_message=largest)}
        trainer = trainer_of(folder, tmp_path / name, {"rude": Regulariser(NO_E, weight=4.0, **options)}, **settings)
        (tmp_path / name / "exchange").mkdir(parents=True)
        (tmp_path / name / "exchange" / "policy-9.safetensors").touch()  # by a run that was killed
        (in_turns(trainer) if name == "plain" else trainer).train()
        ends.append(weights(trainer))
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())
    assert not list((tmp_path / "ray").glob("exchange/*")), "what has arrived is removed"


@pytest.mark.parametrize(("first_round", "fitted_in"), [("wait", [1, 1, 2, 3]), ("train", [None, 1, 2, 3])])
def test_each_round_uses_the_last_rounds_regulariser(tiny_folder, tmp_path, first_round, fitted_in):
    """The first has its own, or none."""
    options = {**ROUNDS, "parallel": ParallelOptions(first_round=first_round)}
    trainer = in_turns(trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E, weight=4.0)}, **options))
    used, submitted = [], []
    worker, begin = trainer.schedule.worker, trainer.schedule.begin_round
    submit = worker.submit
    worker.submit = lambda index, policy: submitted.append((index, policy)) or submit(index, policy)
    trainer.schedule.begin_round = lambda index, log: (begin(index, log), used.append(trainer.regularisers[0].state()))
    start = weights(trainer)
    trainer.train()
    assert [index for index, _ in submitted] == [1, 2, 3], "R_4 would be of no use to anybody"
    assert [state.rollouts[0].round if state.is_fitted else None for state in used] == fitted_in
    assert [state.rollout_cursor for state in used] == [0, 0, 0, 0], "each round starts at the first rollout"
    for name, weight in submitted[0][1].items():
        torch.testing.assert_close(weight, start[name])
    assert ("kl/rude" in trainer.state.log_history[0]) == (first_round == "wait"), "without R it is plain CE"
    assert len({state.rollouts[0].model_hash for state in used if state.is_fitted}) == 3
    records = [record for record in trainer.state.log_history if "round" in record]
    assert sum("rude/rollouts" in record for record in records) == 3, "each R is recorded once"


def test_a_slow_constraint_is_named(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "NOTICEABLE", 0.0)
    monkeypatch.setattr(guards, "DOMINANT_SHARE", 0.0)
    trainer = in_turns(trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E, weight=4.0)}, **ROUNDS))
    trainer.train()
    (warnings,) = (warnings for warnings in logged(trainer, "warnings") if "scoring took" in str(warnings))
    assert "round 1, rude: scoring took" in str(warnings)


def test_one_round_that_waits_has_a_regulariser(tiny_folder, tmp_path):
    options = {**ROUNDS, "rounds": 1, "parallel": ParallelOptions(first_round="wait")}
    trainer = in_turns(trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E, weight=4.0)}, **options))
    trainer.train()
    assert logged(trainer, "kl/rude")
    assert trainer.schedule.pending is None, "a resume would start a worker for it"


@FIRST_ROUNDS
def test_what_is_settled_is_not_sent_to_a_worker(tiny_folder, tmp_path, first_round):
    options, sent = {**ROUNDS, "parallel": ParallelOptions(first_round=first_round)}, []
    initial = {"rude": Regulariser(NO_E, weight=4.0, anchor="initial")}
    trainer = in_turns(trainer_of(tiny_folder(), tmp_path / "initial", initial, **options))
    submit = trainer.schedule.worker.submit
    trainer.schedule.worker.submit = lambda index, policy: sent.append(index) or submit(index, policy)
    trainer.train()
    assert sent == [1]
    assert logged(trainer, "rude/term_on")[-3:] == [True] * 3
    trainer = trainer_of(tiny_folder(), tmp_path / "retained", {"plain": Regulariser(None, weight=4.0)}, **options)
    trainer.schedule.make_worker = None
    trainer.train()
    assert logged(trainer, "plain/lambda") == [4.0] * 4
    assert trainer.schedule.worker is None


@FIRST_ROUNDS
def test_a_parallel_run_resumes_to_the_same_weights(tiny_folder, tmp_path, first_round):
    folder = tiny_folder()
    parallel = ParallelOptions(first_round=first_round)
    options = {**ROUNDS, "save_strategy": "steps", "save_steps": 1, "parallel": parallel}
    regularisers = {"rude": Regulariser(NO_E, weight=4.0, anchor="previous", kl_on="both")}
    whole = in_turns(trainer_of(folder, tmp_path / "whole", regularisers, **options))
    whole.train()
    for step in (1, 2, 3, 6):  # within the first round, at its end, and later
        again = in_turns(trainer_of(folder, tmp_path / f"again-{step}", regularisers, **options))
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, weight in weights(whole).items():
            assert torch.equal(weights(again)[name], weight), (step, name)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_an_r_that_equal_labels_have_shifted_resumes(tiny_folder, tmp_path, schedule):
    """The corpus has insults and a random model says none, so that each round shifts R and fits nothing."""
    folder, ends = tiny_folder(), []
    fit = AuxiliaryOptions(epochs=2, batch_size=8, corpus_outputs=32)
    lengths = {"max_length": 40, "max_new_tokens": 16, "prompt_tokens": (1, 2)}  # room for an insult
    saves = {"save_strategy": "steps", "save_steps": 1}
    options = {**ROUNDS, **lengths, **saves, "schedule": schedule, "auxiliary": fit}
    for name, resumed in (("whole", None), ("again", str(tmp_path / "whole" / "checkpoint-5"))):
        regularisers = {"rude": Regulariser(WordList(INSULTS), weight=4.0, kl_on="both")}
        trainer = in_turns(trainer_of(folder, tmp_path / name, regularisers, **options))
        trainer.train(resume_from_checkpoint=resumed)
        assert {*logged(trainer, "rude/fit")} == {"kept"}
        ends.append(weights(trainer) | trainer.regularisers[0].state().auxiliary)
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())


def test_a_first_round_that_began_without_a_regulariser_ends_so(tiny_folder, tmp_path):
    folder, ends = tiny_folder(), []
    options = {**ROUNDS, "save_strategy": "steps", "save_steps": 1}
    checkpoint = str(tmp_path / "train" / "checkpoint-1")
    for first_round, resumed in (("train", None), ("wait", checkpoint)):
        options["parallel"] = ParallelOptions(first_round=first_round)
        regularisers = {"rude": Regulariser(NO_E, weight=4.0)}
        trainer = in_turns(trainer_of(folder, tmp_path / first_round, regularisers, **options))
        trainer.train(resume_from_checkpoint=resumed)
        ends.append(weights(trainer))
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())


def test_a_killed_worker_stops_the_policy_and_says_so(ray, tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E, weight=4.0)}, **ROUNDS)
    refresh = trainer.schedule._refresh

    def kill_in_round_two(index, log):
        refresh(index, log)
        if index == 2:
            (worker,) = processes("RegulariserActor")
            worker.kill()

    trainer.schedule._refresh = kill_in_round_two
    with pytest.raises(RunStopped, match=r"the process of the regulariser, in round 2, died .*--resume"):
        trainer.train()
    assert trainer.state.global_step <= 4, "no later than the end of the round"


def test_a_round_that_has_ended_is_looked_at_once(ray, monkeypatch):
    from bridle.training.ray_worker import RayPending

    fetched, get = [], ray.get
    pending = RayPending([ray.put([])], {}, "the regulariser")
    monkeypatch.setattr(ray, "get", lambda reference: fetched.append(reference) or get(reference))
    for _ in range(3):
        pending.check()
    assert len(fetched) == 1


def test_a_failed_round_leaves_no_weights(ray, tmp_path):
    from bridle.training.ray_worker import RayPending, pack

    @ray.remote
    def fail():
        raise RunStopped("no score")

    sent = pack({"weight": torch.zeros(2)}, tmp_path / "policy-1.safetensors", largest_bytes=0)
    with pytest.raises(RunStopped, match="no score"):
        RayPending([fail.remote()], sent, "the regulariser").result()
    assert not sent.exists()


@pytest.mark.parametrize("failure", ["OutOfMemoryError", "NodeDiedError", "ObjectLostError"])
def test_any_other_death_is_told_like_one(ray, monkeypatch, failure):
    from bridle.training.ray_cluster import WorkerDied, result_of

    arguments = ("0" * 56, None, "") if failure == "ObjectLostError" else ("the node is gone",)

    def get(reference):
        raise getattr(ray.exceptions, failure)(*arguments)

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(WorkerDied, match=r"the process of the regulariser died \(.+\); --resume continues"):
        result_of(None, "the regulariser")


@FIRST_ROUNDS
def test_the_command_line_runs_both_roles(ray, bridle, recipe, tmp_path, first_round):
    options = ("--schedule", "parallel", "--parallel.first_round", first_round)
    code, _, err = bridle("train", recipe(), "--output_dir", tmp_path / "run", *options)
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [record for record in records if "round" in record]
    taken, other = rounds if first_round == "wait" else reversed(rounds)
    assert "rude/compliance" not in other
    assert taken["rude/rollouts"] == 32
    assert taken["seconds_waiting"] >= 0
    assert taken["rude/worker_seconds_sampling"] > 0
    assert (tmp_path / "run" / "model" / "README.md").exists()
    assert (tmp_path / "run" / "auxiliary" / "round-1" / "model.safetensors").exists()
    code, out, err = bridle("watch", tmp_path / "run")
    assert code == 0, err
    assert "round 2/2" in out


def test_a_killed_policy_is_named_and_its_regulariser_ends_with_it(ray, bridle, recipe, tmp_path):
    def kill_the_policy():
        wait_until((tmp_path / "run" / "metrics.jsonl").exists, seconds=60)
        (policy,) = processes("_policy")
        policy.kill()  # SIGKILL

    killer = threading.Thread(target=kill_the_policy)
    killer.start()
    path = recipe(max_steps=2000, rounds=3)
    code, _, err = bridle("train", path, "--output_dir", tmp_path / "run", "--schedule", "parallel")
    killer.join()
    assert code == 3
    assert "the process of the policy died" in err
    wait_until(lambda: not processes("RegulariserActor"), seconds=30)


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_the_cluster_cannot_give_is_refused(ray, tiny_folder, tmp_path):
    options = {**ROUNDS, "parallel": ParallelOptions(num_cpus=64)}
    trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E, weight=4.0)}, **options)
    with pytest.raises(UserError, match="64 CPU each, but the Ray cluster has 2"):
        trainer.train()


def test_what_is_in_use_is_waited_for_so_long(ray, tiny_folder, tmp_path):
    @ray.remote(num_cpus=2)
    class Busy:
        def stand(self):
            return True

    busy = Busy.remote()
    ray.get(busy.stand.remote())
    options = {**ROUNDS, "parallel": ParallelOptions(patience=1.0)}
    trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E, weight=4.0)}, **options)
    with pytest.raises(UserError, match="nothing free for the regulariser within 1 seconds"):
        trainer.train()
    ray.kill(busy)


def test_large_weights_pass_through_a_file(tmp_path):
    ray_worker = pytest.importorskip("bridle.training.ray_worker", reason="Ray is not installed", exc_type=UserError)
    policy = {"weight": torch.randn(300, 1000)}
    small = ray_worker.pack(policy, tmp_path / "p.safetensors", largest_bytes=2 * 2**20)
    assert small is policy
    large = ray_worker.pack(policy, tmp_path / "p.safetensors", largest_bytes=2**20)
    assert large == tmp_path / "p.safetensors"
    for _ in range(2):  # by several processes
        assert torch.equal(ray_worker.unpack(large)["weight"], policy["weight"])
    ray_worker.discard(large)
    assert not large.exists()


def test_a_state_is_the_same_after_a_checkpoint(tiny_folder, tmp_path):
    trainer = in_turns(trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E, anchor="previous")}, **ROUNDS))
    trainer.train()
    state = trainer.regularisers[0].state({"compliance": 0.5})
    state.save(tmp_path / "state")
    loaded = RegulariserState.load(tmp_path / "state")
    assert loaded.rollouts == state.rollouts
    assert (loaded.is_fitted, loaded.rollout_cursor) == (state.is_fitted, state.rollout_cursor)
    assert loaded.measured == {"compliance": 0.5}
    for weights_of in ("auxiliary", "anchor"):
        for name, weight in getattr(state, weights_of).items():
            assert torch.equal(getattr(loaded, weights_of)[name], weight)
    assert not [path for path in (tmp_path / "state").iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]
    assert json.loads((tmp_path / "state" / "state.json").read_text())["provenance"]["regulariser"] == "rude"


@pytest.mark.parametrize("save_steps", [100, 1])  # found out at the next round's beginning, or when it is waited for
def test_what_was_sampled_is_kept_when_the_worker_cannot_score_it(tiny_folder, tmp_path, save_steps):
    silent = Letters(["unused"], name="silent")
    silent._score = lambda texts: [None] * len(texts)
    options = {**ROUNDS, "save_strategy": "steps", "save_steps": save_steps}
    trainer = in_turns(trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(silent)}, **options))
    with pytest.raises(RunStopped, match=r"32 of 32 rollouts got no score"):
        trainer.train()
    assert len((tmp_path / "rollouts" / "round-1.rude.jsonl").read_text().splitlines()) == 32
    assert last_checkpoint(tmp_path) is None, "a checkpoint without R_1 would go on without it"
