"""Training that goes wrong, in real trainers of tiny models: what is skipped, what stops, what is reported."""

import json
import math

import pytest
import torch
from transformers import TrainerCallback

from bridle.errors import RunStopped
from bridle.recipes.metrics import MetricsFile
from bridle.training import engine
from bridle.training.checkpointing import last_checkpoint
from bridle.training.config import AuxiliaryOptions, Regulariser
from trainers import NO_E, Letters, LocalWorker, logged, spoil_loss, trainer_of, weights

EIGHT = {"max_steps": 8, "rounds": 2}
IN_TURNS = {"max_steps": 8, "rounds": 4, "schedule": "parallel"}


def make(tiny_folder, output, constraint=NO_E, **options):
    trainer = trainer_of(tiny_folder(), output, {"rude": Regulariser(constraint, kl_on="both")}, **EIGHT | options)
    trainer.add_callback(MetricsFile(output / "metrics.jsonl"))
    if options.get("schedule") == "parallel":
        trainer.schedule.worker = LocalWorker(trainer.regularisers)
    return trainer


def spoil_gradient(trainer, updates):
    """Makes the gradient of one weight matrix NaN in these updates; the loss stays as it is."""
    spoilt = lambda gradient: gradient * math.nan if trainer.state.global_step + 1 in updates else gradient  # noqa: E731
    next(weight for weight in trainer.model.parameters() if weight.requires_grad).register_hook(spoilt)


class Watch(TrainerCallback):
    """Keeps the weights after every update."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))


class DieBefore(TrainerCallback):
    """Ends a run before an update, as if the machine had."""

    def __init__(self, update):
        self.update = update

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.update:
            raise KeyboardInterrupt


class Pretend(TrainerCallback):
    """From the first update on, as if DeepSpeed's engine trained."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.is_deepspeed_enabled = True


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def told(output):
    return [warning for record in records(output) for warning in record.get("warnings", [])]


