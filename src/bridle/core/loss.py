"""CE and every KL(q ‖ p) in one pass over chunks of positions, so that no [positions, vocabulary] tensor ever exists.

With q fixed, the gradient of the loss with respect to the logits at one position has a closed form:

    (c + Σ_d λ_d)·p − c·onehot(target) − Σ_d λ_d·q_d,    c = 1 where a token is trained on and 0 elsewhere

So a chunk's logits are computed once, replaced by their gradient and freed; the backward needs only the gradients of
the hidden states and the output layer. `tests/reference_losses.py` has each term by itself. With q fixed the optimum is
(p_data + λ·q) / (1 + λ): violating text is still learned, at weight 1 / (1 + λ). (docs: concepts/method, eq. 4 and 5)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridle.core.output_layer import OutputLayer
from bridle.core.sparse import FLOOR


@dataclass(frozen=True)
class Divergence:
    """Σ λ·KL(q ‖ p) over some of the positions.

    Attributes:
        name: of the regulariser.
        positions: [n] in ascending order, on the CPU, so that no chunk waits for the device.
        weights: [n], the λ of each.
        log_q: makes [m, vocabulary] log-probabilities of q from which of its positions, and the policy's logits there,
            [m, vocabulary].
    """

    name: str
    positions: Tensor
    weights: Tensor
    log_q: Callable[[slice, Tensor], Tensor]


@dataclass(frozen=True)
class Sums:
    """The sums of one pass, as scalars [] without a gradient, in nats.

    Attributes:
        cross_entropy: [] over the positions that are trained on.
        entropy: [] of p, over the same.
        correct: [] how often the target is the likeliest token there.
        divergences: by name, KL(q ‖ p) without its weights, and the number of its positions.
    """

    cross_entropy: Tensor
    entropy: Tensor
    correct: Tensor
    divergences: dict[str, tuple[Tensor, int]]


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """Positions per chunk: enough to amortise reading the output layer, within a bound on the logits.

    The bound makes memory independent of the vocabulary. The CPU's numbers are measured (docs: log), the others
    estimated: an accelerator computes about a hundred times while it reads a number.
    """
    rows, logits = (512, 2**23) if device.type == "cpu" else (8192, 2**25)
    return max(1, min(rows, logits // vocabulary))


def chunks(positions: int, rows: int) -> Iterator[slice]:
    """Splits positions into chunks of `rows`."""
    return (slice(start, min(start + rows, positions)) for start in range(0, positions, rows))


@torch.no_grad()
def constrained_loss(
    hidden_states: Tensor,
    layer: OutputLayer,
    targets: Tensor,
    trained_on: Tensor,
    divergences: Sequence[Divergence] = (),
    *,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Sums]:
    """CE + Σ_d λ_d·KL(q_d ‖ p), summed over positions (EMNLP 2024).

    Args:
        hidden_states: [positions, hidden] of the policy.
        layer: its output layer.
        targets: [positions] token ids; anything valid where not trained on.
        trained_on: [positions], true where the cross-entropy counts.
        divergences: the regularisers' terms.
        dtype: of the matrix products; that of `hidden_states` if not given. All else is float32.
        rows: positions of a chunk; `chunk_rows` if not given.

    Returns:
        The sum, a scalar with the gradient of hidden states and output layer, for one backward; and its parts.
    """
    device = hidden_states.device
    rows = rows or chunk_rows(device, len(layer.weight))
    linear = _Linear(hidden_states, layer.weight, layer.bias, dtype or hidden_states.dtype)
    counted = trained_on.float()
    terms = [_Term(divergence, device, len(hidden_states), rows) for divergence in divergences]
    coefficients = counted.clone()  # of p in the gradient: c + Σ_d λ_d
    for term in terms:
        coefficients.index_add_(0, term.positions, term.weights)
    cross_entropy, entropy, correct, total = torch.zeros(4, device=device)

    for index, chunk in enumerate(chunks(len(hidden_states), rows)):
        raw = linear.logits(chunk)
        logits = layer.shape(raw)
        log_p = F.log_softmax(logits.float(), dim=-1)
        p = log_p.exp()
        target = targets[chunk, None]
        of_target = log_p.gather(-1, target)[:, 0]
        cross_entropy -= of_target @ counted[chunk]
        entropy -= _dot(p, log_p) @ counted[chunk]
        correct += (of_target == log_p.amax(-1)).float() @ counted[chunk]
        gradient = p.mul_(coefficients[chunk, None])
        gradient.scatter_add_(-1, target, -counted[chunk, None])
        for term in terms:
            total += term.add(index, chunk, logits, log_p, gradient)
        linear.backward(chunk, _through_shape(layer, raw, logits, gradient))

    with torch.enable_grad():
        loss = linear.attach(cross_entropy + total)
    return loss, Sums(cross_entropy, entropy, correct, {term.name: (term.kl, len(term.positions)) for term in terms})


class _Term:
    """One regulariser's KL, accumulated over the chunks."""

    def __init__(self, divergence: Divergence, device: torch.device, positions: int, rows: int):
        self.name, self.log_q, self.weights = divergence.name, divergence.log_q, divergence.weights
        self.positions = divergence.positions.to(device, non_blocking=True)
        starts = torch.arange(0, positions + rows, rows)
        self.edges = torch.searchsorted(divergence.positions, starts).tolist()  # of each chunk
        self.kl = torch.zeros((), device=device)

    def add(self, index: int, chunk: slice, logits: Tensor, log_p: Tensor, gradient: Tensor) -> Tensor:
        """Adds a chunk's part to the gradient of its logits, [chunk, vocabulary] each; returns Σ λ·KL, a scalar."""
        which = slice(*self.edges[index : index + 2])
        if which.start == which.stop:
            return self.kl.new_zeros(())
        where, weights = self.positions[which] - chunk.start, self.weights[which]
        log_q = self.log_q(which, logits[where]).clamp(min=FLOOR)  # 0·log 0 = 0
        q = log_q.exp()
        kl = _dot(q, log_q.sub_(log_p[where])).clamp(min=0)  # rounding can make it negative
        self.kl += kl.sum()
        gradient.index_add_(0, where, q.mul_(weights[:, None]), alpha=-1)
        return kl @ weights


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[..., vocabulary] × [..., vocabulary] -> [...], without materialising the product."""
    return torch.linalg.vecdot(left, right)


def _through_shape(layer: OutputLayer, raw: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    """Backpropagates from the logits to the linear map's output."""
    if logits is raw:
        return gradient
    with torch.enable_grad():
        raw = raw.detach().requires_grad_()
        return torch.autograd.grad(layer.shape(raw), raw, gradient.to(raw.dtype))[0]


