"""λ by dual ascent, as a pure function: where it goes, its bounds, what it does not wind up on."""

from dataclasses import asdict, replace
from math import exp, log

import numpy as np
import pytest
from scipy.stats import binom

from bridle.data import Rollout
from bridle.errors import UserError
from bridle.training.config import Regulariser
from bridle.training.dual_ascent import LARGEST_ERROR, DualState, TargetOptions
from trainers import NO_E

AIM = TargetOptions(rate=0.1, margin=0.0)


def state(weight=4.0, limit=0.1, since=1, **options):
    return DualState(weight, limit=limit, since=since, **options)


def rollout(complies, value=None, sought=0):
    names = {"regulariser": "rude", "model_hash": "", "constraint": "", "prompt": "", "completion": ""}
    value = value if value is not None or complies is None else float(complies)
    ids = {"prompt_ids": [1], "completion_ids": [2]}
    return Rollout(**ids, **names, round=1, complies=complies, value=value, sought=sought)


class TestStep:
    @pytest.mark.parametrize(("violation", "factor"), [(0.2, 2.0), (0.1, 1.0), (0.05, 0.5)])
    def test_it_rises_above_the_target_and_falls_below_it(self, violation, factor):
        assert state().stepped(AIM, violation).weight == pytest.approx(4 * factor)

    def test_only_the_ratio_counts(self):
        small = replace(AIM, rate=0.001)
        assert state(limit=0.001).stepped(small, 0.002).weight == pytest.approx(state().stepped(AIM, 0.2).weight)

    def test_the_margin_is_room_below_the_target(self):
        assert state().stepped(TargetOptions(rate=0.1, margin=0.2), 0.08).weight == pytest.approx(4)

    @pytest.mark.parametrize(("rate", "samples", "violations"), [(0.05, 600, 20), (0.05, 2_400, 102), (0.01, 473, 1)])
    @pytest.mark.parametrize("margin", [0.1, 0.3])
    def test_a_confidence_aims_at_a_rate_whose_samples_mostly_show_the_target(self, rate, samples, violations, margin):
        options = replace(AIM, rate=rate, confidence=0.95, margin=margin)
        assert options.bound(violations, samples) <= rate < options.bound(violations + 1, samples)
        aim = options.aim(rate, samples)
        assert binom.cdf(violations, samples, aim) == pytest.approx(1 - margin)
        assert state(limit=rate).stepped(options, 2 * aim, samples).weight == pytest.approx(8)

    @pytest.mark.parametrize(("confidence", "needed"), [(0.95, 299), (0.99, 459)])
    def test_too_few_samples_show_nothing(self, confidence, needed):
        options = TargetOptions(rate=0.01, confidence=confidence)
        assert options.bound(0, needed) <= 0.01 < options.bound(0, needed - 1)
        assert 0 < options.aim(0.01, 100) < 0.01

    def test_the_step_scales_the_change(self):
        assert state().stepped(replace(AIM, step=0.5), 0.4).weight == pytest.approx(8)

    @pytest.mark.parametrize("violation", [1.0, 1e-9])
    def test_one_step_is_bounded(self, violation):
        change = state().stepped(AIM, violation).change
        assert abs(change) == pytest.approx(LARGEST_ERROR)

    @pytest.mark.parametrize(("violation", "bound"), [(0.4, 5.0), (0.01, 3.0)])
    def test_it_stays_within_its_bounds(self, violation, bound):
        options = TargetOptions(rate=0.1, least=3.0, most=5.0)
        assert state().stepped(options, violation).weight == bound

    def test_a_step_of_any_size_ends_at_the_bound(self):
        options = TargetOptions(rate=0.1, step=1e4)
        assert state().stepped(options, 0.5).weight == options.most
        assert state().stepped(options, 0.01).weight == options.least

    def test_at_a_bound_nothing_winds_up(self):
        """After many rounds too high, one below the target lowers λ by a whole step."""
        options = replace(AIM, momentum=0.9, most=5.0)
        now = state()
        for _ in range(20):
            now = now.stepped(options, 0.4)
        assert (now.weight, now.change) == (5.0, 0.0)
        assert now.stepped(options, 0.05).weight == pytest.approx(2.5)

    def test_momentum_goes_on_in_its_direction_alone(self):
        options = replace(AIM, momentum=0.5)
        once = state().stepped(options, 0.2)
        assert once.stepped(options, 0.2).change == pytest.approx(1.5 * log(2))
        assert once.stepped(options, 0.05).change == pytest.approx(-log(2))


