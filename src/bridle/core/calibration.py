"""Calibration of R: whether prefixes that it scores 0.7 comply seven times out of ten."""

from dataclasses import dataclass

import torch
from torch import Tensor

RARE = 1e-3  # a rate of 0 would need a shift without end
SHIFTED = 10.0  # σ(−10) and σ(10) are beyond such a rate
BISECTIONS = 60


@dataclass(frozen=True)
class Calibration:
    """Calibration of predicted compliance against labels.

    Attributes:
        brier: mean squared error of the prediction, in [0, 1]; lower is better.
        skill: 1 − `brier` / that of the labels' mean. 1 is perfect, 0 no better than a constant; None if the labels are
            all alike.
        expected_calibration_error: mean gap between prediction and rate over the bins, weighted by size.
        bins: per non-empty bin (mean prediction, observed rate, count): a reliability diagram.
    """

    brier: float
    skill: float | None
    expected_calibration_error: float
    bins: list[tuple[float, float, int]]


def calibration(predicted: Tensor, compliance: Tensor, bins: int = 10) -> Calibration:
    """Brier score and expected calibration error (Guo et al., ICML 2017), with equal-width bins.

    Args:
        predicted: [n] probabilities of compliance, n ≥ 1.
        compliance: [n] labels in [0, 1].
        bins: number of bins of [0, 1].
    """
    predicted, compliance = predicted.double(), compliance.double()
    bin_of = (predicted * bins).long().clamp(max=bins - 1)
    rows = []
    for index in bin_of.unique().tolist():
        inside = bin_of == index
        rows.append((predicted[inside].mean().item(), compliance[inside].mean().item(), int(inside.sum())))
    gap = sum(abs(mean - rate) * count for mean, rate, count in rows) / len(predicted)
    brier, of_mean = torch.mean((predicted - compliance) ** 2).item(), compliance.var(correction=0).item()
    return Calibration(brier, 1 - brier / of_mean if of_mean > 0 else None, gap, rows)


def shift_to_rate(logits: Tensor, compliance: Tensor, weights: Tensor) -> float:
    """The number b for which the mean of σ(logits + b) is that of the labels, by bisection.

    Args:
        logits, compliance, weights: [n]; weights of both means.
    """
    logits, weights = logits.double(), weights.double() / weights.double().sum()
    rate = (weights * compliance.double()).sum().clamp(RARE, 1 - RARE)
    low, high = -SHIFTED - logits.max(), SHIFTED - logits.min()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if (weights * (logits + middle).sigmoid()).sum() > rate else (middle, high)
    return ((low + high) / 2).item()
