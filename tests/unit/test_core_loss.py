"""One pass over chunks of positions against the plain loss: the same values, the same gradients, less memory."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bridle.core.decomposition import log_target
from bridle.core.loss import Divergence, chunk_rows, chunks, constrained_loss
from bridle.core.sparse import sparse_target
from reference_losses import cross_entropy, entropy, kl_divergence, sparse_kl_divergence

POSITIONS, HIDDEN, VOCABULARY = 13, 6, 17


@dataclass
class Layer:
    weight: Tensor
    bias: Tensor | None = None
    scale: float | None = None
    cap: float | None = None

    def shape(self, logits):
        logits = logits if self.scale is None else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def __call__(self, states):
        return self.shape(F.linear(states, self.weight, self.bias))


@dataclass
class World:
    """Everything one loss is made of, and the two regularisers' targets: dense on some positions, live on others."""

    states: Tensor
    layer: Layer
    targets: Tensor
    trained_on: Tensor
    log_q: Tensor
    r_logits: Tensor
    some: Tensor
    others: Tensor

    def divergences(self):
        some, others = torch.full((6,), 3.0), torch.linspace(0.1, 0.9, 5)
        live = lambda which, logits: log_target(logits, self.r_logits[self.others[which]])  # noqa: E731
        return [
            Divergence("some", self.some, some, lambda which, logits: self.log_q[self.some[which]]),
            Divergence("others", self.others, others, live),
        ]

    def plainly(self):
        """The same from logits in full, term by term."""
        logits = self.layer(self.states)
        on = torch.ones(POSITIONS, dtype=torch.bool)
        kl_some = kl_divergence(self.log_q[self.some], logits[self.some], on[self.some])[0]
        live = log_target(logits.detach()[self.others], self.r_logits[self.others])
        kl_others = kl_divergence(live, logits[self.others], on[self.others])[0]
        each = zip(torch.linspace(0.1, 0.9, 5), live.split(1), logits[self.others].split(1), strict=True)
        weighted = sum(weight * kl_divergence(q, p, on[:1])[0] for weight, q, p in each)
        ce = cross_entropy(logits, self.targets, self.trained_on)[0]
        return ce + 3.0 * kl_some + weighted, (ce, kl_some, kl_others, logits)

    def gradients(self, loss):
        inputs = [part for part in (self.states, self.layer.weight, self.layer.bias) if part is not None]
        return torch.autograd.grad(loss, inputs)


def world(bias=True, scale=None, cap=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, grad=True):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)

    made = World(
        states=random(POSITIONS, HIDDEN),
        layer=Layer(random(VOCABULARY, HIDDEN), random(VOCABULARY) if bias else None, scale, cap),
        targets=torch.randint(VOCABULARY, (POSITIONS,), generator=generator),
        trained_on=torch.arange(POSITIONS) % 3 != 1,
        log_q=(3 * random(POSITIONS, VOCABULARY, grad=False)).float().log_softmax(-1),
        r_logits=random(POSITIONS, VOCABULARY, grad=False).float(),
        some=torch.tensor([0, 1, 4, 5, 6, 12]),
        others=torch.tensor([1, 2, 3, 4, 11]),  # two positions belong to both
    )
    made.targets[::4] = made.layer(made.states).argmax(-1)[::4]  # some of them are the likeliest tokens
    return made