class _Linear:
    """The output layer's linear map, and the gradients of its inputs, accumulated by chunk."""

    def __init__(self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.inputs = [hidden_states, weight, bias]
        self.states, self.weight = hidden_states.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.gradients = [
            torch.zeros(part.shape, dtype=kept, device=part.device) if part is not None and part.requires_grad else None
            for part, kept in zip(self.inputs, (hidden_states.dtype, torch.float32, torch.float32), strict=True)
        ]

    def logits(self, chunk: slice) -> Tensor:
        return F.linear(self.states[chunk], self.weight, self.bias)

    def backward(self, chunk: slice, gradient: Tensor) -> None:
        """Backpropagates the gradient of a chunk's logits. [chunk, vocabulary]"""
        of_states, of_weight, of_bias = self.gradients
        if of_bias is not None:
            of_bias += gradient.sum(0)
        gradient = gradient.to(self.weight.dtype)
        if of_states is not None:
            of_states[chunk] = gradient @ self.weight
        if of_weight is not None and of_weight.dtype == gradient.dtype:
            of_weight.addmm_(gradient.T, self.states[chunk])
        elif of_weight is not None:
            of_weight += gradient.T @ self.states[chunk]

    def attach(self, total: Tensor) -> Tensor:
        """The sum as a function of hidden states, weight and bias."""
        return _KnownGradient.apply(total, self.gradients, *self.inputs)


class _KnownGradient(torch.autograd.Function):
    """A scalar with known gradients. They are scaled in place, so it allows only one backward."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [None if part is None else part.dtype for part in inputs]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward has run for this loss already; compute the loss again")
        scaled = [
            None if gradient is None else gradient.mul_(upstream).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled
