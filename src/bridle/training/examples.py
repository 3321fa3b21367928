"""Training examples of R: labelled rollouts with the guided model's states."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bridle.core.decomposition import importance_weights
from bridle.core.output_layer import OutputLayer
from bridle.core.tokens import completion_positions, length_mask, pad_right
from bridle.data import Rollout
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.forward import policy_forward
from bridle.models.hidden import causal_lm, evaluation_mode, output_layer, project
from bridle.models.sampling import Trace
from bridle.models.sharding import is_sharded
from bridle.utils.oom import RowLimit
from bridle.utils.progress import track

ENCODE_BATCH = 64  # rollouts in one forward of the guided model
LOGITS_AT_ONCE = 2**23  # in a fit


@dataclass
class Examples:
    """Labelled samples for fitting R, aligned on the completion.

    Attributes:
        hidden: [n, time, hidden] states of the guided model that score each completion token.
        completion: [n, time] token ids.
        mask: [n, time], true where the completion has a token.
        compliance: [n] labels in [0, 1].
        complies: [n], the constraint's verdict.
        labelled: [n], whether the label is that of a whole output; else R's own estimate at the cut replaces it.
        weights: [n, time], weight of the label at each prefix: 1, except for samples that are replayed or that another
            engine drew, and 0 where later tokens were not p_a's own, but drawn to seek a violation.
        input_ids, attention_mask: [n, longer time] of prompt and completion.
        positions: [n, time], where in `input_ids` each completion token is predicted.
        layer: the guided model's output layer.
    """

    hidden: Tensor
    completion: Tensor
    mask: Tensor
    compliance: Tensor
    complies: Tensor
    labelled: Tensor
    weights: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    layer: OutputLayer

    def __len__(self) -> int:
        return len(self.compliance)

    def __getitem__(self, rows: Tensor | slice) -> "Examples":
        return self._each(lambda part: part[rows])

    def states(self, auxiliary: AuxiliaryModel) -> Tensor:
        """What R reads before each completion token. [n, time, width]"""
        if auxiliary.network is None:
            return auxiliary.features(self.hidden)
        read = _gather(auxiliary.states(None, self.input_ids, self.attention_mask), self.positions)
        return auxiliary.remembering(read, self.hidden)

    def to(self, device: torch.device) -> "Examples":
        """The same examples on another device."""
        return self._each(lambda part: part.to(device))

    def anchor_logits(self) -> Tensor:
        """p_a's logits before each completion token. [n, time, vocabulary]"""
        return self.layer(self.hidden).float()

    def r_taken(self, auxiliary: AuxiliaryModel, states: Tensor) -> Tensor:
        """R's logits after each completion token, from what `states` gives. [n, time, width] -> [n, time]"""
        if not auxiliary.is_log_linear:
            return auxiliary(states, self.completion)

        def part(states: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
            return auxiliary(states, tokens, self.layer(hidden))

        at_once = max(1, LOGITS_AT_ONCE // auxiliary.config.vocab_size)  # what the backward needs is computed again
        parts = zip(*(whole[self.mask].split(at_once) for whole in (states, self.hidden, self.completion)), strict=True)
        taken = torch.cat([checkpoint(part, *some, use_reentrant=False) for some in parts])
        return torch.zeros(self.mask.shape, device=taken.device).masked_scatter(self.mask, taken)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Examples":
        tensors: dict[str, Any] = {name: change(part) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **tensors)


def encode(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    pad_token_id: int,
    *,
    fresh: int | None = None,
    traces: Mapping[int, Trace] | None = None,
    label: Callable[[Rollout], float | bool | None] = lambda rollout: rollout.complies,
    bootstrap: bool = False,
    dtype: torch.dtype | None = None,
) -> Examples:
    """Prepares labelled rollouts for fitting R, on the CPU; the guided model runs at most once over each.

    Args:
        model: the guided model p_a.
        rollouts: labelled.
        pad_token_id: fills rows.
        fresh: how many of the first were drawn from p_a itself; all if not given. The others hold their tokens'
            log-probabilities at drawing.
        traces: by row, how it was drawn, for its hidden states; labels of a row that another engine drew are weighted.
        label: what R is fitted to; by default the constraint's yes or no.
        bootstrap: label a cut rollout with R's own estimate at the cut.
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
    exact = {row for row in range(fresh) if traces is None or row not in traces or traces[row].is_exact}
    if old := [row for row in range(len(rollouts)) if row not in exact]:
        weights[old] = _weights(model, [rollouts[row] for row in old], hidden[old], completion[old], mask[old], dtype)
    sought = torch.tensor([rollout.sought for rollout in rollouts])
    weights[torch.arange(mask.shape[1]) < sought[:, None] - 1] = 0  # position j scores the first j + 1 tokens
    compliance = [label(rollout) for rollout in rollouts]
    return Examples(
        hidden=hidden,
        completion=completion,
        mask=mask,
        compliance=torch.tensor(compliance, dtype=torch.float32),  # a missing one raises
        complies=torch.tensor([bool(rollout.complies) for rollout in rollouts]),
        labelled=torch.tensor([rollout.finished or not bootstrap for rollout in rollouts]),
        weights=weights,
        input_ids=input_ids,
        attention_mask=attention_mask,
        positions=at,
        layer=output_layer(model, dtype).detach(copy=is_sharded(causal_lm(model))),
    )


def split(examples: Examples, plain: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to keep back from a fit, and rows to fit on. They share no prompt, unless every prompt has too many rows.

    A hash orders the prompts, so that R's later fits keep back the same ones where prompts recur.

    Args:
        examples: from `encode`.
        plain: how many of the first rows may be kept back.
        share: of the plain rows, the most to keep back; at least one prompt remains for the fit.
        seed: of the hash; one for all fits of an R.

    Returns:
        [kept back] and [the others], indices of rows. An older row of a prompt that is kept back is in neither.
    """
    starts = (examples.positions[:, 0] + 1).tolist()
    prompts = [tuple(ids[:start]) for ids, start in zip(examples.input_ids.tolist(), starts, strict=True)]
    sizes, wanted = Counter(prompts[:plain]), round(share * plain)
    if len(sizes) == 1 or min(sizes.values(), default=0) > wanted:
        prompts = [(row,) for row in range(len(prompts))]
        sizes = Counter(prompts[:plain])
    kept_back = set[tuple[int, ...]]()
    for prompt in sorted(sizes, key=lambda prompt: blake2b(repr((seed, prompt)).encode(), digest_size=8).digest()):
        if sizes[prompt] <= wanted and len(kept_back) < len(sizes) - 1:  # else the next may be smaller
            kept_back.add(prompt)
            wanted -= sizes[prompt]
    held = torch.tensor([prompt in kept_back for prompt in prompts])
    return held[:plain].nonzero()[:, 0], (~held).nonzero()[:, 0]


def _hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    at: Tensor,
    known: Mapping[int, Tensor],
    dtype: torch.dtype | None,
) -> Tensor:
    """States at some positions of each row, [rows, time] -> [rows, time, hidden]; 0 after the known ones."""
    lm = causal_lm(model)
    hidden = torch.zeros(*at.shape, lm.config.get_text_config().hidden_size, dtype=lm.dtype)
    known = {} if is_sharded(model) else known  # processes that share a model must call it equally often
    for row, states in known.items():
        hidden[row, : len(states)] = states

    def read(batch: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(attention_mask[batch].sum(-1).max())
        on_device = (part[batch, :longest].to(model.device) for part in (input_ids, attention_mask))
        states = policy_forward(model, *on_device, dtype=dtype)
        return batch, _gather(states, at[batch].clamp(max=longest - 1).to(model.device)).to(lm.dtype).cpu()

    unknown = [row for row in attention_mask.sum(-1).argsort(stable=True).tolist() if row not in known]
    limit = RowLimit("reading the rollouts", can_cut=not is_sharded(model))
    batches = torch.tensor(unknown, dtype=torch.long).split(ENCODE_BATCH) if unknown else ()
    with evaluation_mode(model):
        for batch in track(batches, limit.work, unit="batches"):
            for rows, states in limit.run(read, batch):
                hidden[rows] = states
    return hidden


def _weights(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    hidden: Tensor,
    completion: Tensor,
    mask: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """Weights of labels of an earlier policy's rollouts. [batch, time, hidden] -> [batch, time]"""
    at_once = max(1, LOGITS_AT_ONCE // causal_lm(model).config.get_text_config().vocab_size)
    found = []
    for states, tokens in zip(hidden[mask].split(at_once), completion[mask].split(at_once), strict=True):
        logits = project(model, states.to(model.device), dtype).float()
        found.append(-F.cross_entropy(logits, tokens.to(model.device), reduction="none"))
    drawn = torch.tensor([log_prob for rollout in rollouts for log_prob in rollout.log_probs or []])
    now, then = (torch.zeros(mask.shape).masked_scatter(mask, part) for part in (torch.cat(found).cpu(), drawn))
    return importance_weights(now, then, mask)


def _gather(states: Tensor, at: Tensor) -> Tensor:
    """[batch, time, hidden] at positions [batch, time'] -> [batch, time', hidden]."""
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
