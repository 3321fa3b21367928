"""A share of the outputs: the tilt, its target on a world that can be enumerated, and a run."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import exp, log

import pytest
import torch
from datasets import Dataset
from test_exactness import SAMPLES, fitted_r_logits, ideal_rollouts, world_of
from transformers import TrainerCallback

from bridle.data import Rollout
from bridle.errors import UserError
from bridle.models.auxiliary import new_auxiliary
from bridle.training.config import AuxiliaryOptions, Regulariser
from bridle.training.examples import encode
from bridle.training.fitting import fit_auxiliary
from bridle.training.measures import measure_calibration
from bridle.training.shares import ShareOptions, degree, tilt_of
from conftest import SENTENCES
from trainers import NO_E, Labels, logged, trainer_of, weights


def rollouts(complying, others, sought=0, missing=0):
    known = {"prompt_ids": [1], "completion_ids": [2], "prompt": "", "completion": "", "round": 1, "regulariser": "all",
             "model_hash": "", "constraint": ""}  # fmt: skip
    labels = [True] * complying + [False] * others
    return (
        [Rollout(**known, complies=label, value=float(label)) for label in labels]
        + [Rollout(**known, complies=True, value=1.0, sought=1) for _ in range(sought)]
        + [Rollout(**known) for _ in range(missing)]
    )


class TestTilt:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [({"at_least": 0.5}, 0.5), ({"at_most": 0.1}, 0.1), ({"at_least": 0.4, "at_most": 0.6}, 0.4)],
    )
    def test_it_moves_the_share_to_the_nearest_that_is_allowed(self, options, expected):
        """Of outputs with weights exp(w·φ), as many comply as the range's nearest end says."""
        drawn = rollouts(200, 800)
        tilt = tilt_of(ShareOptions(**options), drawn)
        weights = Counter()
        for rollout in drawn:
            weights[rollout.complies] += degree(tilt, rollout.complies)
        assert weights[True] / weights.total() == pytest.approx(expected, abs=2e-3)
        assert max(degree(tilt, True), degree(tilt, False)) == 1
        assert degree(tilt, True) / degree(tilt, False) == pytest.approx(exp(tilt))

    def test_within_the_range_nothing_is_tilted(self):
        assert tilt_of(ShareOptions(at_least=0.1, at_most=0.3), rollouts(200, 800)) == 0.0

    def test_only_plain_rollouts_with_a_score_count(self):
        options = ShareOptions(at_least=0.5)
        assert tilt_of(options, rollouts(20, 80, sought=50, missing=50)) == tilt_of(options, rollouts(20, 80))

    @pytest.mark.parametrize("complying", [0, 100])
    def test_it_is_finite_where_all_are_alike(self, complying):
        weight = tilt_of(ShareOptions(at_least=0.4, at_most=0.6), rollouts(complying, 100 - complying))
        assert abs(weight) < log(201 * 1.5) + 1

    def test_where_no_output_has_a_score_the_tilt_stays(self):
        unscored = rollouts(0, 0, sought=4, missing=4)
        assert tilt_of(ShareOptions(at_least=0.9), unscored) == 0.0
        assert tilt_of(ShareOptions(at_least=0.9), unscored, 1.5) == 1.5

    def test_without_a_share_there_is_none(self):
        assert tilt_of(None, rollouts(1, 1)) is None


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_q_has_the_share_on_a_world_that_can_be_enumerated(tiny_model, share):
    """To 0.02, with a fitted R; and among the complying outputs q is p, as with the closest distribution."""
    world = world_of(tiny_model, lambda y: float((0, 3) in pairwise(y) or y[0] == 4))
    drawn = ideal_rollouts(world, SAMPLES)
    before = sum(world.output_probability(y) * world.constraint(y) for y in world.outputs())
    assert before < 0.29
    tilt = tilt_of(ShareOptions(at_least=share), drawn)
    torch.manual_seed(0)
    auxiliary = new_auxiliary(world.model, depth=2, expansion=4)
    with torch.no_grad():
        examples = encode(world.model, drawn, 0, label=lambda one: degree(tilt, one.complies))
    options = AuxiliaryOptions(epochs=60, batch_size=512, learning_rate=6e-3, weight_decay=0.0,
                               consistency_weight=0.1, validation_share=0.0)  # fmt: skip
    fit_auxiliary(auxiliary, examples, options, torch.Generator().manual_seed(0))
    q = {}
    for output in world.outputs():
        q[output] = 1.0
        for position, token in enumerate(output):
            step = world.next_token(output[:position]) * fitted_r_logits(world, auxiliary, output[:position]).sigmoid()
            q[output] *= float(step[token] / step.sum())
    assert sum(q.values()) == pytest.approx(1)
    assert sum(q[y] * world.constraint(y) for y in q) == pytest.approx(share, abs=0.02)
    for kind in (0.0, 1.0):
        of_kind = [y for y in q if world.constraint(y) == kind]
        total = sum(q[y] for y in of_kind), sum(world.output_probability(y) for y in of_kind)
        assert sum(abs(q[y] / total[0] - world.output_probability(y) / total[1]) for y in of_kind) / 2 < 0.05