class TestSkippedUpdates:
    @pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
    @pytest.mark.parametrize(
        "options", [{}, IN_TURNS, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}]
    )
    def test_nothing_moves_and_the_run_goes_on(self, tiny_folder, tmp_path, caplog, spoil, options):
        trainer, watch = make(tiny_folder, tmp_path, **options), Watch()
        spoil(trainer, {4, 6})
        trainer.add_callback(watch)
        trainer.train()
        moved = [not torch.equal(*pair) for pair in zip(watch.weights, watch.weights[1:], strict=False)]
        assert moved == [True, True, False, True, False, True, True]
        assert watch.weights[-1].isfinite().all()
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {6}
        assert [(r["step"], r["skipped_in_a_row"]) for r in records(tmp_path) if "skipped_in_a_row" in r] == [
            (4, 1),
            (6, 1),
        ]
        assert caplog.text.count("was skipped: its loss or gradient was not finite") == 2

    def test_deepspeed_has_made_the_update_already(self, tiny_folder, tmp_path):
        trainer = make(tiny_folder, tmp_path)
        spoil_gradient(trainer, {3})
        trainer.add_callback(Pretend(trainer))
        with pytest.raises(RunStopped, match="update 3 is not finite, and DeepSpeed has made it already"):
            trainer.train()

    @pytest.mark.parametrize("logging_steps", [1, 2])
    def test_a_loss_that_is_not_finite_is_missing(self, tiny_folder, tmp_path, logging_steps):
        trainer = make(tiny_folder, tmp_path, logging_steps=logging_steps)
        spoil_loss(trainer, {2})
        trainer.train()
        steps = {record["step"]: record for record in records(tmp_path) if "loss" in record}
        assert steps[2]["loss"] is None
        assert steps[2]["kl/rude"] is None
        assert all(record["loss"] > 0 for step, record in steps.items() if step != 2)
        assert all(record["ce"] > 0 for record in steps.values())
        assert [record["kl/rude"] > 0 for record in records(tmp_path) if "round" in record] == [True, True]

    def test_too_many_in_a_row_stop_the_run_and_it_resumes(self, tiny_folder, tmp_path):
        """Both ends are those of a run that bears with the same skipped updates."""
        bearing = make(tiny_folder, tmp_path / "bearing")
        spoil_loss(bearing, {3, 4})
        bearing.train()
        stopping = make(tiny_folder, tmp_path / "stopping", max_skipped_steps=1)
        spoil_loss(stopping, {3, 4})
        with pytest.raises(RunStopped, match=r"2 in a row.*max_skipped_steps is 1; the last checkpoint is kept"):
            stopping.train()
        assert told(tmp_path / "stopping")[-1].endswith("max_skipped_steps is 1")
        checkpoint = last_checkpoint(tmp_path / "stopping")
        assert checkpoint.name == "checkpoint-4"
        resumed = make(tiny_folder, tmp_path / "stopping", max_skipped_steps=1)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == 8
        for name, weight in weights(bearing).items():
            assert torch.equal(weights(resumed)[name], weight), name

    def test_a_resumed_run_counts_on(self, tiny_folder, tmp_path):
        options = {"max_skipped_steps": 2, "save_strategy": "steps", "save_steps": 3}
        died = make(tiny_folder, tmp_path, **options)
        spoil_loss(died, {2, 3, 4})
        died.add_callback(DieBefore(4))
        with pytest.raises(KeyboardInterrupt):
            died.train()
        resumed = make(tiny_folder, tmp_path, **options)
        spoil_loss(resumed, {2, 3, 4})
        with pytest.raises(RunStopped, match=r"update 4 was skipped.*3 in a row"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert [r["skipped_in_a_row"] for r in records(tmp_path) if "skipped_in_a_row" in r] == [1, 2, 3]


def test_the_entropy_of_its_own_samples_stops_a_run_also_a_resumed_one(tiny_folder, tmp_path):
    options = {"rounds": 4, "max_steps": 8, "save_strategy": "steps", "learning_rate": 0.05}
    whole = make(tiny_folder, tmp_path, **options, entropy_floor=0.0)
    whole.train()
    entropy = logged(whole, "rude/entropy_sampled")
    drawn = [p for rollout in whole.regularisers[0].rollouts for p in rollout.log_probs]
    assert entropy[-1] == pytest.approx(-sum(drawn) / len(drawn))
    assert math.log(len(whole.processing_class)) > entropy[0] > entropy[2] > 0
    since_the_start, since_the_resume = min(entropy[2:]) / entropy[0], min(entropy[2:]) / max(entropy[1:])
    assert since_the_start < since_the_resume
    resumed = make(tiny_folder, tmp_path, **options, entropy_floor=(since_the_start + since_the_resume) / 2)
    with pytest.raises(RunStopped, match=f"samples for rude fell from {entropy[0]:.2f} "):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_plain_fine_tuning_is_not_stopped_for_its_entropy(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder(), tmp_path, {}, learning_rate=0.1, max_steps=8, entropy_floor=0.99)
    trainer.train()
    assert min(logged(trainer, "entropy")) < 0.99 * logged(trainer, "entropy")[0]


def test_a_broken_model_is_not_sampled_from(tiny_folder, tmp_path):
    trainer = make(tiny_folder, tmp_path)
    trainer.model.lm_head.weight.data[5] = math.nan
    with pytest.raises(RunStopped, match="the model's probabilities are not finite"):
        trainer.train()


class Worsening(Letters):
    """Calls nearly all of the first texts complying, and nearly none of those it is asked about later."""

    asked = 0

    def _score(self, texts):
        self.asked += 1
        few, most = (0.0, 1.0) if self.asked == 1 else (1.0, 0.0)
        return [few if index % 16 == 0 else most for index in range(len(texts))]


class TestRounds:
    @pytest.mark.parametrize("options", [EIGHT, IN_TURNS])
    def test_warnings_are_told_once_and_recorded(self, tiny_folder, tmp_path, caplog, options):
        shape = AuxiliaryOptions(epochs=1, batch_size=8, validation_share=0.7)
        bounds = {"calibration_bound": 0.0, "empty_bound": 0.0}
        trainer = make(tiny_folder, tmp_path, Worsening(["unused"]), auxiliary=shape, **bounds, **options)
        trainer.train()
        rounds = [record for record in records(tmp_path) if "rude/compliance" in record]
        for number, record in enumerate(rounds, start=1):
            said = " ".join(record["warnings"])
            assert said.count("calibration error") == 1
            assert said.count("violations rose") == (number > 1)
            assert said.count("say nothing") == (record["rude/rollouts_empty"] > 0)
            assert f"round {number}, rude: " in said
        assert [caplog.text.count(warning) for warning in told(tmp_path)] == [1] * len(told(tmp_path))
        assert len(rounds) > 1

    def test_a_resumed_run_knows_its_earlier_rounds_and_says_nothing_twice(self, tiny_folder, tmp_path, caplog):
        options = {"save_strategy": "steps", "save_steps": 2}
        died = make(tiny_folder, tmp_path, Worsening(["unused"]), **options)
        died.add_callback(DieBefore(5))
        with pytest.raises(KeyboardInterrupt):
            died.train()
        caplog.clear()
        later = Worsening(["unused"])
        later.asked = 1
        again = make(tiny_folder, tmp_path, later, **options)
        again.add_callback(DieBefore(8))
        with pytest.raises(KeyboardInterrupt):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert caplog.text.count("violations rose from 6.2% to 93.8%") == 1
        make(tiny_folder, tmp_path, later, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert caplog.text.count("violations rose") == 1
        assert len([warning for warning in told(tmp_path) if "violations rose" in warning]) == 1

    def test_rollouts_that_say_nothing(self, tiny_folder, tmp_path, monkeypatch):
        trainer = make(tiny_folder, tmp_path)
        silence = [trainer.processing_class.eos_token_id]
        sample = engine.sample
        monkeypatch.setattr(engine, "sample", lambda *a, **k: [silence] * 8 + sample(*a, **k)[8:])
        trainer.train()
        assert min(logged(trainer, "rude/rollouts_empty")) >= 8
        assert [
            f"{n} of 32 rollouts say nothing" in " ".join(told(tmp_path))
            for n in logged(trainer, "rude/rollouts_empty")
        ] == [True, True]

    @pytest.mark.parametrize("spoilt", [1, 1000])
    def test_a_step_of_the_fit_that_is_not_finite_is_skipped(self, tiny_folder, tmp_path, spoilt):
        trainer = make(tiny_folder, tmp_path, rounds=1)
        auxiliary, left = trainer.regularisers[0].auxiliary, iter(range(spoilt))
        fresh = {name: weight.clone() for name, weight in auxiliary.state_dict().items()}
        for weight in list(auxiliary.parameters())[:1]:
            weight.register_hook(lambda gradient: gradient if next(left, None) is None else gradient * math.nan)
        trainer.train()
        (record,) = [record for record in records(tmp_path) if "round" in record]
        steps = 2 * 4  # epochs of 29 rollouts, 8 a step
        assert record["rude/r_steps_skipped"] == min(spoilt, steps)
        assert f"{min(spoilt, steps)} steps of R's fit were skipped" in record["warnings"][0]
        assert (record["rude/r_bce"] is None) == (spoilt > steps)
        assert all(weight.isfinite().all() for weight in auxiliary.state_dict().values())
        fitted = {
            name: weight for name, weight in auxiliary.state_dict().items() if name != "value.bias"
        }  # shifted before
        same = [torch.equal(weight, fresh[name]) for name, weight in fitted.items()]
        assert all(same) == (spoilt > steps)
