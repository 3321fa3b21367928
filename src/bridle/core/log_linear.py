"""R in the log-linear form: what a token does to R is one factor, whatever the prefix's own R.

    R(s∘v) = R(s)·exp(r_v) / Z(s),  Z(s) = Σ_u p_a(u|s)·exp(r_u)  (docs: concepts/method)

The mean of R(s∘v) over p_a's next tokens is R(s) by construction, and q(v|s) ∝ p_a(v|s)·exp(r_v): where r is linear in
the states that enter the output layer, q is that of another output layer. Nothing keeps R(s∘v) at most 1 but a penalty.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SURE = 0.999
"""Up to here R's logit is that of a probability. Beyond, it grows as log R does, so that gradients stay finite."""

LOG_SURE, SURE_LOGIT = math.log(SURE), math.log(SURE / (1 - SURE))


def log_r(value: Tensor, tilt: Tensor, anchor_logits: Tensor) -> Tensor:
    """log R of all next tokens.

    Args:
        value: [..., 1], the logit of R(s).
        tilt: [..., vocabulary], r.
        anchor_logits: [..., vocabulary] of p_a.
    """
    logits = anchor_logits.float()
    return F.logsigmoid(value) + tilt - (logits + tilt).logsumexp(-1, True) + logits.logsumexp(-1, True)


def logit_of(log_r: Tensor) -> Tensor:
    """The logit of R, continued where R is above `SURE`. [...] -> [...]"""
    below = log_r.clamp(max=LOG_SURE)
    return below - torch.log(-torch.expm1(below)) + (log_r - LOG_SURE).clamp(min=0)


def excess(r_logits: Tensor) -> Tensor:
    """max(R − 1, 0), given R's logits as `logit_of` makes them. [...] -> [...]"""
    return (r_logits - SURE_LOGIT + LOG_SURE).clamp(min=0).expm1()
