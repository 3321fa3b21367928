"""Targets made ahead of the updates: the same training, at no forward but the policy's own."""

import pyarrow as pa
import pytest
import torch
from test_training import NO_E, logged, trainer_of, weights

from bridle.errors import UserError
from bridle.models.loading import LoraOptions
from bridle.training.config import ParallelOptions, Regulariser
from bridle.training.regulariser import DomainRegulariser
from bridle.training.schedule import SequentialSchedule
from trainers import LocalWorker, config

# 80 rows of two domains in batches of 8: ten updates an epoch.
SHIPPED = {"targets": "precomputed", "max_steps": 8, "rounds": 2, "prompt_tokens": (2, 3), "max_new_tokens": 5}
WHOLE_VOCABULARY = 10_000


@pytest.fixture
def calls(monkeypatch):
    """How many batches a target was built for, by when: ahead, or in the update."""
    counted = {"ahead": 0, "update": 0}
    build, look = DomainRegulariser.frozen_target, DomainRegulariser.target
    inside = []

    def frozen_target(self, *args):
        counted["update" if inside else "ahead"] += 1
        return build(self, *args)

    def target(self, *args):
        inside.append(True)
        try:
            return look(self, *args)
        finally:
            inside.pop()

    monkeypatch.setattr(DomainRegulariser, "frozen_target", frozen_target)
    monkeypatch.setattr(DomainRegulariser, "target", target)
    return counted


def regularisers(anchor="previous", on="both"):
    return {"rude": Regulariser(NO_E, weight=2.0, anchor=anchor, kl_on=on)}


def trained(folder, output, schedule="sequential", **options):
    held = options.pop("regularisers", None) or regularisers()
    trainer = trainer_of(folder, output, held, schedule=schedule, **options)
    if schedule == "parallel":
        trainer.schedule.worker = LocalWorker(trainer.regularisers)
    trainer.train()
    return trainer


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
@pytest.mark.parametrize("anchor", ["previous", "initial"])
def test_with_every_token_kept_it_is_the_same_training(tiny_folder, tmp_path, calls, monkeypatch, schedule, anchor):
    # Targets are kept in float16, whose rounding grows with the updates: here in float32, so that all else agrees.
    monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.float)
    monkeypatch.setattr(pa, "float16", pa.float32)
    options = {**SHIPPED, "target_tokens": WHOLE_VOCABULARY, "regularisers": regularisers(anchor)}
    shipped = trained(tiny_folder(), tmp_path / "shipped", schedule, **options)
    assert calls["ahead"] > 0
    assert calls["update"] == 0, "the update ran the anchor"
    computed = trained(tiny_folder(), tmp_path / "computed", schedule, **{**options, "targets": "computed"})
    assert calls["update"] > 0
    assert logged(shipped, "loss") == pytest.approx(logged(computed, "loss"), abs=1e-5)


def test_what_is_kept_decides_how_near_it_comes(tiny_folder, tmp_path):
    folder = tiny_folder()
    (exact, *_), *sparse = (
        logged(trained(folder, tmp_path / str(k), **{**SHIPPED, **options}), "kl/rude")
        for k, options in (
            (k, {"targets": targets, "target_tokens": k, "max_steps": 2, "rounds": 1})
            for targets, k in (
                ("computed", 1),
                ("precomputed", 2),
                ("precomputed", 20),
                ("precomputed", WHOLE_VOCABULARY),
            )
        )
    )
    values = [first for first, *_ in sparse]
    assert values == sorted(values), "fewer tokens make the bound looser"
    assert values[0] < 0.9 * exact
    assert values[-1] == pytest.approx(exact, rel=0.02)


def test_a_row_that_comes_in_several_epochs_is_worked_on_once(tiny_folder, tmp_path, calls):
    trained(
        tiny_folder(),
        tmp_path / "one",
        **{**SHIPPED, "max_steps": 10, "rounds": 1},
        regularisers=regularisers(on="corpus"),
    )
    once = calls["ahead"]
    trained(
        tiny_folder(),
        tmp_path / "three",
        **{**SHIPPED, "max_steps": 30, "rounds": 1},
        regularisers=regularisers(on="corpus"),
    )
    assert calls == {"ahead": 2 * once, "update": 0}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_order_is_foreseen_over_epochs_and_accumulation(tiny_folder, tmp_path, calls, accumulation):
    options = {**SHIPPED, "max_steps": 9, "rounds": 3, "gradient_accumulation_steps": accumulation}
    trained(tiny_folder(), tmp_path, **options)
    assert calls["update"] == 0
    assert calls["ahead"] > 0


@pytest.mark.parametrize(
    ("schedule", "first_round"), [("sequential", "train"), ("parallel", "train"), ("parallel", "wait")]
)
def test_a_resumed_run_makes_its_targets_again_and_ends_alike(tiny_folder, tmp_path, calls, schedule, first_round):
    folder = tiny_folder()
    options = {**SHIPPED, "rounds": 4, "save_strategy": "steps", "save_steps": 3}
    options["parallel"] = ParallelOptions(first_round=first_round)
    whole = trained(folder, tmp_path / "whole", schedule, **options)
    for step in (3, 4, 6):
        again = trainer_of(folder, tmp_path / str(step), regularisers(), schedule=schedule, **options)
        if schedule == "parallel":
            again.schedule.worker = LocalWorker(again.regularisers)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, weight in weights(whole).items():
            assert torch.equal(weights(again)[name], weight), (step, name)
    assert calls["update"] == 0


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_large_targets_are_mapped_from_a_file_that_goes_in_time(tiny_folder, tmp_path, monkeypatch, schedule):
    folder, losses, files = tiny_folder(), [], []

    def target(self, *args, plain=DomainRegulariser.target):
        files.append({path.name for path in tmp_path.glob("0.0/targets/*")})
        return plain(self, *args)

    monkeypatch.setattr(DomainRegulariser, "target", target)
    for size in (512.0, 0.0):
        files.clear()
        options = {**SHIPPED, "rounds": 4, "parallel": ParallelOptions(largest_message=size)}
        losses.append(logged(trained(folder, tmp_path / str(size), schedule, **options), "loss"))
    assert losses[0] == losses[1]
    assert any("round-2.rude.0.arrow" in names for names in files)
    assert max(len(names) for names in files) == 1
    assert not list(tmp_path.glob("0.0/targets/*"))


