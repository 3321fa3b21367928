"""The target q: the distribution closest to the anchor that satisfies the constraint.

Over whole outputs, q(y|x) ∝ p_a(y|x)·C(x, y). The auxiliary model's R(s) = E[C | prefix s] breaks it
down into tokens (Meng et al., NeurIPS 2022; Meng et al., EMNLP 2024):

    q(v | s) = p_a(v | s) · R(s∘v) / R(s)

R(s) is the same for every v, so normalising over the vocabulary gives it for free.
"""

import torch.nn.functional as F
from torch import Tensor


def log_target(anchor_logits: Tensor, r_logits: Tensor, power: float = 1.0) -> Tensor:
    """log q = normalise(log p_a + η·log R).

    Args:
        anchor_logits: [..., vocabulary], the anchor's logits or log-probabilities.
        r_logits: [..., vocabulary], R before the sigmoid; entry v scores the prefix followed by v.
        power: η. 1 is the method; more leans harder on the constraint, 0 gives the anchor back.

    Returns:
        [..., vocabulary] log-probabilities, in float32 at least.
    """
    return F.log_softmax(anchor_logits.float() + power * F.logsigmoid(r_logits.float()), dim=-1)
