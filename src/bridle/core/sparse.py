"""A sparse target: k of its tokens, and all others as one bucket. (docs: concepts/method)"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

FLOOR = -1e30  # stands for log 0, where -inf - -inf would make NaN
KEEP_LIKELY = 0.1  # once the policy has left the anchor, errors lie where q is large (benchmarks/sparse_targets.py)


@dataclass(frozen=True)
class SparseTarget:
    """A distribution over k tokens and one bucket that holds all the others.

    Attributes:
        indices: [..., k] distinct token ids.
        log_probs: [..., k] log q of each.
        log_rest: [...] log of the mass of all other tokens.
    """

    indices: Tensor
    log_probs: Tensor
    log_rest: Tensor

    def spread(self, logits: Tensor) -> Tensor:
        """The full target, with the rest divided in the policy's proportions.

        Its KL(q ‖ p) equals that over the k + 1 buckets, in value and gradient.

        Args:
            logits: [..., vocabulary] of the policy p.

        Returns:
            [..., vocabulary] log-probabilities.
        """
        logits = logits.detach().float()
        log_rest = bucket_logits(logits, self.indices)[..., -1:]
        return (logits - log_rest + self.log_rest[..., None]).scatter(-1, self.indices, self.log_probs)

    def __call__(self, which: slice, policy_logits: Tensor) -> Tensor:
        """log q at some of the prefixes, as `core.loss.Divergence` asks for it. [some, vocabulary]"""
        return self[which].spread(policy_logits)

    def __getitem__(self, prefixes: Any) -> "SparseTarget":
        return SparseTarget(self.indices[prefixes], self.log_probs[prefixes], self.log_rest[prefixes])

    @classmethod
    def cat(cls, parts: Sequence["SparseTarget"]) -> "SparseTarget":
        """Concatenates targets along the first dimension."""
        names = (field.name for field in fields(cls))
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def to(self, device: torch.device | str) -> "SparseTarget":
        """The same target on another device."""
        return SparseTarget(self.indices.to(device), self.log_probs.to(device), self.log_rest.to(device))


def sparse_target(log_q: Tensor, k: int, log_anchor: Tensor | None = None) -> SparseTarget:
    """Keeps k tokens of a target.

    Without an anchor these are the k most likely under q. With one they are those with the largest
    |q − p_a| + 0.1·q: tokens from which R removes mass are likely under p_a, not under q.

    Args:
        log_q: [..., vocabulary] log-probabilities.
        k: tokens to keep, at least 1; a k beyond the vocabulary keeps all, with an empty rest.
        log_anchor: [..., vocabulary] log-probabilities of p_a.
    """
    k = min(k, log_q.shape[-1])
    worth = log_q if log_anchor is None else (log_q.exp() - log_anchor.exp()).abs() + KEEP_LIKELY * log_q.exp()
    indices = worth.topk(k).indices
    log_buckets = bucket_logits(log_q, indices)
    return SparseTarget(indices, log_buckets[..., :k], log_buckets[..., k])


def bucket_logits(logits: Tensor, indices: Tensor) -> Tensor:
    """Logits over buckets: one for each of `indices`, and one for all other tokens together.

    Their softmax is that of `logits`, summed over each bucket. The rest is summed over its own tokens: 1 minus the mass
    of the others is, in float32, up to 8% off for a rest of e⁻¹¹, and vanishes at e⁻²⁰.

    Args:
        logits: [..., vocabulary].
        indices: [..., k] distinct token ids.

    Returns:
        [..., k + 1] in float32, the rest last.
    """
    logits = logits.float()
    log_rest = logits.scatter(-1, indices, FLOOR).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, indices), log_rest], dim=-1)
