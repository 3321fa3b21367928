"""Sampling text from a model: from its own distribution, unless a `Guide` or a `Decoding` changes that.

R is fitted on these samples, and any other distribution would bias it.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from bridle.core.tokens import pad_left
from bridle.errors import RunStopped, UserError
from bridle.models.forward import CACHE, mixed_precision
from bridle.models.hidden import causal_lm, contiguous_states, evaluation_mode, last_positions
from bridle.models.sharding import is_sharded
from bridle.utils.distributed import all_gather, turns
from bridle.utils.oom import RowLimit
from bridle.utils.progress import Progress

SHORTEST_STAGE, STAGES = 8, 8  # tokens of a stage at least, and stages at most; see `_draw`
SELECTABLE = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)  # kinds of layers, their subclasses not included


class Guide(Protocol):
    """Makes the logits processors for a batch of prompts; `NADOGuide` is one."""

    def processors(self, attention_mask: Tensor) -> LogitsProcessorList:
        """Processors for a left-padded batch with this attention mask, [batch, time]; rows that end are left out."""
        ...


@dataclass(frozen=True)
class Trace:
    """How a completion was drawn.

    Attributes:
        tokens: of the completion.
        log_probs: of each token, in nats, under the distribution that it was drawn from.
        states: [tokens, hidden] on the CPU, the hidden states that the tokens were drawn from; None where another
            process drew them, or nothing reads them.
        is_exact: whether they were drawn by the model's own probabilities, not by another engine's.
    """

    tokens: list[int]
    log_probs: list[float]
    states: Tensor | None
    is_exact: bool = True


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen from the model's or the guide's distribution; by default, drawn from all of it.

    Attributes:
        temperature: divides the log-probabilities; above 0.
        top_p: draw from the likeliest tokens only, as many as together have this probability.
        greedy: take the likeliest token.

    Raises:
        UserError: a number out of range, or `greedy` with another choice; the message begins with the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < inf:
            raise UserError(f"temperature: must be a finite number above 0, not {self.temperature}; or decode greedily")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: must be above 0 and at most 1, not {self.top_p}")
        if self.greedy and (self.temperature, self.top_p) != (1, 1):
            raise UserError("greedy: takes the likeliest token whatever temperature and top_p are; leave them out")

    def __str__(self) -> str:
        return "greedy" if self.greedy else f"temperature {self.temperature:g}, top-p {self.top_p:g}"

    def processors(self) -> list[LogitsProcessor]:
        """What changes the log-probabilities, after guidance."""
        if self.greedy:
            return [TopPLogitsWarper(0.0)]  # it keeps one token
        tempered = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
        return [*tempered, TopPLogitsWarper(self.top_p)] if self.top_p != 1 else tempered


DRAWN = Decoding()
"""From the whole distribution, unchanged."""


class InverseTransform(LogitsProcessor):
    """Draws the next token of each row by one uniform number, and leaves `generate` no other choice.

    `generate` itself draws an exponential number for every token of the vocabulary, a third of the time of sampling
    from a small model on a CPU.

    Args:
        uniform: [steps, batch] numbers in [0, 1).
        on_token: called with the tokens of each step, [batch].

    Attributes:
        log_probs: of the tokens drawn so far, in nats: [batch] for each step.
    """

    def __init__(self, uniform: Tensor, on_token: Callable[[Tensor], None] | None = None):
        self.uniform, self.on_token = iter(uniform), on_token
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[batch, time], [batch, vocabulary] -> 0 at the token drawn and −∞ elsewhere, [batch, vocabulary]."""
        # Summed in float64, so that a large vocabulary's rare tokens keep their probability.
        probabilities = scores.float().softmax(dim=-1)
        cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
        if not cumulative[:, -1].isfinite().all():
            raise RunStopped(
                "sampling: the model's probabilities are not finite, so its weights are broken or overflow in half "
                "precision; go back to an earlier checkpoint, or try dtype: float32"
            )
        token = torch.searchsorted(cumulative, next(self.uniform)[:, None] * cumulative[:, -1:], right=True)
        self.log_probs.append(probabilities.gather(1, token)[:, 0].log())
        if self.on_token is not None:
            self.on_token(token[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class Leading(LogitsProcessor):
    """Applies processors to the first tokens of each row only.

    Args:
        processors: of a guide.
        steps: [batch], for how many tokens.
    """

    def __init__(self, processors: LogitsProcessorList, steps: Tensor):
        self.processors, self.steps = processors, steps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[batch, time], [batch, vocabulary] -> [batch, vocabulary]."""
        chosen, self.steps = self.steps > 0, self.steps - 1
        return torch.where(chosen[:, None], self.processors(input_ids, scores), scores)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pad_token_id: int,
    end_token_ids: Sequence[int],
    batch_size: int = 64,
    seed: int = 0,
    guide: Guide | None = None,
    guided_tokens: Sequence[int] | None = None,
    decoding: Decoding = DRAWN,
    dtype: torch.dtype | None = None,
    description: str = "sampling",
    share: bool = False,
    traces: dict[int, Trace] | None = None,
    keep_states: bool = False,
    on_batch: Callable[[dict[int, list[int]]], None] | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """Draws one completion for each prompt: token ids, in the order of the prompts.

    A batch that does not fit into memory is drawn in parts, with the same random numbers for each row.

    Args:
        prompts: token ids, at least one for each prompt (the beginning-of-text token will do).
        max_new_tokens: a completion that has not ended by then is cut.
        pad_token_id: fills rows on the left; may be an end token.
        end_token_ids: each ends a completion and is its last token.
        batch_size: prompts drawn at a time, those of similar length together.
        seed: the same seed, prompts and batch size draw the same completions.
        guide: changes the distribution at each step (NADO decoding).
        guided_tokens: for each prompt, how many first tokens the guide changes; all if not given.
        dtype: of mixed precision, as in `policy_forward`.
        share: all processes call this; each draws a part of the batches and returns all completions.
        traces: is filled, by the prompt's index, with how each completion was drawn, and its states if `keep_states`.
        on_batch: called with the completions of each batch of this process, by the prompt's index.
        on_token: called with the tokens of each step, [batch], of the rows that continue; hides the progress display.
    """
    draw = partial(_draw, model, guide, decoding, pad_token_id, end_token_ids, on_token, keep_states)
    limit = _row_limit(model, description, max(map(len, prompts), default=0) + max_new_tokens)
    steps = [max_new_tokens] * len(prompts) if guided_tokens is None else guided_tokens
    batches = _batches(prompts, batch_size, share)
    drawn = {} if traces is None else traces
    with (
        _plain_generation(model),
        contiguous_states(model),
        mixed_precision(model, dtype),
        Progress(description, sum(map(len, batches.values())), "texts", on_token is None) as progress,
    ):
        for number, batch in batches.items():
            numbers = _uniform(f"{seed}/{number}", max_new_tokens, len(batch), model.device)
            rows = [(prompts[index], row, steps[index]) for index, row in zip(batch, numbers.T, strict=True)]
            drawn.update(zip(batch, chain.from_iterable(limit.run(draw, rows)), strict=True))
            if on_batch is not None:
                on_batch({index: drawn[index].tokens for index in batch})
            progress.update(len(batch))
    if share:
        _agree(drawn)
    return [drawn[index].tokens for index in range(len(prompts))]


def _agree(drawn: dict[int, Trace]) -> None:
    """Gives every process all traces. Of a batch that several drew, which may round differently, the first one's count.

    States stay where they were computed.
    """
    agreed: dict[int, Trace] = {}
    for part in reversed(all_gather({index: replace(trace, states=None) for index, trace in drawn.items()})):
        agreed |= part
    drawn |= {
        index: trace
        for index, trace in agreed.items()
        if index not in drawn or replace(drawn[index], states=None) != trace
    }


def _batches(prompts: Sequence[Sequence[int]], size: int, share: bool) -> dict[int, list[int]]:
    """This process's batches by number: the indices of prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return {number: batches[number] for number in (turns(len(batches)) if share else range(len(batches)))}


def _row_limit(model: PreTrainedModel, description: str, tokens: int) -> RowLimit:
    """How many rows of `tokens` tokens fit, by a row's keys and values, its logits and their probabilities."""
    size = row_bytes(causal_lm(model).config.get_text_config(), tokens, model.dtype)
    return RowLimit(description, not is_sharded(model), size, model.device)


def row_bytes(config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a row of `tokens` tokens while it is drawn: its keys and values, its logits and their probabilities."""
    size, heads = config.hidden_size, getattr(config, "num_attention_heads", 1)  # a state-space model has none
    kept = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or size // heads
    return 2 * config.num_hidden_layers * kept * width * tokens * dtype.itemsize + 32 * config.vocab_size


def _uniform(seed: str, steps: int, rows: int, device: torch.device) -> Tensor:
    """The random numbers of a batch, the same on every process: [steps, rows] in [0, 1)."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(seed.encode()))
    return torch.rand(steps, rows, dtype=torch.float64, device=device, generator=generator)


def _draw(
    model: PreTrainedModel,
    guide: Guide | None,
    decoding: Decoding,
    pad_token_id: int,
    end_token_ids: Sequence[int],
    on_token: Callable[[Tensor], None] | None,
    keep_states: bool,
    rows: Sequence[tuple[Sequence[int], Tensor, int]],
) -> list[Trace]:
    """Draws completions of prompts, each with its own random numbers, [steps], and number of guided tokens.

    `generate` computes every row until the last one ends. So it draws one stage of tokens at a time, and each stage
    continues only the rows that have not ended.
    """
    ids, mask = (part.to(model.device) for part in pad_left([list(prompt) for prompt, _, _ in rows], pad_token_id))
    uniform = torch.stack([numbers for _, numbers, _ in rows], dim=-1)
    guided = torch.tensor([steps for _, _, steps in rows], device=model.device)
    ends = torch.tensor(list(end_token_ids), device=model.device)
    # Processes that share a sharded model must call it equally often.
    stage = len(uniform) if is_sharded(model) else max(SHORTEST_STAGE, len(uniform) // STAGES)
    guiding = guide.processors(mask) if guide else None
    drawn: list[list[Trace]] = [[] for _ in rows]  # by row and stage
    continuing, cache = torch.arange(len(rows), device=model.device), None
    for numbers in uniform.split(stage):
        transform = InverseTransform(numbers[:, continuing], on_token)
        leading = [] if guiding is None else [Leading(guiding, guided[continuing])]
        processors = [*leading, *decoding.processors(), transform]
        config = GenerationConfig(
            do_sample=False,  # `InverseTransform` draws
            max_new_tokens=len(numbers),
            pad_token_id=pad_token_id,
            eos_token_id=list(end_token_ids),
            return_dict_in_generate=True,
        )
        with last_positions(model) as states:
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                **{CACHE: cache},
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                synced_gpus=is_sharded(model) or None,  # no process stops before all rows have ended
            )
        new = output.sequences[:, ids.shape[1] :]
        before_end = (torch.isin(new, ends).cumsum(-1) == 0).sum(-1)  # tokens; what follows the end token is padding
        hidden = torch.stack(states, dim=1).cpu() if keep_states else None
        traces = _traces(new, torch.stack(transform.log_probs, dim=1), hidden, before_end + 1)
        for row, trace in zip(continuing.tolist(), traces, strict=True):
            drawn[row].append(trace)
        open_rows = (before_end == new.shape[1]).nonzero()[:, 0]
        if not len(open_rows):
            break
        cache = _select_rows(output.get(CACHE), open_rows)
        ids, continuing, guided = output.sequences[open_rows], continuing[open_rows], guided - len(numbers)
        mask = torch.cat([mask, mask.new_ones(new.shape)], dim=1)[open_rows]
    return [_joined(stages) for stages in drawn]


def _traces(tokens: Tensor, log_probs: Tensor, states: Tensor | None, lengths: Tensor) -> list[Trace]:
    """The first `lengths` tokens of each row. [rows, steps], [rows, steps], [rows, steps, hidden], [rows]"""
    rows = zip(tokens.tolist(), log_probs.tolist(), lengths.tolist(), strict=True)
    return [
        Trace(ids[:length], likely[:length], None if states is None else states[row, :length].clone())
        for row, (ids, likely, length) in enumerate(rows)
    ]


def _joined(stages: Sequence[Trace]) -> Trace:
    states = [stage.states for stage in stages if stage.states is not None]
    return Trace(
        [token for stage in stages for token in stage.tokens],
        [log_prob for stage in stages for log_prob in stage.log_probs],
        torch.cat(states) if states else None,
    )


def _select_rows(cache: Any, rows: Tensor) -> Any:
    """A cache of some rows; None, so that `generate` makes a new one, for a kind of cache that cannot select rows."""
    if not selects_rows(cache):
        return None
    cache.batch_select_indices(rows)
    return cache


def selects_rows(cache: Any) -> bool:
    """Whether a cache holds keys and values alone: methods that select rows leave recurrent states as they are."""
    return type(cache) is DynamicCache and all(type(layer) in SELECTABLE for layer in cache.layers)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Hides the model's own generation settings, which would fill in what ours leave open.

    No experts are balanced either: `transformers` takes the mask of all tokens for that of the new ones, and fails.
    """
    lm = causal_lm(model)
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    config = lm.config.get_text_config()
    balances = getattr(config, "output_router_logits", False)
    if balances:
        config.output_router_logits = False
    try:
        with evaluation_mode(model):  # gradient checkpointing would rule out the KV cache
            yield
    finally:
        lm.generation_config = own
        if balances:
            config.output_router_logits = True
