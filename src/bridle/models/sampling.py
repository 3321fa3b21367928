"""One interface for drawing text from a model: as it is, at temperature 1, where no other `Decoding` is asked for.

R is fitted on these samples, and anything but the model's own distribution would bias it.
"""

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from bridle.core.tokens import pad_left
from bridle.errors import RunStopped, UserError
from bridle.models.forward import mixed_precision
from bridle.models.hidden import causal_lm, last_positions
from bridle.models.sharding import is_sharded
from bridle.utils.distributed import gathered, turns
from bridle.utils.oom import RowLimit
from bridle.utils.progress import Progress

SHORTEST_STAGE, STAGES = 8, 8  # tokens, and how often at most, after which rows that have ended are dropped


class Guide(Protocol):
    """Makes the logits processors of one batch of prompts; `NADOGuide` is one."""

    def processors(self, attention_mask: Tensor) -> LogitsProcessorList:
        """Processors for a left-padded batch with this attention mask, [batch, time]."""
        ...


@dataclass(frozen=True)
class Trace:
    """How a completion was drawn.

    Attributes:
        log_probs: of each token, in nats, under the distribution that it was drawn from.
        states: [tokens, hidden] on the CPU, the hidden states that the tokens were drawn from; None where another
            process drew it.
    """

    log_probs: list[float]
    states: Tensor | None


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen from the distribution, a guided one included; by default it is drawn from the whole.

    Attributes:
        temperature: divides the log-probabilities; above 0.
        top_p: draw from the likeliest tokens only, as many as have this probability together.
        greedy: take the likeliest token.

    Raises:
        UserError: a number out of its range, or `greedy` beside another choice; the message begins with the field.
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

    def processors(self) -> list[LogitsProcessor]:
        """What is done to the log-probabilities, after guidance."""
        if self.greedy:
            return [TopPLogitsWarper(0.0)]  # it keeps one token
        warmed = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
        return [*warmed, TopPLogitsWarper(self.top_p)] if self.top_p != 1 else warmed


