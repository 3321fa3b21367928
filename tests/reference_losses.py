"""The two terms of constrained fine-tuning, L = CE(corpus) + Σ_d λ_d·KL(q ‖ p_θ) (Meng et al., EMNLP 2024).

Each loss returns (sum, count), so that a batch can be split in any way and divided once, over the
whole accumulated global batch. With q fixed, the gradient of both terms with respect to the logits
at one position is (1 + λ)·p − onehot(target) − λ·q, and the optimum is (p_data + λ·q) / (1 + λ):
the model still learns from violating text, at weight 1 / (1 + λ). (docs: concepts/method, eq. 4 and 5)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bridle.core.sparse import FLOOR, SparseTarget


def cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the corpus.

    Args:
        logits: [..., vocabulary].
        targets: [...] token ids.
        mask: [...], true where the position counts.

    Returns:
        (sum over counted positions, number of counted positions), both scalars, in nats.
    """
    nll = -F.log_softmax(logits.float(), dim=-1).gather(-1, targets[..., None]).squeeze(-1)
    return _masked_sum(nll, mask)


def kl_divergence(log_q: Tensor, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Exact KL(q ‖ p) over the vocabulary.

    Args:
        log_q: [..., vocabulary] log-probabilities of the target, carrying no gradient.
        logits: [..., vocabulary] of the policy p.
        mask: [...], true where the position counts.

    Returns:
        (sum over counted positions, number of counted positions), both scalars, in nats.
        A fully masked batch gives a zero that is still part of the graph.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_q = log_q.detach().clamp(min=FLOOR)  # 0·log 0 = 0
    per_position = (log_q.exp() * (log_q - log_p)).sum(-1)
    # Rounding alone can make a KL negative. Its gradient stays: a clamp would lose it just where p comes near q.
    return _masked_sum(per_position - per_position.detach().clamp(max=0), mask)


def sparse_kl_divergence(target: SparseTarget, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) over k tokens and the bucket of all others.

    By the log-sum inequality no more than `kl_divergence`, and the same where the rest holds one token or
    none. It is the exact KL to the target that divides its rest in the policy's own proportions, so the
    gradient moves the rest's mass as a whole and says nothing about tokens within it.

    Args:
        target: over [..., k] tokens, carrying no gradient.
        logits: [..., vocabulary] of the policy p.
        mask: [...], true where the position counts.

    Returns:
        (sum over counted positions, number of counted positions), both scalars, in nats.
        A fully masked batch gives a zero that is still part of the graph.
    """
    return kl_divergence(target.spread(logits), logits, mask)


def log_buckets(target: SparseTarget) -> Tensor:
    """A target's k + 1 log-probabilities, the rest last. [..., k + 1]"""
    return torch.cat([target.log_probs, target.log_rest[..., None]], dim=-1)


def entropy(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of softmax(logits) as (sum, count), in nats. Shapes as in `cross_entropy`."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    return _masked_sum(-(log_p.exp() * log_p).sum(-1), mask)


def _masked_sum(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return values.masked_fill(~mask, 0).sum(), mask.sum()
