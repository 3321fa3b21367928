"""What a round measures: compliance of its rollouts, and calibration of its R."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from bridle.core.calibration import calibration, shift_to_rate
from bridle.data import Rollout
from bridle.errors import RunStopped
from bridle.models.auxiliary import AuxiliaryModel
from bridle.training.examples import ENCODE_BATCH, Examples
from bridle.utils.oom import RowLimit


def check_scored(rollouts: Sequence[Rollout], max_missing: float, name: str, kind: str = "rollouts") -> None:
    """Refuses scored rollouts of which too many have no score.

    Args:
        max_missing: the share that may have none.
        name: whose they are, as the message begins.
        kind: what the message calls them.

    Raises:
        RunStopped: more have none; it gives the first one's reason.
    """
    missing = [rollout for rollout in rollouts if rollout.complies is None]
    if len(missing) > max_missing * len(rollouts):
        raise RunStopped(
            f"{name}: {len(missing)} of {len(rollouts)} {kind} got no score (first reason: {missing[0].reason}); fix "
            f"the constraint and resume, or raise max_missing above {max_missing}"
        )


def measure_samples(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Number of a round's plain rollouts, and their entropy in nats a token; the sampled tokens of all."""
    plain = [rollout for rollout in rollouts if not rollout.sought]
    drawn = [log_prob for rollout in plain for log_prob in rollout.log_probs or ()]
    return {
        "rollouts": len(plain),
        "tokens_sampled": sum(len(rollout.completion_ids) for rollout in rollouts),
        "entropy_sampled": -fmean(drawn),  # unbiased: the mean of −log p of what p has drawn
    }


def measure_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """As `measure_samples`, with the compliance rate of the plain rollouts and its 95% Wilson interval."""
    measured, sought = measure_samples(rollouts), [rollout for rollout in rollouts if rollout.sought]
    plain = [rollout for rollout in rollouts if not rollout.sought]
    found = [rollout.complies for rollout in sought if rollout.complies is not None]
    scored = [rollout.complies for rollout in plain if rollout.complies is not None]
    complying = sum(scored)
    interval = binomtest(complying, len(scored)).proportion_ci(method="wilson") if scored else (None, None)
    return {
        **measured,
        "rollouts_missing": len(plain) - len(scored),
        "rollouts_empty": sum(not rollout.completion.strip() for rollout in plain),
        "clipped": sum(not rollout.finished for rollout in plain) / len(plain),
        "compliance": complying / len(scored) if scored else None,
        "compliance_low": interval[0],
        "compliance_high": interval[1],
        **({"rollouts_sought": len(sought), "compliance_sought": fmean(found) if found else None} if sought else {}),
    }


def measure_weights(examples: Examples, fresh: int) -> dict[str, Any]:
    """Number of replayed samples, and how many prefixes with weight 1 their labels are worth, as a share of theirs.

    The share is (Σw)² / Σw² over the number of prefixes: 1 where the policy has not moved. `sampler_effective` is that
    of the `fresh` first samples, where another engine drew them.
    """
    found: dict[str, Any] = {}
    if len(replayed := examples[fresh:]):
        found |= {"replayed": len(replayed), "replay_effective": _effective(replayed)}
    if bool((examples[:fresh].weights > 0).logical_and(examples[:fresh].weights != 1).any()):
        found["sampler_effective"] = _effective(examples[:fresh])
    return found


def _effective(examples: Examples) -> float:
    weights = examples.weights[examples.mask]
    return (weights.sum() ** 2 / (weights**2).sum()).item() / len(weights)


def measure_calibration(auxiliary: AuxiliaryModel, examples: Examples) -> dict[str, Any]:
    """Calibration of R over every prefix of held-out labelled samples; empty if there are none."""
    examples = examples[examples.labelled.nonzero()[:, 0]]
    if not len(examples):
        return {}
    r_taken, labels = _predicted(auxiliary, examples)
    measured = calibration(r_taken.sigmoid(), labels)
    return {
        "r_violating": int((~examples.complies).sum()),
        "r_brier": measured.brier,
        "r_skill": measured.skill,
        "r_ece": measured.expected_calibration_error,
        "r_reliability": measured.bins,
    }


def rate_shift(auxiliary: AuxiliaryModel, examples: Examples) -> float:
    """What to add to R's logits so that its mean prediction is the labels' rate; 0 without labels.

    A log-linear R whose value is shifted by it comes near the rate.
    """
    examples = examples[examples.labelled.nonzero()[:, 0]]
    if not len(examples):
        return 0.0
    r_taken, labels = _predicted(auxiliary, examples)
    return shift_to_rate(r_taken, labels, examples.weights[examples.mask].cpu())


@torch.no_grad()
def _predicted(auxiliary: AuxiliaryModel, examples: Examples) -> tuple[Tensor, Tensor]:
    """R's logits and the labels at every prefix of labelled samples. Each [prefixes]"""

    def predict(rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = examples[rows].to(auxiliary.device)
        r_taken = batch.r_taken(auxiliary, batch.states(auxiliary))
        labels = batch.compliance[:, None].expand_as(r_taken)
        return r_taken[batch.mask].cpu(), labels[batch.mask].cpu()

    limit = RowLimit("measuring R")
    batches = torch.arange(len(examples)).split(ENCODE_BATCH)
    r_taken, labels = zip(*(part for rows in batches for part in limit.run(predict, rows)), strict=True)
    return torch.cat(r_taken), torch.cat(labels)
