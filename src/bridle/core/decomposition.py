"""NADO: the losses of an auxiliary model R for a constraint C on whole outputs, and the target q.

R(s) = E[C | prefix s] obeys R(s) = Σ_v p_a(v|s)·R(s∘v), and R of a finished output is C. It is fitted on samples
y ~ p_a labelled by C (Meng et al., NeurIPS 2022):

    L_R = Σ_t BCE(R(s_t), C)  +  β·Σ_t KL_Bernoulli( Σ_v p_a(v|s_t)·R(s_t∘v) ‖ R(s_t) )  (docs: concepts/method, eq. 3)

Over whole outputs, the distribution closest to p_a that satisfies the constraint is q(y|x) ∝ p_a(y|x)·C(x, y). R breaks
it down into tokens (Meng et al., EMNLP 2024), and normalising over the vocabulary gives R(s), the same for every v:

    q(v | s) = p_a(v | s)·R(s∘v) / R(s)  (docs: concepts/method, eq. 1 and 2)

All tensors of a sample are aligned on the completion: position j scores completion token j, so `r_logits[b, j, v]` is
the logit of R for the prompt, the first j completion tokens, and then v. The loss applies the sigmoid: log-sigmoid
outputs in BCE-with-logits would teach a rate of 0.4 as 0.67.
"""

import torch.nn.functional as F
from torch import Tensor


def importance_weights(log_probs: Tensor, drawn_log_probs: Tensor, mask: Tensor, clip: float = 4.0) -> Tensor:
    """Truncated importance weights of the labels of another model's samples, at each prefix.

    R(s_t) averages C over what p_a says after s_t. Where the sample was drawn from another model p', the label counts
    by Π_{u>t} p_a(y_u|s_{u-1}) / p'(y_u|s_{u-1}): what came before does not matter, since R is conditional on it, so
    late prefixes weigh about 1.

    Args:
        log_probs: [batch, time] of the sample's tokens under p_a.
        drawn_log_probs: [batch, time] under the model that drew them.
        mask: [batch, time], true where the sample has a token.
        clip: upper bound of the weights: less variance for a little bias.

    Returns:
        [batch, time] weights, all 1 where both models are the same.
    """
    ratios = (log_probs - drawn_log_probs).masked_fill(~mask, 0)
    after = ratios.sum(-1, keepdim=True) - ratios.cumsum(-1)
    return after.exp().clamp(max=clip)


def label_loss(
    r_taken: Tensor, mask: Tensor, compliance: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of R on every prefix of a labelled sample.

    Args:
        r_taken: [batch, time] logits of R along the sampled path: entry [b, j] scores the prompt and the
            first j + 1 completion tokens.
        mask: [batch, time], true where the sample has a token.
        compliance: [batch], C of the whole sample in [0, 1].
        weights: [batch, time], from `importance_weights`; None counts every prefix once.

    Returns:
        (weighted sum over prefixes, their total weight), in nats.
    """
    labels = compliance[:, None].expand_as(r_taken).to(r_taken.dtype)
    counted = mask.to(r_taken.dtype) if weights is None else weights.masked_fill(~mask, 0)
    losses = F.binary_cross_entropy_with_logits(r_taken, labels, reduction="none")
    return (losses * counted).sum(), counted.sum()


def consistency_loss(
    r_logits: Tensor, r_taken: Tensor, anchor_log_probs: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward consistency: R of a prefix should be the mean of R over the anchor's next tokens.

    The prefix after completion token j is scored by `r_taken[:, j]`; its continuations are row j + 1.
    The empty completion has no score of its own and is left out.

    Args:
        r_logits: [batch, time, vocabulary].
        r_taken: [batch, time].
        anchor_log_probs: [batch, time, vocabulary].
        mask: [batch, time], true where the sample has a token.

    Returns:
        (sum over prefixes, number of prefixes), in nats.
    """
    # The clamp keeps both logarithms finite; float32 resolves 1 - 1e-6.
    mean = (anchor_log_probs[:, 1:].exp() * r_logits[:, 1:].sigmoid()).sum(-1).clamp(1e-6, 1 - 1e-6)
    parent = r_taken[:, :-1]
    divergence = mean * (mean.log() - F.logsigmoid(parent))
    divergence = divergence + (1 - mean) * ((1 - mean).log() - F.logsigmoid(-parent))
    mask = mask[:, 1:]
    return divergence.masked_fill(~mask, 0).sum(), mask.sum()


def log_target(anchor_logits: Tensor, r_logits: Tensor, guidance_scale: float = 1.0) -> Tensor:
    """log q = normalise(log p_a + η·log R).

    Args:
        anchor_logits: [..., vocabulary], the anchor's logits or log-probabilities.
        r_logits: [..., vocabulary], R before the sigmoid; entry v scores the prefix followed by v.
        guidance_scale: η. 1 is the method; larger values strengthen the constraint, 0 gives the anchor.

    Returns:
        [..., vocabulary] log-probabilities, in float32 at least.
    """
    return F.log_softmax(anchor_logits.float() + guidance_scale * F.logsigmoid(r_logits.float()), dim=-1)