class TestLostEntropy:
    """The policy lost its entropy: λ stays at half of what brought it there, or below."""

    def test_it_halves_the_weight_that_acted(self):
        risen = state().stepped(AIM, 0.4)
        assert (risen.weight, risen.last_weight) == pytest.approx((16, 4))
        now = risen.lowered(AIM, 3)
        assert (now.weight, now.ceiling, now.change) == pytest.approx((2, 2, 0))

    def test_a_lambda_that_has_fallen_further_stays(self):
        now = state().stepped(AIM, 0.025).lowered(AIM, 3)
        assert (now.weight, now.ceiling) == pytest.approx((1, 2))

    def test_it_rises_to_the_ceiling_and_no_further(self):
        now = state().lowered(AIM, 3).stepped(AIM, 0.05)
        assert now.weight == pytest.approx(1)
        now = now.stepped(AIM, 0.4)
        assert now.weight == pytest.approx(2)
        assert now.stepped(AIM, 0.4).change == pytest.approx(0)

    def test_a_round_without_a_score_leaves_no_change(self):
        assert state().stepped(AIM, 0.4).measured(AIM, 4, [], acts_in=4).change == 0

    def test_the_lower_bound_holds(self):
        now = state().lowered(replace(AIM, least=3.0), 3)
        assert (now.weight, now.ceiling) == (3.0, 3.0)


class TestRounds:
    def test_the_first_round_measures_the_base_and_moves_nothing(self):
        now = DualState(4.0).measured(AIM, 1, [1.0] * 9, acts_in=1)
        assert (now.weight, now.limit, now.since) == (4.0, 0.1, 1)
        assert now.measured(AIM, 2, [1.0] * 9, acts_in=2).weight > 4

    def test_it_waits_until_it_has_acted_on_what_is_measured(self):
        """As in the parallel schedule: what is measured is older than the round that uses it."""
        now = DualState(4.0).measured(AIM, 1, [1.0] * 9, acts_in=None)  # all labels alike: no R
        now = now.measured(AIM, 2, [1.0] * 9, acts_in=3)
        now = now.measured(AIM, 3, [1.0] * 9, acts_in=4)
        assert (now.weight, now.steps, now.since) == (4.0, 0, 3)
        assert now.measured(AIM, 4, [1.0] * 9, acts_in=5).steps == 1

    def test_without_a_score_it_stays(self):
        assert state().measured(AIM, 3, [], acts_in=3) == state()

    def test_where_nothing_violates_it_falls(self):
        assert state().measured(AIM, 3, [0.0] * 600, acts_in=3).weight == pytest.approx(4 / 4)

    @pytest.mark.parametrize(
        ("options", "samples"), [({"rate": 0.01, "confidence": 0.95}, 300), ({"rate": 0.001}, 256)]
    )
    def test_where_nothing_violates_few_samples_do_not_raise_it(self, options, samples):
        aim = TargetOptions(**options)
        now = replace(state(), limit=aim.rate)
        assert now.measured(aim, 3, [0.0] * samples, acts_in=3).weight == 4
        assert now.measured(aim, 3, [1.0] + [0.0] * samples, acts_in=3).weight > 4

    @pytest.mark.parametrize(
        ("options", "needed"), [({"rate": 0.001}, 555), ({"rate": 0.01, "confidence": 0.95}, 473), ({"mean": 0.9}, 5)]
    )
    def test_lambda_can_fall_from_so_many_samples_on(self, options, needed):
        aim = TargetOptions(**options)
        limit = aim.limit(None)
        assert [aim.can_fall(limit, samples, samples) for samples in (needed - 1, needed)] == [False, True]
        falls = replace(state(), limit=limit).measured(aim, 3, [0.0] * needed, acts_in=3)
        assert falls.weight < 4

    def test_lambda_goes_by_what_the_trained_model_has_to_show(self):
        """A round that seeks violations measures fewer samples than the end does."""
        aim = TargetOptions(rate=0.1, confidence=0.95)
        now, violations = replace(state(), limit=0.1), [1.0] * 18 + [0.0] * 282
        assert aim.aim(0.1, 300) < 18.5 / 301 < aim.aim(0.1, 600)
        assert now.measured(aim, 3, violations, acts_in=3).weight > 4
        assert now.measured(aim, 3, violations, acts_in=3, shown_on=600).weight < 4

    def test_a_target_of_the_base_s_rate(self):
        half = TargetOptions(base=0.5)
        now = DualState(4.0).measured(half, 1, [1.0] * 20 + [0.0] * 80, acts_in=1)
        assert now.limit == pytest.approx(0.1, rel=0.02)
        assert now.measured(half, 2, [1.0] * 99, acts_in=2).limit == now.limit, "of the first round alone"

    def test_it_continues_from_what_a_checkpoint_holds(self):
        options = TargetOptions(rate=0.1, momentum=0.5)
        now = state().stepped(options, 0.3)
        assert DualState(**asdict(now)).stepped(options, 0.2) == now.stepped(options, 0.2)

    @pytest.mark.parametrize(("momentum", "elasticity"), [(0.0, 0.4), (0.0, 1.2), (0.3, 0.6)])
    def test_it_settles_at_the_target_of_a_noisy_model(self, momentum, elasticity):
        """A model whose rate falls as a power of λ, half of it at once, measured on 600 samples."""
        options, draw = TargetOptions(rate=0.05, margin=0.0, momentum=momentum), np.random.default_rng(0)
        now, rate, rates = DualState(4.0), 0.2, []
        for index in range(1, 31):
            rates.append(rate)
            now = now.measured(options, index, [*(draw.random(600) < rate)], acts_in=index)
            rate = exp(0.5 * log(rate) + 0.5 * log(0.2 * (now.weight / 4.0) ** -elasticity))
        assert np.mean(rates[10:]) == pytest.approx(0.05, rel=0.15)
        assert np.std(rates[10:]) < 0.02


