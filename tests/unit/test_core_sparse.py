"""Sparse targets: a lower bound of the full KL, exact where it should be, with a gradient that is never lost."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle.core.sparse import SparseTarget, bucket_logits, sparse_target
from reference_losses import kl_divergence, log_buckets, sparse_kl_divergence

VOCABULARY = 12
worlds = st.tuples(st.integers(0, 10_000), st.floats(0.01, 20))


def draw(seed, scale, rows=3):
    """Log-probabilities of a target, logits of a policy, and a mask that counts every row."""
    generator = torch.Generator().manual_seed(seed)
    log_q = (scale * torch.randn(rows, VOCABULARY, generator=generator)).log_softmax(-1)
    return log_q, scale * torch.randn(rows, VOCABULARY, generator=generator), torch.ones(rows, dtype=torch.bool)


def value_and_gradient(loss, logits):
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    value.backward()
    return value.detach(), logits.grad


def naive(target, logits):
    """KL over the k + 1 buckets as the textbook has it, in float64."""
    p = logits.double().softmax(-1)
    p_kept = p.gather(-1, target.indices)
    p_buckets = torch.cat([p_kept, 1 - p_kept.sum(-1, keepdim=True)], dim=-1)
    q_buckets = log_buckets(target).double().exp()
    return torch.xlogy(q_buckets, q_buckets / p_buckets).sum()


class TestTarget:
    def test_keeps_the_likeliest_and_the_mass_of_the_others(self):
        target = sparse_target(torch.tensor([[0.1, 0.5, 0.05, 0.35]]).log(), 2)
        assert target.indices.tolist() == [[1, 3]]
        torch.testing.assert_close(log_buckets(target).exp(), torch.tensor([[0.5, 0.35, 0.15]]))

    def test_with_an_anchor_it_keeps_what_the_constraint_takes_mass_from(self):
        anchor = torch.tensor([0.6, 0.2, 0.15, 0.05])
        q = torch.tensor([0.01, 0.5, 0.36, 0.13])
        assert 0 not in sparse_target(q.log(), 2).indices
        assert 0 in sparse_target(q.log(), 2, anchor.log()).indices
        same = sparse_target(q.log(), 2, q.log())  # R = 1: there is nothing to choose by but q
        assert same.indices.tolist() == [1, 2]

    @pytest.mark.parametrize("k", [VOCABULARY, VOCABULARY + 5])
    def test_all_tokens_leave_an_empty_rest(self, k):
        log_q, *_ = draw(0, 1.0)
        target = sparse_target(log_q, k)
        assert target.indices.shape[-1] == VOCABULARY
        assert torch.equal(target.log_rest.exp(), torch.zeros(3))

    def test_a_rest_far_below_rounding_is_kept(self):
        log_q = torch.cat([torch.zeros(1), torch.full((100,), -60.0)]).log_softmax(-1)
        expected = torch.tensor(100.0).log() - 60
        torch.testing.assert_close(sparse_target(log_q, 1).log_rest, expected)

    def test_indexing_takes_prefixes(self):
        log_q, _, _ = draw(0, 1.0)
        some = sparse_target(log_q, 4)[torch.tensor([True, False, True])]
        assert some.indices.shape == some.log_probs.shape == (2, 4)
        assert torch.equal(some.log_rest, sparse_target(log_q, 4).log_rest[[0, 2]])


class TestDivergence:
    @settings(max_examples=60, deadline=None)
    @given(worlds)
    def test_it_grows_with_k_from_zero_up_to_the_full_kl(self, world):
        log_q, logits, on = draw(*world)
        full = kl_divergence(log_q, logits, on)[0]
        values = [sparse_kl_divergence(sparse_target(log_q, k), logits, on)[0] for k in range(1, VOCABULARY + 1)]
        slack = 1e-5 * (1 + full)
        assert values[0] >= 0
        assert all(below <= above + slack for below, above in pairwise(values))
        assert values[-1] <= full + slack

    @settings(max_examples=60, deadline=None)
    @given(worlds, st.sampled_from([VOCABULARY - 1, VOCABULARY]))
    def test_it_is_the_full_kl_where_the_rest_holds_at_most_one_token(self, world, k):
        log_q, logits, on = draw(*world)
        full, full_gradient = value_and_gradient(lambda z: kl_divergence(log_q, z, on)[0], logits)
        target = sparse_target(log_q, k)
        value, gradient = value_and_gradient(lambda z: sparse_kl_divergence(target, z, on)[0], logits)
        torch.testing.assert_close(value, full, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, full_gradient, rtol=1e-5, atol=1e-5)

    @settings(max_examples=60, deadline=None)
    @given(worlds, st.integers(1, VOCABULARY))
    def test_it_is_zero_and_flat_at_q(self, world, k):
        log_q, _, on = draw(*world)
        shifted = log_q + 3.0
        value, gradient = value_and_gradient(lambda z: sparse_kl_divergence(sparse_target(log_q, k), z, on)[0], shifted)
        assert 0 <= value < 1e-5
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)

    @settings(max_examples=60, deadline=None)
    @given(st.tuples(st.integers(0, 10_000), st.floats(0.01, 3)), st.integers(1, VOCABULARY - 1))
    def test_value_and_gradient_are_those_of_the_naive_form(self, world, k):
        log_q, logits, on = draw(*world)
        target = sparse_target(log_q, k)
        value, gradient = value_and_gradient(lambda z: sparse_kl_divergence(target, z, on)[0], logits)
        expected, expected_gradient = value_and_gradient(lambda z: naive(target, z), logits.double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)

    def test_the_gradient_is_the_slope(self):
        log_q, logits, on = draw(1, 2.0, rows=1)
        target, step = sparse_target(log_q, 4), 1e-2
        _, gradient = value_and_gradient(lambda z: sparse_kl_divergence(target, z, on)[0], logits)
        steps = step * torch.eye(VOCABULARY)
        rows = torch.ones(1, dtype=torch.bool)
        slopes = [
            (sparse_kl_divergence(target, logits + s, rows)[0] - sparse_kl_divergence(target, logits - s, rows)[0])
            / (2 * step)
            for s in steps
        ]
        torch.testing.assert_close(gradient[0], torch.stack(slopes), rtol=0, atol=2e-4)

    def test_it_is_the_kl_to_the_target_that_divides_its_rest_as_the_policy_does(self):
        log_q, logits, on = draw(2, 2.0)
        target = sparse_target(log_q, 4)
        rest = torch.ones_like(logits, dtype=torch.bool).scatter(-1, target.indices, False)
        within = logits.masked_fill(~rest, -torch.inf).log_softmax(-1)
        completed = (within + target.log_rest[:, None]).scatter(-1, target.indices, target.log_probs)
        torch.testing.assert_close(completed.exp().sum(-1), torch.ones(3))
        value, gradient = value_and_gradient(lambda z: sparse_kl_divergence(target, z, on)[0], logits)
        expected, expected_gradient = value_and_gradient(lambda z: kl_divergence(completed, z, on)[0], logits)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        torch.testing.assert_close(gradient, logits.softmax(-1) - completed.exp(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("k", [1, 3, 5])
    @pytest.mark.parametrize("gap", [20.0, 1e3, 1e4])
    def test_a_gradient_survives_a_rest_of_no_mass(self, gap, k):
        """p or q puts all its mass on one token: nothing overflows, and the pull towards q is whole."""
        peak = torch.tensor([gap, 0.0, -1.0, -2.0, -3.0, -gap])
        flat_q = sparse_target(torch.linspace(0.1, 0, 6).log_softmax(-1), k)  # keeps the first k
        value, gradient = value_and_gradient(lambda z: sparse_kl_divergence(flat_q, z, torch.tensor(True))[0], peak)
        assert value > gap / 2
        within = peak.scatter(-1, flat_q.indices, -torch.inf).softmax(-1)
        pull = flat_q.log_rest.exp() * within
        torch.testing.assert_close(
            gradient, peak.softmax(-1) - pull.scatter(-1, flat_q.indices, flat_q.log_probs.exp())
        )
        peaked_q = sparse_target(peak.log_softmax(-1), k)
        value, gradient = value_and_gradient(
            lambda z: sparse_kl_divergence(peaked_q, z, torch.tensor(True))[0], torch.zeros(6)
        )
        torch.testing.assert_close(value, torch.tensor(6.0).log(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient[0], torch.tensor(1 / 6 - 1))

    @pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
    def test_where_the_target_rules_tokens_out(self, k):
        log_q = torch.tensor([0.75, 0.25, 0.0, 0.0, 0.0]).log()
        value, gradient = value_and_gradient(
            lambda z: sparse_kl_divergence(sparse_target(log_q, k), z, torch.tensor(True))[0], torch.zeros(5)
        )
        full = kl_divergence(log_q, torch.zeros(5), torch.tensor(True))[0]
        assert value <= full + 1e-6
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient[0].item(), 0.2 - 0.75)
        if k >= 2:  # the rest holds ruled-out tokens alone
            torch.testing.assert_close(value, full)
            torch.testing.assert_close(gradient[2:], torch.full((3,), 0.2))

    def test_half_precision_logits_lose_no_more_than_their_own_rounding(self):
        log_q, logits, on = draw(3, 3.0)
        target = sparse_target(log_q, 4)
        logits = logits.bfloat16()
        value, gradient = value_and_gradient(lambda z: sparse_kl_divergence(target, z, on)[0], logits)
        expected, expected_gradient = value_and_gradient(
            lambda z: sparse_kl_divergence(target, z, on)[0], logits.float()
        )
        assert value.dtype == torch.float32
        assert gradient.dtype == torch.bfloat16
        assert value == expected
        torch.testing.assert_close(gradient.float(), expected_gradient, rtol=2**-7, atol=1e-6)

    def test_a_fully_masked_batch_gives_zero_gradient(self):
        log_q, logits, on = draw(4, 1.0)
        logits.requires_grad_()
        total, count = sparse_kl_divergence(sparse_target(log_q, 4), logits, ~on)
        total.backward()
        assert total == 0
        assert count == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))

    def test_masked_positions_do_not_count(self):
        log_q, logits, on = draw(5, 1.0)
        target = sparse_target(log_q, 4)
        some = torch.tensor([True, False, True])
        total, count = sparse_kl_divergence(target, logits, some)
        torch.testing.assert_close(total, sparse_kl_divergence(target[some], logits[some], on[:2])[0])
        assert count == 2

    def test_any_leading_shape(self):
        log_q, logits, _ = draw(6, 1.0, rows=6)
        flat = sparse_kl_divergence(sparse_target(log_q, 4), logits, torch.ones(6, dtype=torch.bool))[0]
        shaped = sparse_kl_divergence(
            sparse_target(log_q.view(2, 3, -1), 4), logits.view(2, 3, -1), torch.ones(2, 3, dtype=torch.bool)
        )[0]
        torch.testing.assert_close(shaped, flat)


def test_buckets_are_the_softmax_summed():
    _, logits, _ = draw(7, 2.0)
    indices = torch.tensor([[0, 5], [1, 2], [11, 3]])
    p, buckets = logits.softmax(-1), bucket_logits(logits, indices).softmax(-1)
    torch.testing.assert_close(buckets[:, :2], p.gather(-1, indices))
    torch.testing.assert_close(buckets[:, 2], 1 - p.gather(-1, indices).sum(-1))


def test_rounding_below_zero_costs_the_full_kl_no_gradient():
    """Near p = q rounding makes every other KL negative; the gradient is p − q all the same."""
    generator = torch.Generator().manual_seed(0)
    log_q = torch.randn(200, 50, generator=generator).log_softmax(-1)
    near = log_q + 1e-5 * torch.randn(200, 50, generator=generator)
    on = torch.ones(200, dtype=torch.bool)
    unclamped = (log_q.exp() * (log_q - near.log_softmax(-1))).sum(-1)
    assert (unclamped < 0).any()
    value, gradient = value_and_gradient(lambda z: kl_divergence(log_q, z, on)[0], near)
    assert value >= 0
    torch.testing.assert_close(gradient, near.softmax(-1) - log_q.exp(), rtol=0, atol=1e-7)


def test_a_target_moves_between_devices():
    log_q, *_ = draw(8, 1.0)
    moved = sparse_target(log_q, 4).to("meta")
    assert isinstance(moved, SparseTarget)
    assert {part.device.type for part in (moved.indices, moved.log_probs, moved.log_rest)} == {"meta"}


def test_beside_an_anchor_it_keeps_where_q_moves_and_not_where_both_are_large():
    q, anchor = torch.tensor([0.5, 0.3, 0.199, 0.001]), torch.tensor([0.5, 0.05, 0.05, 0.4])
    assert sparse_target(q.log(), 1, anchor.log()).indices.tolist() == [3]
    assert sparse_target(q.log(), 1).indices.tolist() == [0]
