"""The equations, against distributions whose answers are known and against `torch`'s own losses."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli

from bridle.core.calibration import calibration, shift_to_rate
from bridle.core.decomposition import consistency_loss, importance_weights, label_loss, log_target
from bridle.core.output_layer import OutputLayer
from bridle.core.tokens import (
    IGNORE,
    completion_positions,
    length_mask,
    pad_left,
    pad_right,
    positions,
)
from reference_losses import cross_entropy, entropy, kl_divergence

ALL_ON = torch.ones(3, 4, dtype=torch.bool)


def descend(loss_of, parameter, steps=3000, rate=0.05):
    """Minimises a loss of one parameter by Adam."""
    optimizer = torch.optim.Adam([parameter], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(parameter).backward()
        optimizer.step()
        schedule.step()


class TestTokens:
    def test_masks_go_by_length_even_where_a_real_token_equals_the_pad(self):
        ids, mask = pad_right([[0, 0], [3, 0, 0]], pad=0)
        assert ids.tolist() == [[0, 0, 0], [3, 0, 0]]
        assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
        ids, mask = pad_left([[0, 7], [3, 0, 0]], pad=0)
        assert ids.tolist() == [[0, 0, 7], [3, 0, 0]]
        assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]

    def test_left_padding_does_not_move_positions(self):
        _, mask = pad_left([[4, 5], [1, 2, 3]], pad=0)
        assert positions(mask).tolist() == [[0, 0, 1], [0, 1, 2]]

    def test_completion_positions_score_the_first_token_from_the_end_of_the_prompt(self):
        assert completion_positions(torch.tensor([1, 3]), 2).tolist() == [[0, 1], [2, 3]]
        assert length_mask(torch.tensor([0, 2]), 2).tolist() == [[False, False], [True, True]]


def test_the_ignored_label_is_torch_s_own():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE


class TestLosses:
    def test_cross_entropy_is_torch_s(self):
        logits, targets = torch.randn(3, 4, 7), torch.randint(7, (3, 4))
        mask = torch.rand(3, 4) > 0.4
        total, count = cross_entropy(logits, targets, mask)
        expected = F.cross_entropy(logits[mask], targets[mask], reduction="sum")
        torch.testing.assert_close(total, expected)
        assert count == mask.sum()

    def test_kl_is_torch_s_and_zero_at_q(self):
        logits, q_logits = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
        log_q = q_logits.log_softmax(-1)
        expected = F.kl_div(logits.log_softmax(-1), log_q, log_target=True, reduction="sum")
        torch.testing.assert_close(kl_divergence(log_q, logits, ALL_ON)[0], expected)
        assert kl_divergence(logits.log_softmax(-1), logits, ALL_ON)[0] == 0

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10_000), st.floats(0.01, 30))
    def test_kl_is_never_negative(self, seed, scale):
        generator = torch.Generator().manual_seed(seed)
        log_q = (scale * torch.randn(2, 5, generator=generator)).log_softmax(-1)
        near = log_q + 1e-7 * torch.randn(2, 5, generator=generator)
        for logits in (near, scale * torch.randn(2, 5, generator=generator)):
            assert kl_divergence(log_q, logits, torch.ones(2, dtype=torch.bool))[0] >= 0

    def test_kl_where_the_target_rules_tokens_out(self):
        log_q = torch.tensor([0.5, 0.5, 0.0]).log()
        logits = torch.zeros(3, requires_grad=True)
        total, _ = kl_divergence(log_q, logits, torch.tensor(True))
        total.backward()
        torch.testing.assert_close(total.item(), torch.tensor(1.5).log().item())
        torch.testing.assert_close(logits.grad, torch.tensor([1 / 3 - 0.5, 1 / 3 - 0.5, 1 / 3]))

    @pytest.mark.parametrize("loss", [cross_entropy, kl_divergence])
    def test_a_fully_masked_batch_gives_zero_gradient(self, loss):
        logits = torch.randn(3, 4, 7, requires_grad=True)
        other = torch.randint(7, (3, 4)) if loss is cross_entropy else torch.randn(3, 4, 7).log_softmax(-1)
        arguments = (logits, other) if loss is cross_entropy else (other, logits)
        total, count = loss(*arguments, ~ALL_ON)
        total.backward()
        assert total == 0
        assert count == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))

    def test_the_gradient_of_both_terms_is_the_closed_form(self):
        weight, target = 4.0, 2
        logits = torch.randn(6, requires_grad=True)
        log_q = torch.randn(6).log_softmax(-1)
        ce, _ = cross_entropy(logits, torch.tensor(target), torch.tensor(True))
        kl, _ = kl_divergence(log_q, logits, torch.tensor(True))
        (ce + weight * kl).backward()
        onehot = F.one_hot(torch.tensor(target), 6)
        p = logits.detach().softmax(-1)
        torch.testing.assert_close(logits.grad, (1 + weight) * p - onehot - weight * log_q.exp())

    def test_with_a_live_anchor_the_gradient_is_a_policy_gradient_whose_critic_is_r(self):
        weight = 3.0
        logits, r_logits = torch.randn(6, requires_grad=True), torch.randn(6)
        log_q = log_target(logits.detach(), r_logits)
        (weight * kl_divergence(log_q, logits, torch.tensor(True))[0]).backward()
        p, r = logits.detach().softmax(-1), r_logits.sigmoid()
        torch.testing.assert_close(logits.grad, -weight * p * (r / (p @ r) - 1))

    def test_sums_and_counts_do_not_depend_on_how_a_batch_is_cut(self):
        logits, targets = torch.randn(8, 4, 7), torch.randint(7, (8, 4))
        log_q, mask = torch.randn(8, 4, 7).log_softmax(-1), torch.rand(8, 4) > 0.3
        for whole, part in [
            (cross_entropy(logits, targets, mask), lambda i: cross_entropy(logits[i], targets[i], mask[i])),
            (kl_divergence(log_q, logits, mask), lambda i: kl_divergence(log_q[i], logits[i], mask[i])),
        ]:
            pieces = [part(slice(start, start + 2)) for start in range(0, 8, 2)]
            torch.testing.assert_close(sum(p[0] for p in pieces), whole[0])
            assert sum(p[1] for p in pieces) == whole[1]

    def test_entropy_of_the_uniform_distribution(self):
        total, count = entropy(torch.zeros(3, 4, 7), ALL_ON)
        assert total.item() / count.item() == pytest.approx(torch.tensor(7.0).log().item(), rel=1e-6)


class TestOptimum:
    """What the update converges to, prefix by prefix."""

    p_anchor = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    r = torch.tensor([[0.9, 0.5, 0.1], [1.0, 0.2, 0.6]])
    on = torch.ones(2, dtype=torch.bool)

    @property
    def q(self):
        q = self.p_anchor * self.r
        return q / q.sum(-1, keepdim=True)

    def test_without_ce_the_policy_becomes_q(self):
        log_q = log_target(self.p_anchor.log(), self.r.logit(1e-6))
        logits = torch.zeros(2, 3, requires_grad=True)
        descend(lambda z: kl_divergence(log_q, z, self.on)[0], logits)
        torch.testing.assert_close(logits.detach().softmax(-1), self.q, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("weight", [0.5, 4.0])
    def test_with_ce_it_becomes_the_mixture_of_data_and_q(self, weight):
        p_data = torch.tensor([[0.2, 0.2, 0.6], [0.7, 0.2, 0.1]])
        log_q = log_target(self.p_anchor.log(), self.r.logit(1e-6))
        logits = torch.zeros(2, 3, requires_grad=True)

        def loss(z):
            ce = -(p_data * z.log_softmax(-1)).sum()
            return ce + weight * kl_divergence(log_q, z, self.on)[0]

        descend(loss, logits)
        expected = (p_data + weight * self.q) / (1 + weight)
        torch.testing.assert_close(logits.detach().softmax(-1), expected, atol=1e-4, rtol=0)

    def test_the_power_leans_harder_on_the_constraint(self):
        r_logits = self.r.logit(1e-6)
        for power in (0.0, 1.0, 2.0):
            expected = self.p_anchor * self.r**power
            q = log_target(self.p_anchor.log(), r_logits, power).exp()
            torch.testing.assert_close(q, expected / expected.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


class TestDecomposition:
    @pytest.mark.parametrize("rate", [0.4, 0.6])
    def test_the_label_loss_is_calibrated(self, rate):
        """The published code feeds log-sigmoid outputs to BCE-with-logits and learns 0.67 and 1.0 here."""
        labels = (torch.arange(100) < 100 * rate).float()
        mask = torch.ones(100, 1, dtype=torch.bool)
        logit = torch.zeros(1, requires_grad=True)
        descend(lambda z: label_loss(z.expand(100, 1), mask, labels)[0] / 100, logit, steps=1000)
        assert logit.sigmoid().item() == pytest.approx(rate, abs=1e-3)

    def test_consistency_is_zero_where_r_is_the_mean_of_its_children(self):
        log_p = torch.randn(2, 3, 5).log_softmax(-1)
        r_logits = torch.randn(2, 3, 5)
        mean = (log_p.exp() * r_logits.sigmoid()).sum(-1)
        r_taken = torch.cat([mean[:, 1:].logit(), torch.zeros(2, 1)], dim=1)
        mask = torch.ones(2, 3, dtype=torch.bool)
        total, count = consistency_loss(r_logits, r_taken, log_p, mask)
        assert total.item() == pytest.approx(0, abs=1e-6)
        assert count == 4
        worse, _ = consistency_loss(r_logits, r_taken + 1, log_p, mask)
        assert worse > 0.01

    def test_consistency_is_the_divergence_of_the_mean_from_the_parent(self):
        """Prefix by prefix, against torch's own Bernoulli divergence; row j + 1's parent is what was taken at j."""
        log_p, r_logits, r_taken = torch.randn(2, 4, 5).log_softmax(-1), torch.randn(2, 4, 5), torch.randn(2, 4)
        mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
        expected = 0.0
        for row, place in [(0, 1), (0, 2), (0, 3), (1, 1)]:
            mean = (log_p[row, place].exp() * r_logits[row, place].sigmoid()).sum()
            pair = Bernoulli(mean), Bernoulli(logits=r_taken[row, place - 1])
            expected += torch.distributions.kl_divergence(*pair)
        total, count = consistency_loss(r_logits, r_taken, log_p, mask)
        torch.testing.assert_close(total, expected)
        assert count == 4

    @pytest.mark.parametrize("sure", [-60.0, 60.0])
    def test_consistency_is_finite_where_r_is_sure(self, sure):
        r_logits, log_p = torch.full((1, 2, 4), sure), torch.zeros(1, 2, 4).log_softmax(-1)
        for parent in (sure, -sure):
            total, _ = consistency_loss(r_logits, torch.full((1, 2), parent), log_p, torch.ones(1, 2, dtype=torch.bool))
            assert total.isfinite()
            assert (total < 1e-4) == (parent == sure)

    def test_masked_positions_do_not_count(self):
        r_taken, labels = torch.randn(2, 3), torch.tensor([1.0, 0.0])
        mask = torch.tensor([[True, True, False], [True, False, False]])
        total, count = label_loss(r_taken, mask, labels)
        changed = torch.where(mask, r_taken, 99.0)
        assert count == 3
        torch.testing.assert_close(label_loss(changed, mask, labels)[0], total)
        weighted, weight = label_loss(changed, mask, labels, torch.full((2, 3), 2.0))
        assert weight == 2 * count
        torch.testing.assert_close(weighted, 2 * total)
        r_logits, log_p = torch.randn(2, 3, 4), torch.randn(2, 3, 4).log_softmax(-1)
        total, count = consistency_loss(r_logits, r_taken, log_p, mask)
        assert count == 1
        torch.testing.assert_close(consistency_loss(r_logits, changed, log_p, mask)[0], total)


class TestOutputLayer:
    @pytest.mark.parametrize(
        ("config", "by_hand"),
        [
            ({}, lambda logits: logits),
            ({"logits_scaling": 4.0}, lambda logits: logits / 4),
            ({"logit_scale": 0.3}, lambda logits: 0.3 * logits),
            ({"lm_head_multiplier": 0.3}, lambda logits: 0.3 * logits),
            ({"final_logit_softcapping": 2.0}, lambda logits: 2 * (logits / 2).tanh()),
        ],
    )
    @pytest.mark.parametrize("bias", [None, torch.tensor([0.5, -1.0, 2.0])])
    def test_logits_are_scaled_and_capped(self, config, by_hand, bias):
        weight, states = torch.randn(3, 5), torch.randn(2, 5)
        logits = states @ weight.T + (0 if bias is None else bias)
        layer = OutputLayer(weight, bias, SimpleNamespace(**config))
        torch.testing.assert_close(layer(states), by_hand(logits))

    @pytest.mark.parametrize("copy", [False, True])
    def test_detached_it_has_the_same_values_and_no_graph(self, copy):
        layer = OutputLayer(torch.randn(3, 5, requires_grad=True), torch.randn(3, requires_grad=True))
        for mine, other in zip((layer.weight, layer.bias), vars(layer.detach(copy=copy)).values(), strict=False):
            assert torch.equal(mine, other)
            assert not other.requires_grad
            assert (mine.data_ptr() == other.data_ptr()) == (not copy)
        assert OutputLayer(layer.weight, None).detach().bias is None


class TestCalibration:
    def test_by_hand(self):
        measured = calibration(torch.tensor([0.05, 0.05, 0.95, 0.95]), torch.tensor([0.0, 1.0, 1.0, 1.0]))
        assert measured.brier == pytest.approx((0.05**2 + 0.95**2 + 2 * 0.05**2) / 4, abs=1e-6)
        assert measured.expected_calibration_error == pytest.approx((0.45 + 0.05) / 2, abs=1e-6)
        assert [count for *_, count in measured.bins] == [2, 2]
        assert measured.skill == pytest.approx(1 - measured.brier / (0.25 * 0.75), abs=1e-6)

    @pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
    def test_a_shift_of_logits_meets_the_weighted_rate(self, rate):
        logits, weights = torch.linspace(-6, 3, 40), torch.linspace(0.5, 2, 40)
        labels = (torch.linspace(0, 1, 40) <= rate).float() if rate else torch.zeros(40)
        shift = shift_to_rate(logits, labels, weights)
        mean = ((logits + shift).sigmoid() * weights).sum() / weights.sum()
        expected = (labels * weights).sum() / weights.sum()
        assert mean.item() == pytest.approx(expected.clamp(1e-3, 1 - 1e-3).item(), abs=1e-6)

    def test_skill_of_the_labels_mean_is_0_and_of_labels_that_are_alike_unknown(self):
        labels = torch.tensor([1.0, 1.0, 1.0, 0.0])
        assert calibration(torch.full((4,), 0.75), labels).skill == pytest.approx(0)
        assert calibration(labels, labels).skill == 1
        assert calibration(torch.full((4,), 0.75), torch.ones(4)).skill is None

    def test_certainty_belongs_to_the_last_bin_and_its_opposite_to_the_first(self):
        predicted = torch.tensor([0.0, 0.05, 0.15, 0.85, 0.95, 1.0])
        measured = calibration(predicted, torch.zeros(6), bins=10)
        assert [mean for mean, *_ in measured.bins] == pytest.approx([0.025, 0.15, 0.85, 0.975])
        assert [count for *_, count in measured.bins] == [2, 1, 1, 2]

    def test_a_perfect_forecast(self):
        generator = torch.Generator().manual_seed(0)
        p = torch.rand(20_000, generator=generator)
        labels = (torch.rand(20_000, generator=generator) < p).float()
        assert calibration(p, labels).expected_calibration_error < 0.02


class TestFutureWeights:
    """Labels of samples of another model, as those of this one."""

    def test_weighted_labels_average_to_r_of_every_prefix(self):
        length, sequences = 3, torch.tensor(list(itertools.product(range(2), repeat=3)))
        compliance = torch.rand(8, generator=torch.Generator().manual_seed(1))
        log_probs, drawn = (_path_log_probs(sequences, seed) for seed in (2, 3))
        mask = torch.ones_like(sequences, dtype=torch.bool)
        weights = importance_weights(log_probs, drawn, mask, clip=1e9)
        p, p_drawn = log_probs.sum(-1).exp(), drawn.sum(-1).exp()
        for prefix_length in range(1, length + 1):
            for prefix in itertools.product(range(2), repeat=prefix_length):
                inside = (sequences[:, :prefix_length] == torch.tensor(prefix)).all(-1)
                true_r = (p * compliance)[inside].sum() / p[inside].sum()
                counted = (p_drawn * weights[:, prefix_length - 1])[inside]
                torch.testing.assert_close((counted * compliance[inside]).sum() / counted.sum(), true_r)

    def test_a_model_weighs_its_own_samples_as_they_are(self):
        log_probs = -torch.rand(4, 5)
        mask = torch.arange(5) < torch.tensor([[5], [3], [1], [5]])
        assert (importance_weights(log_probs, log_probs.clone(), mask)[mask] == 1).all()

    def test_the_last_token_weighs_one_and_no_weight_exceeds_the_most(self):
        log_probs, drawn = torch.full((1, 4), -1.0), torch.full((1, 4), -3.0)
        mask = torch.tensor([[True, True, True, False]])
        assert importance_weights(log_probs, drawn, mask)[0, :3].tolist() == pytest.approx([4.0, 4.0, 1.0])
        assert importance_weights(drawn, log_probs, mask)[0, 0].item() == pytest.approx(math.exp(-4))

    def test_a_weight_counts_like_so_many_samples(self):
        r_taken, mask, compliance = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.tensor([0.0, 1.0])
        twice = label_loss(r_taken[[0, 0, 1]], mask[[0, 0, 1]], compliance[[0, 0, 1]])
        weighted = label_loss(r_taken, mask, compliance, torch.tensor([[2.0], [1.0]]).expand(2, 3))
        torch.testing.assert_close(torch.stack(weighted), torch.stack([part.float() for part in twice]))


def _path_log_probs(sequences, seed):
    """log p of each token of each sequence under a random table of next-token probabilities for every prefix."""
    generator, table = torch.Generator().manual_seed(seed), {}
    rows = []
    for sequence in sequences.tolist():
        row = []
        for at, token in enumerate(sequence):
            prefix = tuple(sequence[:at])
            if prefix not in table:
                table[prefix] = torch.randn(2, generator=generator).log_softmax(-1)
            row.append(table[prefix][token])
        rows.append(torch.stack(row))
    return torch.stack(rows)
