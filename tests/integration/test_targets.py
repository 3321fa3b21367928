"""A target in place of a fixed λ: in both schedules, after a resume, for several regularisers, and at the end."""

import json
from itertools import pairwise

import pytest
import torch

from bridle.errors import RunStopped, UserError
from bridle.training.config import AuxiliaryOptions, ParallelOptions, Regulariser
from bridle.training.dual_ascent import TargetOptions
from bridle.training.steering import report_targets
from trainers import NO_E, SHARE_OF_E, Labels, LocalWorker, logged, trainer_of, weights

ROUNDS = {"rounds": 4, "max_steps": 8}
PARALLEL = {**ROUNDS, "schedule": "parallel"}


def held(constraint=NO_E, **target):
    return Regulariser(constraint, weight=4.0, target={"rate": 0.01, **target})


def made(folder, output, regularisers, **options):
    trainer = trainer_of(folder, output, regularisers, **{**ROUNDS, **options})
    if trainer.args.schedule == "parallel":
        trainer.schedule.worker = LocalWorker(trainer.regularisers)
    return trainer


@pytest.mark.parametrize("target", [{"rate": 0.01}, {"rate": None, "mean": 0.99}, {"rate": None, "base": 0.01}])
def test_lambda_rises_from_the_second_round_while_the_target_is_missed(tiny_folder, tmp_path, target):
    trainer = made(tiny_folder(), tmp_path, {"rude": held(**target)})
    trainer.train()
    found, violations = logged(trainer, "rude/lambda"), logged(trainer, "rude/violation")
    assert min(violations) > 0.04
    assert found == pytest.approx([4.0, 16.0, 64.0, 100.0])
    expected = 0.01 if "base" not in target else 0.01 * violations[0]
    assert logged(trainer, "rude/target") == pytest.approx([expected] * 5, rel=0.05)


def test_lambda_falls_where_there_is_room(tiny_folder, tmp_path):
    trainer = made(tiny_folder(), tmp_path, {"rude": held(rate=1.0)})
    trainer.train()
    found = logged(trainer, "rude/lambda")
    assert found[0] == 4.0
    assert found[1] > found[2] > found[3]
    assert not [warning for warnings in logged(trainer, "warnings") for warning in warnings if "target" in warning]
    assert logged(trainer, "rude/violation_reached")