def in_one_pass(world, rows=2, **options):
    return constrained_loss(
        world.states, world.layer, world.targets, world.trained_on, world.divergences(), rows=rows, **options
    )


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
@pytest.mark.parametrize(("bias", "scale", "cap"), [(True, None, None), (False, 0.3, None), (True, 2.0, 1.5)])
def test_values_and_gradients_are_those_of_the_plain_loss(rows, bias, scale, cap):
    given = world(bias, scale, cap)
    plain, (ce, kl_some, kl_others, logits) = given.plainly()
    loss, sums = in_one_pass(given, rows)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.cross_entropy, ce, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.entropy, entropy(logits, given.trained_on)[0], rtol=1e-6, atol=0)
    assert sums.correct == (logits.argmax(-1) == given.targets)[given.trained_on].sum() > 0
    for name, expected, count in (("some", kl_some, 6), ("others", kl_others, 5)):
        torch.testing.assert_close(sums.divergences[name][0], expected, rtol=2e-6, atol=0)
        assert sums.divergences[name][1] == count
    for ours, theirs in zip(given.gradients(loss), given.gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


def test_a_factor_before_the_loss_is_a_factor_of_the_gradient():
    given = world()
    once = given.gradients(in_one_pass(given)[0])
    half = given.gradients(in_one_pass(given)[0] / 2)
    assert all(torch.equal(a / 2, b) for a, b in zip(once, half, strict=True))


def test_bf16_is_within_its_rounding():
    given = world(dtype=torch.bfloat16)
    exact = world()
    loss, _ = in_one_pass(given)
    torch.testing.assert_close(loss, in_one_pass(exact)[0], rtol=2e-2, atol=0)
    for ours, theirs in zip(given.gradients(loss), exact.gradients(exact.plainly()[0]), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=2e-2 * theirs.abs().max().item())


def test_mixed_precision_keeps_the_weights_gradient_in_float32():
    given, made_in = world(), set()
    given.layer.shape = lambda logits: made_in.add(logits.dtype) or logits
    gradients = given.gradients(in_one_pass(given, dtype=torch.bfloat16)[0])
    assert made_in == {torch.bfloat16}
    for ours, theirs in zip(gradients, given.gradients(given.plainly()[0]), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * theirs.abs().max().item())


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_a_shipped_target_is_the_sparse_divergence(k):
    given = world()
    kept = sparse_target(given.log_q, k)
    everywhere = Divergence(
        "all", torch.arange(POSITIONS), torch.full((POSITIONS,), 2.0), lambda which, logits: kept[which].spread(logits)
    )
    loss, _ = constrained_loss(
        given.states, given.layer, given.targets, torch.zeros_like(given.trained_on), [everywhere], rows=2
    )
    plain = 2.0 * sparse_kl_divergence(kept, given.layer(given.states), torch.ones(POSITIONS, dtype=torch.bool))[0]
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for ours, theirs in zip(given.gradients(loss), given.gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_output_layer_gets_no_gradient():
    given = world()
    given.layer.weight.requires_grad_(False)
    given.layer.bias.requires_grad_(False)
    loss, _ = in_one_pass(given)
    loss.backward()
    assert given.layer.weight.grad is None
    assert given.states.grad.abs().sum() > 0


def test_nothing_counted_stays_in_the_graph_with_zero_gradient():
    given = world()
    loss, sums = constrained_loss(given.states, given.layer, given.targets, torch.zeros_like(given.trained_on))
    assert loss == sums.cross_entropy == 0
    assert all((gradient == 0).all() for gradient in given.gradients(loss))
    empty, _ = constrained_loss(given.states[:0], given.layer, given.targets[:0], given.trained_on[:0])
    assert empty == 0
    assert all((gradient == 0).all() for gradient in given.gradients(empty))


def test_a_second_backward_is_refused():
    given = world()
    loss, _ = in_one_pass(given)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward has run for this loss already"):
        loss.backward()


def test_chunks_cover_every_position_once():
    cut = list(chunks(10, 3))
    assert [piece.stop - piece.start for piece in cut] == [3, 3, 3, 1]
    assert cut[0].start == 0
    assert all(before.stop == after.start for before, after in pairwise(cut))
    assert list(chunks(0, 3)) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_chunk_has_a_bound_on_its_logits_and_at_least_one_position(device):
    at, bound = torch.device(device), {"cpu": 2**23, "cuda": 2**25}[device]
    rows = [chunk_rows(at, vocabulary) for vocabulary in (100, 4_096, 32_000, 152_000, 10**9)]
    assert rows == sorted(rows, reverse=True)
    assert bound // 2 < rows[2] * 32_000 <= bound
    assert bound // 2 < rows[3] * 152_000 <= bound
    assert rows[-1] == 1


def test_its_memory_does_not_grow_with_the_vocabulary():
    """The largest tensor beside inputs and their gradients is a chunk, however large the vocabulary."""
    largest = []
    for vocabulary in (16_384, 65_536):
        states = torch.randn(600, 4, requires_grad=True)
        layer = Layer(torch.randn(vocabulary, 4))
        targets = torch.zeros(600, dtype=torch.long)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            constrained_loss(states, layer, targets, targets == 0)
        largest.append(max(event.cpu_memory_usage for event in profile.events()))
    assert largest[1] <= 1.01 * largest[0]