class TestViolations:
    drawn = (rollout(True, 0.9), rollout(False, 0.3), rollout(None), rollout(False, 0.0, sought=3))

    def test_a_rate_counts_plain_scored_rollouts(self):
        assert TargetOptions(rate=0.1).violations(self.drawn) == [0.0, 1.0]

    def test_a_mean_takes_their_scores(self):
        options = TargetOptions(mean=0.9)
        assert options.violations(self.drawn) == pytest.approx([0.1, 0.7])
        assert options.limit(base=0.5) == pytest.approx(0.1)


class TestAChangedTarget:
    """A run resumes with `--accept_changes`: the state is of the target before."""

    def test_the_new_limit_holds(self):
        before = DualState(4.0).measured(TargetOptions(rate=0.05), 1, [0.0, 1.0], acts_in=1)
        violations = [1.0] * 2 + [0.0] * 8
        assert before.measured(TargetOptions(rate=0.05), 2, violations, acts_in=2).weight > 4
        after = before.measured(TargetOptions(rate=0.5), 2, violations, acts_in=2)
        assert (after.limit, after.weight < 4) == (0.5, True)

    def test_the_base_s_rate_is_kept_and_not_its_multiple(self):
        before = DualState(4.0).measured(TargetOptions(base=1.0), 1, [0.0] * 49 + [1.0] * 50, acts_in=1)
        assert before.limit == pytest.approx(0.505)
        after = before.measured(TargetOptions(base=0.5), 2, [0.0, 1.0], acts_in=2)
        assert after.limit == pytest.approx(0.2525)

    def test_a_target_of_the_base_needs_the_first_round(self):
        with pytest.raises(UserError, match=r"target.base: the first round did not measure the base's rate"):
            DualState(4.0).measured(TargetOptions(base=1.0), 2, [0.0, 1.0], acts_in=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rate: a target has exactly one of"),
        ({"rate": 0.1, "base": 1.0}, "rate and base: a target has exactly one of"),
        ({"rate": 0}, "rate: must be above 0"),
        ({"mean": 1}, "mean: must be below 1"),
        ({"rate": 1, "confidence": 0.95}, "rate: must be below 1 with a confidence"),
        ({"rate": 0.1, "margin": 1.0}, "margin: input should be less than 1"),
        ({"rate": 0.1, "confidence": 0.9, "margin": 0.0}, "margin: must be above 0 with a confidence"),
        ({"rate": 0.1, "step": 0}, "step: input should be greater than 0"),
        ({"rate": 0.1, "least": 5, "most": 2}, "least: 5 is above most, 2"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        TargetOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraint": None}, "target: retention asks no constraint; set its weight"),
        ({"anchor": "initial"}, "target: is measured on the policy's rollouts"),
        ({"weight": 0.0}, r"weight: 0 is where λ begins, outside target.least 0.1 and target.most 100"),
        ({"target": {"mean": 0.9, "confidence": 0.9}}, "target.confidence: is of a rate, which counts"),
        ({"target": {"rate": 0.1, "confidence": 0.4}}, "target.confidence: "),
        ({"target": {"rate": 0.1, "certainty": 0.9}}, "certainty: there is no key 'certainty'"),
        ({"target": 0.1}, "target: must be a mapping"),
    ],
)
def test_a_regulariser_that_nothing_can_steer_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Regulariser(**{"constraint": NO_E, "target": {"rate": 0.1}, **options})
