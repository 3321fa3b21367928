"""One text, drawn token by token, with what p, q and R say at each of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.data import decode_parts
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.forward import CACHE
from bridle.models.guidance import NADOLogitsProcessor
from bridle.models.hidden import HiddenStates, capture_hidden_states
from bridle.models.loading import end_token_ids
from bridle.models.monitor import check_bound
from bridle.models.sampling import InverseTransform

SHOWN = 5  # tokens that gain most and that lose most
REDRAW = 4  # times that a stopped text is drawn again
CONTEXT = 8  # tokens before a token, from which its text is decoded


@dataclass
class Controls:
    """What may change while a text is written; the next token obeys.

    Attributes:
        guidance_scale: η of the guided variants, and of the q shown beside the others.
        temperature: divides the log-probabilities, after guidance.
        stop_below: a text whose R falls below this is drawn again, as by a `Monitor`; 0 for none.
        stopped: no further token is drawn.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    stop_below: float = 0.0
    stopped: bool = False


@dataclass(frozen=True)
class Chance:
    """A token's text and its p, q and R, all at temperature 1; q and R are None without an R."""

    text: str
    p: float
    q: float | None
    r: float | None


@dataclass(frozen=True)
class Token:
    """A token that was drawn, and those whose probability q raises and lowers most in its place."""

    drawn: Chance
    gains: list[Chance]
    losses: list[Chance]


@dataclass
class Writing:
    """A text as it is written.

    Attributes:
        model, tokenizer: that write it.
        prompt: its token ids.
        max_new_tokens: tokens at which it is cut.
        seed: the same seed draws the same text; models that agree draw the same tokens.
        auxiliary: R, which reads it; None if there is none.
        is_guided: draw from q, not from p.
        ids, tokens: what has been drawn.
        has_ended: whether it ended by itself.
        redrawn: how often it was stopped and begun again.
        is_withheld: it was stopped more than `REDRAW` times, and is empty.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: list[int]
    max_new_tokens: int
    seed: int = 0
    auxiliary: AuxiliaryModel | None = None
    is_guided: bool = False
    ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    has_ended: bool = False
    redrawn: int = 0
    is_withheld: bool = False

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._ends = end_token_ids(self.model, self.tokenizer)
        self._transform = self._draws()
        self._cache: Any = None
        self._reader: NADOLogitsProcessor | None = None
        if self.auxiliary is not None:
            self._reader = NADOLogitsProcessor(self.auxiliary, HiddenStates(), self._mask(len(self.prompt)))

    @property
    def is_finished(self) -> bool:
        """Whether no token follows."""
        return self.has_ended or self.is_withheld or len(self.ids) == self.max_new_tokens

    @property
    def text(self) -> str:
        """The completion so far."""
        return decode_parts(self.prompt, self.ids, self.tokenizer)[1]

    @torch.no_grad()
    def step(self, controls: Controls) -> None:
        """Draws the next token.

        Raises:
            UserError: R is to stop the text, and was fitted to a share.
            RunStopped: the model's probabilities are not finite.
        """
        if controls.stop_below and self.auxiliary is not None:
            check_bound(self.auxiliary)
        ids = self._tensor([*self.prompt, *self.ids])
        with capture_hidden_states(self.model) as hidden:
            output = self.model(
                input_ids=ids if self._cache is None else ids[:, -1:],
                attention_mask=self._mask(ids.shape[1]),
                use_cache=True,
                **{CACHE: self._cache},
            )
        self._cache = output[CACHE]
        log_p = output.logits[:, -1].float().log_softmax(-1)
        log_q, r = self._read(hidden, ids, log_p, controls.guidance_scale)
        scores = log_q if self.is_guided and log_q is not None else log_p
        token = int(self._transform(ids, scores / controls.temperature).argmax())
        self.tokens.append(self._token(token, log_p[0].exp(), None if log_q is None else log_q[0].exp(), r))
        self.ids.append(token)
        self.has_ended = token in self._ends
        if r is not None and r[token] < controls.stop_below:
            self._begin_again()

    def _draws(self) -> InverseTransform:
        uniform = torch.rand(self.max_new_tokens, 1, dtype=torch.float64, generator=self._generator)
        return InverseTransform(uniform.to(self.model.device))

    def _begin_again(self) -> None:
        self.ids, self.tokens, self.has_ended = [], [], False
        self.is_withheld = self.redrawn == REDRAW
        self.redrawn += not self.is_withheld
        self._transform, self._cache = self._draws(), None

    def _read(
        self, hidden: HiddenStates, ids: Tensor, log_p: Tensor, guidance_scale: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """log q [1, vocabulary] and R of each next token [vocabulary]; None without an R."""
        if self._reader is None or self.auxiliary is None:
            return None, None
        self._reader.hidden = hidden
        features = self._reader.features(ids)
        r = self.auxiliary(features, anchor_logits=log_p)[0].float().sigmoid()
        return self.auxiliary.log_q(features, log_p, guidance_scale), r

    def _token(self, token: int, p: Tensor, q: Tensor | None, r: Tensor | None) -> Token:
        def chance(of: int) -> Chance:
            known = (None if values is None else float(values[of]) for values in (q, r))
            before = [*self.prompt, *self.ids][-CONTEXT:]
            text = decode_parts(before, [of], self.tokenizer, skip_special_tokens=False)[1]
            return Chance(text, float(p[of]), *known)

        def most(shift: Tensor) -> list[Chance]:
            values, tokens = shift.topk(min(SHOWN, len(shift)))
            return [chance(int(of)) for value, of in zip(values, tokens, strict=True) if value > 0]

        return Token(chance(token), *([[], []] if q is None else [most(q - p), most(p - q)]))

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)

    def _mask(self, time: int) -> Tensor:
        return torch.ones(1, time, dtype=torch.long, device=self.model.device)