def test_retention_is_shipped_too(tiny_folder, tmp_path, calls):
    held = {"plain": Regulariser(weight=2.0), **regularisers()}
    trainer = trained(tiny_folder(), tmp_path, **SHIPPED, regularisers=held)
    assert calls["update"] == 0
    assert all(value > 0 for value in logged(trainer, "kl/plain")[1:])


def test_a_live_anchor_and_an_unknown_order_are_refused(tiny_folder, tmp_path):
    folder = tiny_folder()
    with pytest.raises(UserError, match=r"regularisers\.rude\.anchor: .* set anchor: previous or initial"):
        trainer_of(folder, tmp_path, regularisers("live"), **SHIPPED)
    with pytest.raises(UserError, match="target_tokens: must be at least 1"):
        trainer_of(folder, tmp_path, regularisers(), **SHIPPED, target_tokens=0)
    by_length = trainer_of(folder, tmp_path, regularisers(), **SHIPPED, train_sampling_strategy="group_by_length")
    with pytest.raises(UserError, match="needs to know the order of the corpus beforehand"):
        by_length.train()


class TestKeptForOtherRuns:
    """`target_cache`: what retention needs of a row is built once for a model and k."""

    @pytest.fixture
    def run(self, tiny_folder, tmp_path, calls):
        folder = tiny_folder()

        def make(name, model=folder, keep=True, **options):
            calls["ahead"] = 0
            cache = {"target_cache": str(tmp_path / "cache")} if keep else {}
            held = {"plain": Regulariser(weight=2.0), "rude": Regulariser(NO_E, weight=2.0)}
            options = {**SHIPPED, **cache, "regularisers": held, "learn": {"plain": False}, **options}
            return trained(model, tmp_path / name, **options), calls["ahead"]

        return make

    def test_another_run_builds_none(self, run):
        whole = {"max_length": 60}  # so that no two rows are alike
        without, built = run("without", keep=False, max_steps=2, **whole)
        first, built_first = run("first", max_steps=2, **whole)
        second, built_second = run("second", max_steps=2, **whole)
        assert built == built_first > 0 == built_second
        for trainer in (first, second):
            for name, weight in weights(without).items():
                assert torch.equal(weights(trainer)[name], weight), name
        longer, more = run("longer", max_steps=4, **whole)
        assert 0 < more <= built, "what the longer run has besides"
        assert logged(longer, "kl/plain")

    def test_another_model_or_k_has_its_own(self, run, tiny_folder, tmp_path):
        _, built = run("first")
        other = tiny_folder("gpt2")
        assert run("k", target_tokens=64)[1] == built
        assert run("model", model=other)[1] == built
        assert len(list((tmp_path / "cache").iterdir())) == 3
        assert run("adapters", lora=LoraOptions(r=2), seed=0)[1] == 0, "they have not moved yet"

    def test_the_same_weights_in_another_configuration_have_their_own(self, run, tiny_folder):
        _, built = run("first")
        tiny_folder(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})  # in the same folder
        assert run("scaled")[1] == built

    def test_beside_a_live_anchor_it_is_the_same_training(self, run):
        shipped, _ = run("shipped", target_tokens=WHOLE_VOCABULARY, max_steps=4)
        computed, built = run("computed", keep=False, targets="computed", max_steps=4)
        assert built == 0
        for key in ("loss", "kl/rude"):
            assert logged(shipped, key)[0] == pytest.approx(logged(computed, key)[0], rel=1e-5)
        # As the policy leaves p_0, the rounding of a KL that is almost 0 to float16 is a step of Adam's.
        assert logged(shipped, "loss") == pytest.approx(logged(computed, "loss"), abs=0.02)

    def test_it_needs_targets_that_are_precomputed(self, tmp_path):
        with pytest.raises(UserError, match="target_cache: keeps precomputed targets; set targets: precomputed"):
            config(tmp_path, target_cache="cache")

    @pytest.mark.parametrize("kl_on", ["rollouts", "both"])
    def test_without_anything_to_keep_it_is_refused(self, tiny_folder, tmp_path, kl_on):
        held = {"plain": Regulariser(None, kl_on=kl_on), "rude": Regulariser(NO_E, anchor="previous")}
        with pytest.raises(UserError, match="target_cache: keeps the targets of retention with kl_on: corpus"):
            trainer_of(tiny_folder(), tmp_path, held, targets="precomputed", target_cache="cache")


def test_the_time_of_targets_that_are_built_again_adds_up():
    """As after a resume within a round, whose record is read back."""
    schedule = SequentialSchedule([], None, None)
    schedule._record = {"seconds_targets": 2.0}
    schedule.add_seconds("targets", 3.0)
    assert schedule._record == {"seconds_targets": 5.0}
    assert schedule._policy_began == 3.0