RUN = {
    "rounds": 4,
    "max_steps": 24,
    "learning_rate": 5e-3,
    "rollouts_per_round": 256,
    "auxiliary": AuxiliaryOptions(epochs=10, batch_size=32, learning_rate=5e-3),
    "entropy_floor": 0.0,  # the corpus alone takes most of a random model's
}


@pytest.mark.parametrize("options", [{"at_least": 0.9}, {"at_most": 0.25}])
def test_a_run_moves_the_share(tiny_folder, tmp_path, options):
    held = Regulariser(NO_E, kl_on="rollouts", weight=40.0, share=dict(options))
    trainer = trainer_of(tiny_folder(), tmp_path, {"rude": held}, **RUN)
    trainer.train()
    shares, tilts = logged(trainer, "rude/compliance"), logged(trainer, "rude/tilt")
    rises = "at_least" in options
    assert (tilts[0] > 0) == rises
    assert (shares[-1] - shares[0]) * (1 if rises else -1) > 0.1
    assert abs(tilts[-1]) < abs(tilts[0])
    assert trainer.regularisers[0].auxiliary.config.provenance["tilt"] == trainer.regularisers[0].fitted_tilt != 0
    assert not [text for texts in logged(trainer, "warnings") for text in texts if "violations rose" in text]


def test_verdicts_are_counted_whatever_the_degrees_are(tiny_model):
    """A tilt of less than log 2 leaves both degrees above a half."""
    model = tiny_model()
    drawn = [replace(one, prompt_ids=[1, 5], completion_ids=[3, 4]) for one in rollouts(3, 5)]
    examples = encode(model, drawn, 0, label=lambda one: degree(0.3, one.complies))
    assert examples.compliance.min() > 0.5
    assert measure_calibration(new_auxiliary(model), examples)["r_violating"] == 5


@pytest.mark.parametrize("anchor", ["live", "previous"])
def test_where_the_share_is_allowed_the_term_is_off(tiny_folder, tmp_path, anchor):
    held = Regulariser(NO_E, kl_on="rollouts", anchor=anchor, share={"at_least": 0.05, "at_most": 0.95})
    trainer = trainer_of(tiny_folder(), tmp_path, {"rude": held})
    (regulariser,) = trainer.regularisers
    regulariser.is_fitted = True  # in a round whose share was not allowed
    trainer.train()
    assert logged(trainer, "rude/tilt") == [0.0, 0.0]
    assert not any(logged(trainer, "rude/term_on"))
    assert not [text for texts in logged(trainer, "warnings") for text in texts if "label" in text]
    state = regulariser.state()
    regulariser.tilt = None
    assert regulariser.active
    regulariser.load_state(state)
    assert not regulariser.active


def test_once_nothing_acts_the_weights_stay(tiny_folder, tmp_path):
    """An optimiser's momentum would carry them on, past the share."""
    held = Regulariser(Labels(1), kl_on="rollouts", weight=40.0, share={"at_least": 0.75})  # all comply in round 2
    rows = {"asked": Dataset.from_dict({"prompt": SENTENCES[:2] * 4})}
    trainer, seen = trainer_of(tiny_folder(), tmp_path, {"asked": held}, rows=rows, learn={"asked": False}), []
    callback = TrainerCallback()
    callback.on_step_end = lambda *_, **__: seen.append(torch.cat([w.flatten() for w in weights(trainer).values()]))
    trainer.add_callback(callback)
    trainer.train()
    assert logged(trainer, "asked/tilt") == [pytest.approx(log(3), abs=0.1), 0.0]
    assert not torch.equal(seen[0], seen[1])
    assert all(torch.equal(seen[1], later) for later in seen[2:]), "the second round moved them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": {}}, "share.at_least: any share is allowed"),
        ({"share": {"at_least": 0.7, "at_most": 0.3}}, "share.at_least: 0.7 is above at_most"),
        ({"share": {"at_least": 1.0}}, "is a constraint; leave `share` out"),
        ({"share": {"at_least": 0.5}, "constraint": None}, "share: retention asks no constraint"),
        ({"share": {"at_least": 0.5}, "target": {"rate": 0.1}}, "target: is a highest violation"),
        ({"share": {"at_least": 0.5}, "soft_labels": True}, "soft_labels: a share counts outputs"),
        ({"share": {"at_least": 0.5}, "guidance_scale": 2.0}, "guidance_scale: the share says"),
        ({"share": {"at_least": 0.5}, "anchor": "initial"}, "anchor: initial is measured once"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        Regulariser(**{"constraint": NO_E, **options})
