"""Fitting the auxiliary model R on one round of labelled samples, and measuring how well it is calibrated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridle.core.calibration import calibration
from bridle.core.decomposition import consistency_loss, future_weights, label_loss
from bridle.core.tokens import completion_positions, length_mask, pad_right
from bridle.data import Rollout
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.forward import policy_forward
from bridle.models.hidden import causal_lm, project
from bridle.models.sampling import Trace
from bridle.models.sharding import is_sharded
from bridle.training.config import AuxiliaryOptions
from bridle.utils.oom import RowLimit
from bridle.utils.progress import Progress, track

SumAndCount = tuple[Tensor, Tensor]

CONSISTENCY_SHARE = 4  # one row in so many pays for the whole vocabulary in a fitting step
ENCODE_BATCH = 64  # rollouts in one forward of the guided model
PREFIXES_AT_ONCE = 1024  # that go through the vocabulary together when rollouts are read


@dataclass
class Examples:
    """Labelled samples, aligned on the completion: what R is fitted on.

    Attributes:
        hidden: [n, time, hidden] states of the guided model that score each completion token.
        completion: [n, time] token ids.
        mask: [n, time], true where the completion has a token.
        compliance: [n] labels in [0, 1].
        labelled: [n], whether the label is that of a whole output; else R's own estimate at the cut takes its place.
        weights: [n, time], how much the label counts at each prefix: 1 but for replayed samples.
        input_ids, attention_mask: [n, longer time] of prompt and completion.
        positions: [n, time], where in `input_ids` each completion token is predicted.
    """

    hidden: Tensor
    completion: Tensor
    mask: Tensor
    compliance: Tensor
    labelled: Tensor
    weights: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.compliance)

    def __getitem__(self, rows: Tensor | slice) -> "Examples":
        return Examples(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> "Examples":
        """The same examples on another device."""
        return Examples(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def encode(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    pad_token_id: int,
    *,
    fresh: int | None = None,
    traces: Mapping[int, Trace] | None = None,
    soft_labels: bool = False,
    bootstrap: bool = False,
    dtype: torch.dtype | None = None,
) -> Examples:
    """What fitting R needs of labelled rollouts, on the CPU: the guided model runs once over each, or not at all.

    Args:
        model: the guided model p_a.
        rollouts: labelled.
        pad_token_id: fills rows.
        fresh: how many, the first ones, were drawn from p_a itself; all if not given. The others know how likely their
            tokens were when they were drawn.
        traces: by row, how it was drawn, for its hidden states.
        soft_labels: take the constraint's value and not its yes or no.
        bootstrap: give a rollout that was cut no label but R's own estimate at the cut.
        dtype: of mixed precision, as in `policy_forward`.
    """
    fresh = len(rollouts) if fresh is None else fresh
    rows = [rollout.prompt_ids + rollout.completion_ids for rollout in rollouts]
    input_ids, attention_mask = pad_right(rows, pad_token_id)
    lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
    prompt_lengths = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts])
    mask = length_mask(lengths, int(lengths.max()))
    at = completion_positions(prompt_lengths, mask.shape[1]).clamp(max=input_ids.shape[1] - 2)
    completion = input_ids.gather(1, at + 1)
    known = {row: trace.states for row, trace in (traces or {}).items() if trace.states is not None}
    hidden = _hidden_states(model, input_ids, attention_mask, at, known, dtype)
    weights = torch.ones(mask.shape)
    if fresh < len(rollouts):
        old = slice(fresh, None)
        weights[old] = _weights(model, rollouts[old], hidden[old], completion[old], mask[old], dtype)
    compliance = [rollout.value if soft_labels else rollout.complies for rollout in rollouts]
    return Examples(
        hidden=hidden,
        completion=completion,
        mask=mask,
        compliance=torch.tensor(compliance, dtype=torch.float32),  # a missing one raises
        labelled=torch.tensor([rollout.finished or not bootstrap for rollout in rollouts]),
        weights=weights,
        input_ids=input_ids,
        attention_mask=attention_mask,
        positions=at,
    )


def _hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    at: Tensor,
    known: Mapping[int, Tensor],
    dtype: torch.dtype | None,
) -> Tensor:
    """States at some positions of each row, [rows, time] -> [rows, time, hidden]; 0 behind those that are known."""
    lm = causal_lm(model)
    hidden = torch.zeros(*at.shape, lm.config.get_text_config().hidden_size, dtype=lm.dtype)
    for row, states in known.items():
        hidden[row, : len(states)] = states

    def read(batch: Tensor) -> tuple[Tensor, Tensor]:
        on_device = (part[batch].to(model.device) for part in (input_ids, attention_mask))
        states = policy_forward(model, *on_device, dtype=dtype)
        return batch, _gather(states, at[batch].to(model.device)).to(lm.dtype).cpu()

    unknown = torch.tensor([row for row in range(len(at)) if row not in known], dtype=torch.long)
    limit = RowLimit("reading the rollouts", can_cut=not is_sharded(model))
    batches = [unknown[start : start + ENCODE_BATCH] for start in range(0, len(unknown), ENCODE_BATCH)]
    training = model.training
    model.eval()
    for batch in track(batches, limit.work, unit="batches"):
        for rows, states in limit.run(read, batch):
            hidden[rows] = states
    model.train(training)
    return hidden


def _weights(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    hidden: Tensor,
    completion: Tensor,
    mask: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """How much the labels of rollouts of an earlier policy count. [batch, time, hidden] -> [batch, time]"""
    pairs = zip(hidden[mask].split(PREFIXES_AT_ONCE), completion[mask].split(PREFIXES_AT_ONCE), strict=True)
    found = []
    for states, tokens in pairs:
        logits = project(model, states.to(model.device), dtype).float()
        found.append(-F.cross_entropy(logits, tokens.to(model.device), reduction="none"))
    drawn = torch.tensor([log_prob for rollout in rollouts for log_prob in rollout.log_probs or []])
    now, then = (torch.zeros(mask.shape).masked_scatter(mask, part) for part in (torch.cat(found).cpu(), drawn))
    return future_weights(now, then, mask)


@torch.enable_grad()  # an anchor that is sampled from runs without
def fit_auxiliary(
    auxiliary: AuxiliaryModel,
    model: PreTrainedModel,
    examples: Examples,
    options: AuxiliaryOptions,
    generator: torch.Generator,
    description: str = "fitting R",
    fresh: int | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Minimises L_R = BCE + β·consistency on labelled samples (`core.decomposition`).

    Args:
        auxiliary: R, changed in place.
        model: the guided model p_a, whose next-token distribution the consistency term averages over.
        examples: from `encode`; a share of the fresh ones is kept back to measure calibration.
        options: length and rates of the fit.
        generator: orders the examples.
        fresh: how many, the first ones, were drawn from p_a itself; all if not given.
        dtype: of mixed precision, as in `policy_forward`.

    Returns:
        Losses of the last epoch, how many steps were skipped because their loss or gradient was not finite, and R's
        calibration on the examples kept back.
    """
    fresh = len(examples) if fresh is None else fresh
    order = torch.randperm(fresh, generator=generator)
    held_back = min(fresh - 1, round(options.validation_share * fresh))
    validation, fitting = order[:held_back], torch.cat([order[held_back:], torch.arange(fresh, len(examples))])
    optimizer = torch.optim.AdamW(
        auxiliary.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    steps = options.epochs * -(-len(fitting) // options.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    skipped = 0
    auxiliary.train()
    with Progress(description, steps, "steps") as progress:
        for _ in range(options.epochs):
            totals = torch.zeros(4)
            shuffled = fitting[torch.randperm(len(fitting), generator=generator)]
            for rows in shuffled.split(options.batch_size):
                losses = _fit_losses(auxiliary, model, examples[rows].to(auxiliary.device), dtype)
                if _step(auxiliary, optimizer, losses, options.consistency_weight):
                    totals += torch.stack([part.detach().float().cpu() for pair in losses for part in pair])
                else:
                    skipped += 1
                schedule.step()
                progress.update()
    auxiliary.eval()
    report = {"r_bce": _mean(totals[0], totals[1]), "r_consistency": _mean(totals[2], totals[3])}
    report |= {"r_steps_skipped": skipped, "r_kept_back": held_back}
    return report | (measure_calibration(auxiliary, examples[validation]) if held_back else {})


def _step(
    auxiliary: AuxiliaryModel, optimizer: torch.optim.Optimizer, losses: tuple[SumAndCount, SumAndCount], beta: float
) -> bool:
    """Minimises BCE + β·consistency by one step; moves nothing and returns False where it is not finite."""
    bce, consistency = losses
    loss = bce[0] / bce[1].clamp(min=1)
    loss = loss + beta * consistency[0] / consistency[1].clamp(min=1)
    optimizer.zero_grad()
    loss.backward()
    finite = bool(torch.isfinite(loss + nn.utils.clip_grad_norm_(auxiliary.parameters(), 1.0)))
    if not finite:
        optimizer.zero_grad()  # without gradients the step moves nothing
    optimizer.step()
    return finite


def _mean(total: Tensor, count: Tensor) -> float | None:
    return (total / count).item() if count else None


def _fit_losses(
    auxiliary: AuxiliaryModel, model: PreTrainedModel, batch: Examples, dtype: torch.dtype | None
) -> tuple[SumAndCount, SumAndCount]:
    """Both terms of L_R on one batch, each as (sum, count)."""
    states = _states(auxiliary, batch)
    r_taken = auxiliary(states, batch.completion)
    bce = label_loss(r_taken, batch.mask, _labels(batch, r_taken), batch.weights)
    # The whole vocabulary is the expensive part, and a mean over some of the rows serves as well.
    some = slice(0, -(-len(batch) // CONSISTENCY_SHARE))
    with torch.no_grad():
        anchor_log_probs = F.log_softmax(project(model, batch.hidden[some], dtype).float(), dim=-1)
    consistency = consistency_loss(auxiliary(states[some]), r_taken[some], anchor_log_probs, batch.mask[some])
    return bce, consistency


def _labels(batch: Examples, r_taken: Tensor) -> Tensor:
    """C where it is known, and R's own estimate at the cut where it is not. [batch, time] -> [batch]"""
    last = batch.mask.sum(-1, keepdim=True) - 1
    estimate = r_taken.detach().sigmoid().gather(1, last)[:, 0]
    return torch.where(batch.labelled, batch.compliance, estimate)


def _states(auxiliary: AuxiliaryModel, batch: Examples) -> Tensor:
    if auxiliary.network is None:
        return batch.hidden
    states = auxiliary.features(batch.hidden, batch.input_ids, batch.attention_mask)
    return _gather(states, batch.positions)


@torch.no_grad()
def measure_calibration(auxiliary: AuxiliaryModel, examples: Examples) -> dict[str, Any]:
    """Calibration of R over every prefix of labelled samples that it was not fitted on; empty where there are none."""
    examples = examples[examples.labelled.nonzero()[:, 0]]
    if not len(examples):
        return {}

    def predict(rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = examples[rows].to(auxiliary.device)
        r_taken = auxiliary(_states(auxiliary, batch), batch.completion)
        labels = batch.compliance[:, None].expand_as(r_taken)
        return r_taken.sigmoid()[batch.mask].cpu(), labels[batch.mask].cpu()

    limit = RowLimit("measuring R")
    batches = torch.arange(len(examples)).split(ENCODE_BATCH)
    predicted, labels = zip(*(part for rows in batches for part in limit.run(predict, rows)), strict=True)
    measured = calibration(torch.cat(predicted), torch.cat(labels))
    return {
        "r_brier": measured.brier,
        "r_ece": measured.expected_calibration_error,
        "r_reliability": measured.bins,
    }


def _gather(states: Tensor, at: Tensor) -> Tensor:
    """[batch, time, hidden] at positions [batch, time'] -> [batch, time', hidden]."""
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
