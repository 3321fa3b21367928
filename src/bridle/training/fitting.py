"""Fitting the auxiliary model R on one round of labelled samples (NeurIPS 2022)."""

import math
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridle.core.decomposition import consistency_loss, label_loss
from bridle.models.auxiliary import AuxiliaryModel
from bridle.training.config import AuxiliaryOptions
from bridle.training.examples import LOGITS_AT_ONCE, Examples, split
from bridle.training.measures import measure_calibration, rate_shift
from bridle.utils.progress import Progress

SumAndCount = tuple[Tensor, Tensor]
Losses = tuple[SumAndCount, ...]

CONSISTENCY_SHARE = 4  # at most one row in this many, and no more than LOGITS_AT_ONCE, serve consistency in a step
SCALE_ROWS = 256  # examples whose states' size a new R of the log-linear form measures
EMA_DECAY = 0.9  # a step, of the exponential moving average of R


@torch.enable_grad()  # an anchor that is sampled from runs without
def fit_auxiliary(
    auxiliary: AuxiliaryModel,
    examples: Examples,
    options: AuxiliaryOptions,
    generator: torch.Generator,
    description: str = "fitting R",
    plain: int | None = None,
    split_seed: int = 0,
) -> dict[str, Any]:
    """Minimises L_R = BCE + β·consistency on labelled samples (`core.decomposition`), from R shifted to their rate.

    Consistency draws R of a prefix towards the mean over next tokens, and not the mean towards R: an exponential
    moving average of R gives the mean, without gradient.

    Args:
        auxiliary: R, changed in place.
        examples: from `encode`, of the guided model p_a.
        options: length and rates of the fit.
        generator: orders the examples.
        plain: how many of the first p_a drew whole, without seeking; a share of them is kept back to measure R. All if
            not given.
        split_seed: chooses the prompts that are kept back; one for all fits of an R.

    Returns:
        Losses of the last epoch, the number of steps skipped because loss or gradient was not finite, and R's
        calibration on what was kept back.
    """
    plain = len(examples) if plain is None else plain
    validation, fitting = split(examples, plain, options.validation_share, split_seed)
    with torch.no_grad():
        auxiliary.scale_to(examples.hidden[:SCALE_ROWS][examples.mask[:SCALE_ROWS]])
        # A policy that complies more, or a new R, is off by far more than the fit's few steps move it.
        auxiliary.shift_value(rate_shift(auxiliary, examples[fitting]))
    optimizer = torch.optim.AdamW(
        auxiliary.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    steps = options.epochs * math.ceil(len(fitting) / options.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    ema, skipped = deepcopy(auxiliary), 0
    auxiliary.train()
    with Progress(description, steps, "steps") as progress:
        for _ in range(options.epochs):
            totals = torch.zeros(8)
            shuffled = fitting[torch.randperm(len(fitting), generator=generator)]
            for rows in shuffled.split(options.batch_size):
                losses = _fit_losses(auxiliary, ema, examples[rows].to(auxiliary.device))
                if _step(auxiliary, optimizer, losses, options.consistency_weight):
                    totals += torch.stack([part.detach().float().cpu() for pair in losses for part in pair])
                else:
                    skipped += 1
                _update_ema(ema, auxiliary)
                schedule.step()
                progress.update()
    auxiliary.eval()
    bce, consistency, excess, _ = ((total / count).item() if count else None for total, count in totals.view(4, 2))
    kept_back = int(examples.labelled[validation].sum())
    report = {"r_bce": bce, "r_consistency": consistency, "r_steps_skipped": skipped, "r_kept_back": kept_back}
    report |= {"r_excess": excess} if auxiliary.is_log_linear else {}
    return report | measure_calibration(auxiliary, examples[validation])


def _step(auxiliary: AuxiliaryModel, optimizer: torch.optim.Optimizer, losses: Losses, beta: float) -> bool:
    """Takes one step on BCE + β·consistency + the others; if it is not finite, changes nothing and returns False."""
    bce, consistency, *others = (total / count.clamp(min=1) for total, count in losses)
    loss = sum(others, bce + beta * consistency)
    optimizer.zero_grad()
    loss.backward()
    finite = bool(torch.isfinite(loss + nn.utils.clip_grad_norm_(auxiliary.parameters(), 1.0)))
    if not finite:
        optimizer.zero_grad()  # without gradients the step changes nothing
    optimizer.step()
    return finite


@torch.no_grad()
def _update_ema(ema: AuxiliaryModel, auxiliary: AuxiliaryModel) -> None:
    """Moves the exponential moving average towards R."""
    for mean, now in zip(ema.parameters(), auxiliary.parameters(), strict=True):
        mean.lerp_(now, 1 - EMA_DECAY)


def _fit_losses(auxiliary: AuxiliaryModel, ema: AuxiliaryModel, batch: Examples) -> Losses:
    """On one batch, each as (sum, count): BCE and consistency; what is above R = 1, and BCE of a log-linear R's value.

    The mean that consistency aims at is that of R's exponential moving average.
    """
    states = batch.states(auxiliary)
    r_taken = batch.r_taken(auxiliary, states)
    labels = _labels(batch, r_taken)
    bce = label_loss(r_taken, batch.mask, labels, batch.weights)
    # The whole vocabulary is the expensive part; a mean over some rows suffices.
    affordable = LOGITS_AT_ONCE // (batch.mask.shape[1] * auxiliary.config.vocab_size)
    some = slice(0, max(1, min(affordable, math.ceil(len(batch) / CONSISTENCY_SHARE))))
    with torch.no_grad():
        anchor_logits = batch[some].anchor_logits()
        r_logits = ema(batch[some].states(ema), anchor_logits=anchor_logits)
    consistency = consistency_loss(r_logits, r_taken[some], F.log_softmax(anchor_logits, dim=-1), batch.mask[some])
    excess = auxiliary.excess(r_taken).masked_fill(~batch.mask, 0).sum(), batch.mask.sum()
    values = auxiliary.values(states)[:, 1:]
    value = label_loss(values, batch.mask[:, 1 : values.shape[1] + 1], labels, batch.weights[:, : values.shape[1]])
    return bce, consistency, excess, value


def _labels(batch: Examples, r_taken: Tensor) -> Tensor:
    """C where it is known, else R's own estimate at the cut. [batch, time] -> [batch]"""
    last = batch.mask.sum(-1, keepdim=True) - 1
    estimate = r_taken.detach().sigmoid().gather(1, last)[:, 0]
    return torch.where(batch.labelled, batch.compliance, estimate)
