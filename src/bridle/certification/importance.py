"""Completions for a certificate: from the model, or from a mixture in which violations are frequent.

With R, whole completions can be drawn from q⁻(v|s) ∝ p(v|s)·(1 − R(s∘v)), which says what R expects to violate. From
the mixture m(y) = (1 − a)·p(y) + a·q⁻(y) a violation counts by its importance weight

    w(y) = p(y) / m(y)  ≤  1 / (1 − a),

so that the mean of w·[y violates] over m is the violation rate of p, whatever R is: a poor R only costs prompts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from bridle.core.tokens import pad_right
from bridle.data import Prompt, decode_parts
from bridle.evaluation.evaluator import COMPLETIONS_PER_ROW, Evaluator
from bridle.evaluation.prompt_sets import GenerationOptions
from bridle.evaluation.served import ServedModel
from bridle.models.auxiliary import load_auxiliary
from bridle.models.guidance import NADOGuide
from bridle.models.hidden import causal_lm, evaluation_mode
from bridle.models.loading import end_token_ids
from bridle.models.sampling import Guide, sample
from bridle.utils.progress import track

SAMPLED_PER_WEIGHED = 8  # rows of a forward: weighing needs the probabilities at all positions at once


@dataclass(frozen=True)
class Seeker:
    """Draws from a mixture of a model's distribution p and q⁻.

    Attributes:
        guide: R with `violate`, entered.
        share: a, of q⁻ in the mixture.
    """

    guide: NADOGuide
    share: float

    def draw(
        self, evaluator: Evaluator, prompts: Sequence[Prompt], how: GenerationOptions, seed: int
    ) -> list[tuple[str, float]]:
        """One completion for each prompt, each with its importance weight.

        Args:
            evaluator: the model, guided or not: p.
            how: the length and the temperature of the completions.
            seed: of the coins that choose between p and q⁻, and of the completions.
        """
        seeks = np.random.default_rng(seed).random(len(prompts)) < self.share
        tokens: dict[int, list[int]] = {}
        for part, guide in ((False, evaluator.guide), (True, _Chain(evaluator.guide, self.guide))):
            rows = np.flatnonzero(seeks == part).tolist()
            found = sample(
                evaluator.model,
                [prompts[row].ids for row in rows],
                max_new_tokens=how.max_new_tokens,
                pad_token_id=evaluator.tokenizer.pad_token_id,
                end_token_ids=end_token_ids(evaluator.model, evaluator.tokenizer),
                batch_size=COMPLETIONS_PER_ROW * evaluator.batch_size,
                seed=2 * seed + part,
                guide=guide,
                decoding=how,
                description="seeking violations" if part else "sampling",
            )
            tokens |= dict(zip(rows, found, strict=True))
        drawn = [(prompt.ids, tokens[row]) for row, prompt in enumerate(prompts)]
        ratios = self.log_ratios(evaluator, drawn, how.temperature)
        texts = [decode_parts(*both, evaluator.tokenizer)[1] for both in drawn]
        return [(text, self.weight(ratio)) for text, ratio in zip(texts, ratios, strict=True)]

    def weight(self, log_ratio: float) -> float:
        """p(y) / m(y), from log q⁻(y) − log p(y)."""
        weight = float(np.exp(-np.logaddexp(np.log1p(-self.share), np.log(self.share) + log_ratio)))
        return min(weight, 1 / (1 - self.share))  # which rounding may exceed

    @torch.no_grad()
    def log_ratios(
        self, evaluator: Evaluator, drawn: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0
    ) -> list[float]:
        """log q⁻(y) − log p(y), in nats, of completions.

        Args:
            evaluator: the model, guided or not: p.
            drawn: [n] token ids of each prompt and its completion, an end token included.
            temperature: divides the log-probabilities of both.
        """
        order = sorted(range(len(drawn)), key=lambda index: -sum(map(len, drawn[index])))
        size = max(1, evaluator.batch_size // SAMPLED_PER_WEIGHED)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        found: dict[int, float] = {}
        with evaluation_mode(evaluator.model):
            for batch in track(batches, "weighing", len(batches), unit="batches"):
                rows = self._batch(evaluator, [drawn[index] for index in batch], temperature)
                found.update(zip(batch, rows.tolist(), strict=True))
        return [found[index] for index in range(len(drawn))]

    def _batch(self, evaluator: Evaluator, drawn: list[tuple[list[int], list[int]]], temperature: float) -> Tensor:
        """[batch] log ratios, in float64."""
        model = evaluator.model
        ids, mask = (part.to(model.device) for part in pad_right([[*prompt, *rest] for prompt, rest in drawn], pad=0))
        starts = torch.tensor([len(prompt) for prompt, _ in drawn], device=model.device)[:, None]
        places = torch.arange(ids.shape[1], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        begins = places == starts - 1
        log_p = evaluator.guide.log_probs(logits, ids, mask, begins) if evaluator.guide else logits.float()
        log_q = self.guide.log_probs(log_p, ids, mask, begins)
        taken = [_taken(scores / temperature, ids) for scores in (log_q, log_p)]
        is_completion = (places >= starts) & mask.bool()
        return (taken[0] - taken[1]).double().masked_fill(~is_completion[:, 1:], 0).sum(-1)


@dataclass(frozen=True)
class _Chain:
    """Guides by one after the other."""

    first: NADOGuide | None
    second: NADOGuide

    def processors(self, attention_mask: Tensor) -> LogitsProcessorList:
        guides: list[Guide] = [self.second] if self.first is None else [self.first, self.second]
        return LogitsProcessorList([one for guide in guides for one in guide.processors(attention_mask)])


@contextmanager
def seeking(evaluator: Evaluator, auxiliary: str, share: float) -> Iterator[Seeker]:
    """A seeker by the R of a folder; raises as `load_auxiliary`."""
    loaded = load_auxiliary(auxiliary, causal_lm(evaluator.model))
    with NADOGuide(evaluator.model, loaded, violate=True) as guide:
        yield Seeker(guide, share)


def draw(
    evaluator: Evaluator | ServedModel,
    prompts: Sequence[Prompt],
    how: GenerationOptions,
    seed: int,
    seeker: Seeker | None = None,
) -> list[tuple[str, float]]:
    """One completion for each prompt, each with its weight: 1 without a seeker."""
    if seeker is not None and isinstance(evaluator, Evaluator):
        return seeker.draw(evaluator, prompts, how, seed)
    drawn = replace(evaluator, seed=seed).draw(prompts, how)
    return [(text, 1.0) for (text,) in drawn]


def _taken(scores: Tensor, ids: Tensor) -> Tensor:
    """Of each token after the first. [batch, time, vocabulary], [batch, time] -> [batch, time − 1] log-probabilities"""
    return scores[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