def test_the_loss_has_the_steered_lambda(tiny_folder, tmp_path):
    trainer = made(tiny_folder(), tmp_path, {"rude": held()})
    begin, seen = trainer.schedule.begin_round, []

    def spied(index, log):
        begin(index, log)
        seen.append(trainer.regularisers[0].weight)

    trainer.schedule.begin_round = spied
    trainer.train()
    assert seen == logged(trainer, "rude/lambda")
    for record in trainer.state.log_history:
        if "loss" in record:
            weight = seen[(record["step"] - 1) // 2]
            assert record["loss"] == pytest.approx(record["ce"] + weight * record["kl/rude"], rel=1e-3)


@pytest.mark.parametrize("options", [ROUNDS, PARALLEL, {**PARALLEL, "parallel": ParallelOptions(first_round="train")}])
def test_a_resumed_run_steers_on_as_the_uninterrupted_one(tiny_folder, tmp_path, options):
    folder, options = tiny_folder(), {**options, "save_strategy": "steps", "save_steps": 1}
    regularisers = {"rude": held(rate=0.4, momentum=0.5)}
    whole = made(folder, tmp_path / "whole", regularisers, **options)
    whole.train()
    for step in (1, 2, 5, 6):
        again = made(folder, tmp_path / f"again-{step}", regularisers, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again.regularisers[0].dual == whole.regularisers[0].dual
        assert logged(again, "rude/lambda") == logged(whole, "rude/lambda")
        for name, weight in weights(whole).items():
            assert torch.equal(weights(again)[name], weight), (step, name)


@pytest.mark.parametrize(("first_round", "expected"), [("wait", [4, 4, 16, 64]), ("train", [4, 4, 16])])
def test_the_parallel_schedule_moves_lambda_once_it_has_acted(tiny_folder, tmp_path, first_round, expected):
    parallel = ParallelOptions(first_round=first_round)
    trainer = made(tiny_folder(), tmp_path, {"rude": held()}, **PARALLEL, parallel=parallel)
    trainer.train()
    assert logged(trainer, "rude/lambda") == pytest.approx(expected)


def test_several_regularisers_each_follow_their_own_target(tiny_folder, tmp_path):
    held_to = [
        Regulariser(NO_E, domain="rude", name="few", kl_on="rollouts", target={"rate": 0.01}),
        Regulariser(SHARE_OF_E, domain="rude", name="share", soft_labels=True, target={"mean": 0.1}),
        Regulariser(None, domain="plain", name="keep", weight=2.0),
    ]
    trainer = made(tiny_folder(), tmp_path, held_to)
    trainer.train()
    few, share, keep = (logged(trainer, f"{name}/lambda") for name in ("few", "share", "keep"))
    assert few[0] < few[-1]
    assert share[0] > share[-1]
    assert set(keep) == {2.0}
    assert not logged(trainer, "keep/target")


def test_rollouts_that_seek_violations_are_not_counted(tiny_folder, tmp_path):
    options = {"auxiliary": AuxiliaryOptions(epochs=2, batch_size=8, seek=0.5)}
    trainer = made(tiny_folder(), tmp_path, {"rude": held()}, **options)
    trainer.train()
    for record in trainer.state.log_history:
        if "round" in record:
            assert record["rude/violation"] == pytest.approx(1 - record["rude/compliance"])


LOSES = {"learning_rate": 0.05, "entropy_floor": 0.9, "save_strategy": "steps"}


class TestLostEntropy:
    def test_it_lowers_lambda_and_the_run_goes_on(self, tiny_folder, tmp_path):
        folder, regularisers = tiny_folder(), {"rude": held(least=0.5)}
        trainer = made(folder, tmp_path / "whole", regularisers, **LOSES)
        trainer.train()
        assert trainer.state.global_step == 8
        entropies, found = logged(trainer, "rude/entropy_sampled"), logged(trainer, "rude/lambda")
        lost = next(i for i, entropy in enumerate(entropies) if entropy < 0.9 * entropies[0])
        assert found[lost] == max(0.5, found[lost - 1] / 2)
        assert max(found[lost:]) == found[lost]
        texts = [text for texts in logged(trainer, "warnings") for text in texts]
        said = f"round {lost + 1}: the entropy of the policy's samples for rude fell from {entropies[0]:.2f} to "
        ends = f"below entropy_floor 0.9; from now on λ is at most {found[lost]:g}"
        assert any(text.startswith(said) and text.endswith(ends) for text in texts)
        assert any("target is missed" in text and "their entropy: take more rounds" in text for text in texts)
        assert any(text.startswith("at the end the entropy of the policy's samples for rude fell") for text in texts)

        again = made(folder, tmp_path / "again", regularisers, **LOSES)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
        assert logged(again, "rude/lambda") == found
        assert again.regularisers[0].dual == trainer.regularisers[0].dual

    def test_in_the_parallel_schedule_a_lower_lambda_acts_before_the_next(self, tiny_folder, tmp_path):
        options = {**LOSES, "rounds": 6, "max_steps": 12, "schedule": "parallel", "entropy_floor": 0.95}
        trainer = made(tiny_folder(), tmp_path, {"rude": held(least=0.01)}, **options)
        trainer.train()
        texts = [text for texts in logged(trainer, "warnings") for text in texts if "from now on λ is at most" in text]
        rounds = [int(text.split()[1].rstrip(":")) for text in texts]
        assert len(rounds) > 1
        assert all(later - earlier > 1 for earlier, later in pairwise(rounds))

    def test_where_lambda_is_at_its_lower_bound_the_run_stops(self, tiny_folder, tmp_path):
        trainer = made(tiny_folder(), tmp_path, {"rude": held(least=4.0, most=4.0)}, **LOSES)
        with pytest.raises(RunStopped, match=r"below entropy_floor 0\.9; try a smaller regulariser weight"):
            trainer.train()


class TestTheEnd:
    def of(self, trainer):
        """The warning that a target is missed."""
        (found,) = [text for texts in logged(trainer, "warnings") for text in texts if "target is missed" in text]
        return found

    def test_a_missed_target_is_reported_with_its_cause(self, tiny_folder, tmp_path):
        trainer = made(tiny_folder(), tmp_path, {"rude": held(most=5.0)})
        trainer.train()
        warning = self.of(trainer)
        assert "of 32 samples violate (95% interval" in warning
        assert "more than 1%. λ is at its bound, target.most 5: raise it" in warning
        (reached,), (low,) = logged(trainer, "rude/violation_reached"), logged(trainer, "rude/violation_reached_low")
        assert 0.01 < low < reached

    def test_a_confidence_asks_for_a_bound(self, tiny_folder, tmp_path):
        """Some of the samples may violate where the target is missed, and all may where it is met."""
        trainer = made(tiny_folder(), tmp_path, {"rude": held(rate=0.999, confidence=0.9)})
        trainer.train()
        (reached,), (bound,) = logged(trainer, "rude/violation_reached"), logged(trainer, "rude/violation_bound")
        assert reached < bound <= 0.999
        assert not [text for texts in logged(trainer, "warnings") for text in texts if "target" in text]

        (regulariser,), between = trainer.regularisers, (reached + bound) / 2
        regulariser.options.target = TargetOptions(rate=between, confidence=0.9)
        report_targets([regulariser], trainer.supervisor, [])
        assert logged(trainer, "rude/violation_bound") == [bound] * 2
        assert "does not show at most" in self.of(trainer)

    def test_a_sample_without_a_score_may_violate(self, tiny_folder, tmp_path, monkeypatch):
        """The bound counts it as a violation; the rate leaves it out, and says how many it leaves out."""
        trainer = made(tiny_folder(), tmp_path, {"rude": held(rate=0.999, confidence=0.9)})
        trainer.train()
        (regulariser,) = trainer.regularisers
        score = regulariser.constraint._score
        monkeypatch.setattr(regulariser.constraint, "_score", lambda texts: [None, None, *score(texts)[2:]])
        report_targets([regulariser], trainer.supervisor, [])
        assert logged(trainer, "rude/violation_missing") == [0, 2]
        rate, bound = logged(trainer, "rude/violation_reached")[-1], logged(trainer, "rude/violation_bound")[-1]
        assert bound == regulariser.options.target.bound(round(30 * rate) + 2, 32)
        assert not [text for texts in logged(trainer, "warnings") for text in texts if "got no score" in text]
        monkeypatch.setattr(regulariser.constraint, "_score", lambda texts: [None] * 31 + [1.0])
        report_targets([regulariser], trainer.supervisor, [])
        assert logged(trainer, "rude/violation_reached")[-1] == 0
        assert "rude: 31 of the last 32 samples got no score; the rate is of the others" in (
            text for texts in logged(trainer, "warnings") for text in texts
        )

    def test_rollouts_that_cannot_show_it_are_refused(self, tiny_folder, tmp_path):
        with pytest.raises(UserError, match=r"rollouts_per_round: 32 cannot show .*target.*at least 299"):
            made(tiny_folder(), tmp_path, {"rude": held(confidence=0.95)})

    def test_too_few_rollouts_for_lambda_to_fall_are_warned_of(self, tiny_folder, tmp_path, caplog):
        made(tiny_folder(), tmp_path, {"rude": held(rate=0.001)}, rollouts_per_round=300)
        said = "300 are too few for regularisers.rude.target, at most 0.001: λ can rise, but not fall; set at least 555"
        assert said in caplog.text
        caplog.clear()
        made(tiny_folder(), tmp_path, {"rude": held(rate=0.001)}, rollouts_per_round=555)
        assert "too few" not in caplog.text

    def test_rollouts_that_seek_violations_do_not_count(self, tiny_folder, tmp_path, caplog):
        options = {"rollouts_per_round": 600, "auxiliary": AuxiliaryOptions(seek=0.5)}
        made(tiny_folder(), tmp_path, {"rude": held(rate=0.001)}, **options)
        said = "600, of which 300 seek violations, are too few for regularisers.rude.target, at most 0.001"
        assert f"{said}: λ can rise, but not fall; set at least 1109" in caplog.text

    def test_a_lambda_that_still_rises_asks_for_more(self, tiny_folder, tmp_path):
        trainer = made(tiny_folder(), tmp_path, {"rude": held(most=1e6)})
        trainer.train()
        assert "λ was still rising, to 256 after 3 steps" in self.of(trainer)
        skills = [skill for skill in logged(trainer, "rude/r_skill") if skill is not None]
        knows_little = bool(skills) and skills[-1] < 0.05
        assert ("R predicts labels hardly better than a constant" in self.of(trainer)) == knows_little

    def test_a_mean_is_reported_as_one(self, tiny_folder, tmp_path):
        trainer = made(tiny_folder(), tmp_path, {"rude": held(SHARE_OF_E, rate=None, mean=0.999)})
        trainer.train()
        assert "the mean score of 32 samples is 0." in self.of(trainer)
        assert ", below 0.999" in self.of(trainer)
        (reached,), (score,) = logged(trainer, "rude/violation_reached"), logged(trainer, "rude/mean_score_reached")
        assert score == pytest.approx(1 - reached)

    def test_where_every_label_was_alike_nothing_acted(self, tiny_folder, tmp_path):
        constraint = Labels()
        constraint._score = lambda texts: [0.0] * len(texts)
        trainer = made(tiny_folder(), tmp_path, {"rude": held(constraint)})
        trainer.train()
        assert logged(trainer, "rude/lambda") == [4.0] * 4
        assert "The KL never acted, since every label was alike" in self.of(trainer)

    def test_the_command_line_keeps_a_whole_model(self, bridle, recipe, tmp_path):
        options = ("--rounds", 3, "--regularisers.rude.target", "{rate: 0.001}")
        code, _, err = bridle("train", recipe(), "--output_dir", tmp_path / "run", *options)
        assert code == 0, err
        assert "trained model  rude: violation 0." in err
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()
        assert "target rate: 0.001" in (tmp_path / "run" / "model" / "README.md").read_text()
        *_, last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert last["rude/target"] == 0.001
        assert last["warnings"][0].startswith("rude: the target is missed: ")


@pytest.mark.parametrize(
    ("options", "needed"),
    [({}, 2), ({"schedule": "parallel"}, 3), ({"schedule": "parallel", "parallel": {"first_round": "train"}}, 4)],
)
def test_too_few_rounds_to_steer_are_refused(tiny_folder, tmp_path, options, needed):
    if "parallel" in options:
        options = {**options, "parallel": ParallelOptions(**options["parallel"])}
    with pytest.raises(UserError, match=rf"rounds: {needed - 1} leave .*target as it begins; set at least {needed}"):
        trainer_of(tiny_folder(), tmp_path, {"rude": held()}, rounds=needed - 1, **options)