class InverseTransform(LogitsProcessor):
    """Draws the next token by one uniform number a row, and leaves `generate` no other choice.

    `generate` itself draws one exponential number for every token of the vocabulary, which takes a third of
    the time of sampling from a small model on a CPU.

    Args:
        uniform: [steps, batch] numbers in [0, 1), for one token after the other.
        on_token: is called with the token of each row, [batch], as it is drawn.

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
                "sampling: the model's probabilities are not finite, so its weights are broken or half precision does "
                "not hold them; go back to an earlier checkpoint, or try dtype: float32"
            )
        token = torch.searchsorted(cumulative, next(self.uniform)[:, None] * cumulative[:, -1:], right=True)
        self.log_probs.append(probabilities.gather(1, token)[:, 0].log())
        if self.on_token is not None:
            self.on_token(token[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


DRAWN = Decoding()
"""From the whole distribution, as it is."""


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
    decoding: Decoding = DRAWN,
    dtype: torch.dtype | None = None,
    description: str = "sampling",
    share: bool = False,
    traces: dict[int, Trace] | None = None,
    on_batch: Callable[[dict[int, list[int]]], None] | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """Draws one completion for each prompt.

    A batch that does not fit into memory is drawn in parts, and so are those after it. Each row has its numbers from
    the batch's seed beforehand, so that it says the same in a part: but for rounding, which moves a token whose number
    falls on the border of two.

    Args:
        model: a causal language model, `peft` or not.
        prompts: token ids, each prompt at least one token (the beginning-of-text token will do).
        max_new_tokens: a completion that has not ended by then is cut.
        pad_token_id: fills rows on the left; may be an end token.
        end_token_ids: each ends a completion, and is its last token where it was drawn; see `end_token_ids`.
        batch_size: prompts drawn at a time; prompts of like length go together.
        seed: the same seed, prompts and batch size draw the same completions.
        guide: changes the distribution at each step (NADO decoding).
        decoding: how tokens are chosen from it.
        dtype: of mixed precision, as in `policy_forward`.
        description: for the progress display.
        share: among all processes of the run, which must then all call this, draw the same completions as one would.
        traces: is filled, by the prompt's index, with how each completion was drawn.
        on_batch: is called with the completions of each batch that this process draws, by the prompts' indices, as
            soon as they are there.
        on_token: is called with the tokens of each step, [batch], of the rows that go on; nothing else is then shown.

    Returns:
        Completions as token ids, in the order of the prompts.
    """
    config = GenerationConfig(
        do_sample=False,  # `InverseTransform` draws, from the whole distribution
        pad_token_id=pad_token_id,
        eos_token_id=list(end_token_ids),
        return_dict_in_generate=True,
    )
    limit = RowLimit(description, can_cut=not is_sharded(model))
    draw = partial(_draw, model, guide, config, decoding, on_token, traces is not None)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = turns(len(batches)) if share else range(len(batches))
    completions: dict[int, list[int]] = {}
    with (
        _plain_generation(model),
        mixed_precision(model, dtype),
        Progress(description, sum(len(batches[index]) for index in mine), "texts", on_token is None) as progress,
    ):
        for number in mine:
            batch = batches[number]
            generator = torch.Generator(model.device)
            generator.manual_seed(zlib.crc32(f"{seed}/{number}".encode()))  # whoever draws it, it is the same
            uniform = torch.rand(
                max_new_tokens, len(batch), dtype=torch.float64, device=model.device, generator=generator
            )
            rows = [(prompts[index], numbers) for index, numbers in zip(batch, uniform.T, strict=True)]
            drawn = chain.from_iterable(limit.run(draw, rows))
            for index, (completion, trace) in zip(batch, drawn, strict=True):
                completions[index] = completion
                if traces is not None:
                    traces[index] = trace
            if on_batch is not None:
                on_batch({index: completions[index] for index in batch})
            progress.update(len(batch))
    for part in gathered(completions) if share else []:
        completions |= part
    if traces is not None and share:
        log_probs = {index: trace.log_probs for index, trace in traces.items()}
        for known in gathered(log_probs):
            traces |= {index: Trace(drawn, None) for index, drawn in known.items() if index not in traces}
    return [completions[index] for index in range(len(prompts))]


def _draw(
    model: PreTrainedModel,
    guide: Guide | None,
    config: GenerationConfig,
    decoding: Decoding,
    on_token: Callable[[Tensor], None] | None,
    keep_states: bool,
    rows: Sequence[tuple[Sequence[int], Tensor]],
) -> list[tuple[list[int], Trace]]:
    """Completions of prompts, each with the numbers that draw it, [steps]; and how they were drawn.

    `generate` carries rows that have ended along to the end of the last one, so it is called for some tokens at a time,
    and goes on with the others.
    """
    ids, mask = (part.to(model.device) for part in pad_left([list(prompt) for prompt, _ in rows], config.pad_token_id))
    uniform = torch.stack([numbers for _, numbers in rows], dim=-1)
    ends = frozenset(config.eos_token_id)
    ends_there = torch.tensor(config.eos_token_id, device=model.device)
    # All processes that share a model in shards must call it equally often.
    stage = len(uniform) if is_sharded(model) else max(SHORTEST_STAGE, len(uniform) // STAGES)
    completions: list[list[int]] = [[] for _ in rows]
    log_probs: list[list[float]] = [[] for _ in rows]
    states: list[list[Tensor]] = [[] for _ in rows]
    going_on, cache = torch.arange(len(rows), device=model.device), None
    for numbers in uniform.split(stage):
        config.max_new_tokens = len(numbers)
        processors = [*(guide.processors(mask) if guide else []), *decoding.processors()]
        transform = InverseTransform(numbers[:, going_on], on_token)
        with last_positions(model) as steps:
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=config,
                logits_processor=LogitsProcessorList([*processors, transform]),
                synced_gpus=is_sharded(model) or None,  # all go on until all have ended
            )
        new = output.sequences[:, ids.shape[1] :]
        drawn_from = torch.stack(steps, dim=1).cpu() if keep_states else None  # [rows, steps, hidden]
        likely = torch.stack(transform.log_probs, dim=1).tolist()
        for place, (row, tokens) in enumerate(zip(going_on.tolist(), new.tolist(), strict=True)):
            tokens = _until_end(tokens, ends)
            completions[row] += tokens
            log_probs[row] += likely[place][: len(tokens)]
            if drawn_from is not None:
                states[row].append(drawn_from[place, : len(tokens)].clone())  # and not the filling behind it
        open_ended = (~torch.isin(new, ends_there)).all(-1).nonzero()[:, 0]
        if not len(open_ended):
            break
        cache = _only(output.past_key_values, open_ended)
        ids, going_on = output.sequences[open_ended], going_on[open_ended]
        mask = torch.cat([mask, mask.new_ones(new.shape)], dim=1)[open_ended]
    traces = [Trace(p, torch.cat(s) if s else None) for p, s in zip(log_probs, states, strict=True)]
    return list(zip(completions, traces, strict=True))


def _only(cache: Any, rows: Tensor) -> Any:
    """A cache of some rows; None, so that it is made anew, where the model's kind cannot be cut."""
    if not hasattr(cache, "batch_select_indices"):
        return None
    cache.batch_select_indices(rows)
    return cache


def _until_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Cuts the filling after the first end token; what comes before it was drawn."""
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Hides the model's own generation settings, which would fill in what ours leave open."""
    lm, training = causal_lm(model), model.training
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    model.eval()  # no dropout, and no gradient checkpointing, which would rule out the KV cache
    try:
        yield
    finally:
        lm.generation_config = own
        model.train(training)
