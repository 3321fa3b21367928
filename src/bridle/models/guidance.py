"""NADO decoding: at each step, sample from q(v|s) ∝ p(v|s)·R(s∘v)^η instead of p (NeurIPS 2022)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from math import inf
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from bridle.core.tokens import positions
from bridle.errors import UserError
from bridle.models.auxiliary import AuxiliaryModel, fingerprint, load_auxiliary
from bridle.models.forward import CACHE
from bridle.models.hidden import HiddenStates, capture_hidden_states, causal_lm
from bridle.models.sampling import selects_rows

logger = logging.getLogger(__name__)


class NADOLogitsProcessor(LogitsProcessor):
    """Turns the logits of `model.generate` into log q, or with `violate` into log q⁻: q⁻(v|s) ∝ p(v|s)·(1 − R(s∘v))^η.

    An auxiliary without a network of its own reads the hidden states of the forward that computed the scores. One with
    its own network keeps a cache and reads only the new tokens; a recurrent network has none, and reads all tokens at
    each step. From one token to the next, rows may be reordered (beam search) or left out; other rows make it start
    over, as completions that begin there.

    Args:
        auxiliary: R.
        hidden: from `capture_hidden_states` around `generate`.
        attention_mask: [batch, time] of the prompts.
        guidance_scale: η, the strength of the guidance.
        violate: guide to where R expects a violation.
    """

    def __init__(
        self,
        auxiliary: AuxiliaryModel,
        hidden: HiddenStates,
        attention_mask: Tensor,
        guidance_scale: float = 1.0,
        violate: bool = False,
    ):
        self.auxiliary, self.hidden, self.how = auxiliary, hidden, (guidance_scale, violate)
        self.attention_mask = attention_mask
        self._seen: Tensor | None = None  # the last call's tokens, [batch, time]
        self._mask = attention_mask  # of the prompts of those rows
        self._cache: DynamicCache | None = None  # of its own network
        self._kept: Tensor | None = None  # by the memory, [batch, width]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[batch, time], [batch, vocabulary] -> log q, or log q⁻, [batch, vocabulary]."""
        return self.auxiliary.log_q(self.features(input_ids), scores, *self.how).to(scores.dtype)

    def features(self, input_ids: Tensor) -> Tensor:
        """What R reads of each row, right after the model ran on its last tokens. [batch, time] -> [batch, width]"""
        parents = self._parents(input_ids)
        states = self._borrowed_states() if self.auxiliary.network is None else self._own_states(input_ids, parents)
        return self._features(states, parents)

    def _parents(self, input_ids: Tensor) -> Tensor | None:
        """Which row of the last call each row continues, [batch]; None where one continues none of them."""
        seen, self._seen = self._seen, input_ids
        if seen is None or seen.shape[1] + 1 != input_ids.shape[1]:
            return None
        before = input_ids[:, :-1]
        if torch.equal(before, seen):
            return torch.arange(len(seen), device=seen.device)
        names = torch.cat([seen, before]).unique(dim=0, return_inverse=True)[1]  # a number for each different row
        same = names[len(seen) :, None] == names[: len(seen)]
        return same.int().argmax(-1) if same.any(-1).all() else None

    def _borrowed_states(self) -> Tensor:
        """The guided model's states at the last token, [batch, hidden]."""
        assert self.hidden.last is not None
        return self.auxiliary.states(self.hidden.last[:, -1])

    def _own_states(self, input_ids: Tensor, parents: Tensor | None) -> Tensor:
        """States of the auxiliary's own network at the last token, [batch, hidden]."""
        new = input_ids
        if parents is None:
            self._cache = _new_cache(self.auxiliary.network)
            self._mask = self.attention_mask.repeat_interleave(len(input_ids) // len(self.attention_mask), dim=0)
        else:
            self._mask = self._mask[parents]
            if self._cache is not None:
                self._cache.reorder_cache(parents)
                new = input_ids[:, -1:]
        mask = torch.cat([self._mask, self._mask.new_ones(len(new), input_ids.shape[1] - self._mask.shape[1])], dim=1)
        cached = {"use_cache": False} if self._cache is None else {"use_cache": True, CACHE: self._cache}
        return self.auxiliary.states(None, new, mask, position_ids=positions(mask)[:, -new.shape[1] :], **cached)[:, -1]

    def _features(self, states: Tensor, parents: Tensor | None) -> Tensor:
        """What R reads: the states with what the memory has kept. [batch, hidden] -> [batch, width]"""
        assert self.hidden.last is not None
        if (memory := self.auxiliary.memory) is not None:
            entries = memory.entries(states)
            self._kept = entries if parents is None or self._kept is None else entries.maximum(self._kept[parents])
        return self.auxiliary.joined(states, self._kept, self.hidden.last[:, -1])


def _new_cache(network: PreTrainedModel) -> DynamicCache | None:
    """An empty cache for a network; None for one that keeps recurrent states, whose rows cannot be reordered."""
    if CACHE not in signature(network.forward).parameters:
        return None
    cache = DynamicCache(config=network.config)
    return cache if selects_rows(cache) else None


class NADOGuide:
    """Guides a model's sampling by an auxiliary: the `guide` of `sample`, inside the guide's `with` block.

    Args:
        model: the causal language model.
        auxiliary: R, fitted on that model.
        guidance_scale: η, the strength of the guidance.
        violate: sample to where R expects a violation.
    """

    def __init__(
        self, model: PreTrainedModel, auxiliary: AuxiliaryModel, guidance_scale: float = 1.0, violate: bool = False
    ):
        self.model, self.auxiliary, self.guidance_scale, self.violate = model, auxiliary, guidance_scale, violate
        self._capture = capture_hidden_states(model)

    def __enter__(self) -> "NADOGuide":
        self._hidden = self._capture.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._capture.__exit__(*exc)  # type: ignore[arg-type]

    def processors(self, attention_mask: Tensor) -> LogitsProcessorList:
        """Processors for a left-padded batch of prompts, [batch, time]."""
        options = self.guidance_scale, self.violate
        return LogitsProcessorList([NADOLogitsProcessor(self.auxiliary, self._hidden, attention_mask, *options)])

    @torch.no_grad()
    def log_probs(
        self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor, begins: Tensor | None = None
    ) -> Tensor:
        """log q, or log q⁻, at every position, right after the model ran on `input_ids`: [batch, time, vocabulary].

        Args:
            logits: [batch, time, vocabulary] of the model.
            input_ids, attention_mask, begins: [batch, time], as in `AuxiliaryModel.features`.
        """
        features = self._features(input_ids, attention_mask, begins)
        return self.auxiliary.log_q(features, logits, self.guidance_scale, self.violate)

    @torch.no_grad()
    def compliance(
        self, logits: Tensor, input_ids: Tensor, attention_mask: Tensor, begins: Tensor | None = None
    ) -> Tensor:
        """R of every prefix followed by every token, right after the model ran: [batch, time, vocabulary].

        Args:
            logits: [batch, time, vocabulary] of the model.
            input_ids, attention_mask, begins: [batch, time], as in `AuxiliaryModel.features`.
        """
        features = self._features(input_ids, attention_mask, begins)
        return self.auxiliary(features, anchor_logits=logits).float().sigmoid()

    def _features(self, input_ids: Tensor, attention_mask: Tensor, begins: Tensor | None) -> Tensor:
        assert self._hidden.last is not None
        return self.auxiliary.features(self._hidden.last, input_ids, attention_mask, begins)


def check_scale(guidance_scale: float) -> None:
    """Refuses a guidance scale below 0, or one that is not finite.

    Raises:
        UserError: it is.
    """
    if not 0 <= guidance_scale < inf:
        raise UserError(f"guidance_scale: must be a finite number, 0 or more, not {guidance_scale}")


def load_guide(folder: str | Path, model: PreTrainedModel | PeftModel) -> AuxiliaryModel:
    """Loads the auxiliary of a folder for a model; warns if it was fitted on another one.

    Raises:
        UserError: as `load_auxiliary`.
    """
    loaded = load_auxiliary(folder, causal_lm(model))
    fits = {loaded.config.provenance.get(key) for key in ("fitted_on", "trained_model")} - {None}
    if fits and model.dtype != torch.float16 and fingerprint(model) not in fits:
        logger.warning("%s: R was fitted on another model, and its guidance may be wrong for this one", folder)
    return loaded


@contextmanager
def guided(model: PreTrainedModel, auxiliary: str | None, guidance_scale: float = 1.0) -> Iterator[NADOGuide | None]:
    """The guide of an auxiliary's folder for a model; None without a folder.

    Raises:
        UserError: the folder holds no auxiliary for this model; the guidance scale is below 0 or not finite.
    """
    check_scale(guidance_scale)
    if auxiliary is None:
        yield None
        return
    with NADOGuide(model, load_guide(auxiliary, model), guidance_scale) as guide:
        yield guide
