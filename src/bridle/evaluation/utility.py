"""What a model knows: the exact likelihood of held-out text, per token and per byte."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.core.tokens import IGNORE, pad_right, shift
from bridle.errors import UserError
from bridle.evaluation.statistics import Estimate, estimate_ratio
from bridle.models.loading import context_length
from bridle.utils.progress import track

AdjustLogits = Callable[[Tensor, Tensor, Tensor], Tensor]

FLOATS_AT_ONCE = 2**24  # float32 logits in memory at a time, 64 MB; the model's own may be bfloat16


@dataclass(frozen=True)
class TextLikelihood:
    """How likely one text is.

    Attributes:
        nll: −log p of its predicted tokens, in nats.
        tokens: how many tokens were predicted.
        bytes: how many UTF-8 bytes those tokens stand for.
        windows: in how many windows it was read; more than 1 where it is longer than the context.
    """

    nll: float
    tokens: int
    bytes: int
    windows: int


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a set of texts, all tokens weighing the same; the intervals resample whole texts.

    Attributes:
        per_token: exp of the mean −log p of a token; it depends on the tokenizer. Its `n` counts predicted tokens, its
            `missing` the texts of which nothing was predicted.
        bits_per_byte: −log2 p over UTF-8 bytes; it compares models with different tokenizers. Its `n` counts bytes.
        texts: how many texts there were.
        windowed: how many of them are longer than the context and were read in overlapping windows.
    """

    per_token: Estimate
    bits_per_byte: Estimate
    texts: int
    windowed: int

    @classmethod
    def of(cls, texts: Sequence[TextLikelihood], *, seed: int = 0) -> "Perplexity":
        """The perplexity of texts whose likelihoods are known; `seed` is the bootstrap's."""
        read = [text for text in texts if text.tokens]
        missing = len(texts) - len(read)
        by_token = estimate_ratio([[(text.nll, text.tokens)] for text in read], missing=missing, seed=seed)
        by_byte = estimate_ratio([[(text.nll, text.bytes)] for text in read], missing=missing, seed=seed)
        return cls(
            per_token=by_token.map(math.exp),
            bits_per_byte=by_byte.map(lambda nats: nats / math.log(2)),
            texts=len(texts),
            windowed=sum(text.windows > 1 for text in texts),
        )

    def to_json(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        figures = {"per token": self.per_token, "bits per byte": self.bits_per_byte}
        return "\n".join(f"{name:<24}{value}" for name, value in figures.items())


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, seed: int = 0, **options: Any
) -> Perplexity:
    """Perplexity of `texts`: exp(Σ −log p / tokens).

    Args:
        model, tokenizer, texts: as in `likelihoods`.
        seed: of the bootstrap over texts.
        options: those of `likelihoods`.

    Raises:
        UserError: as `likelihoods`.
    """
    return Perplexity.of(likelihoods(model, tokenizer, texts, **options), seed=seed)


def likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    stride: int | None = None,
    adjust_logits: AdjustLogits | None = None,
) -> list[TextLikelihood]:
    """−log p of each text under a causal language model, in the order given.

    A text has exactly one beginning-of-text (BOS) token in front, which is given and not predicted; the
    end-of-text token is not part of it. A tokenizer without BOS leaves the first token as the one that is
    given: neither it nor its bytes count. A text longer than `max_length` is read in windows, each
    `stride` tokens further on; every token is predicted once, from all of the text before it or from the
    last `max_length - stride` tokens at least.

    Args:
        model: a causal language model; it is put into evaluation mode for the time of the call.
        tokenizer: the model's.
        texts: what is read; an empty text counts nothing.
        batch_size: windows read at once; it does not change the result.
        max_length: tokens in a window, BOS included; the model's context by default.
        stride: how far windows move, 1 to `max_length - 1`; half a window by default.
        adjust_logits: (logits [B, T, V], input_ids [B, T], attention_mask [B, T]) -> log-probabilities
            [B, T, V] of what is decoded from instead, for instance log q of a guided model.

    Raises:
        UserError: `max_length` or `stride` is out of range, or a text's likelihood is not finite.
    """
    max_length = window_length(model, max_length)
    stride = max_length // 2 if stride is None else stride
    if not 0 < stride < max_length:
        raise UserError(f"stride is {stride}; it must lie between 1 and {max_length - 1} (max_length - 1).")
    encoded = [_encode(tokenizer, text) for text in texts]
    windows = [window for index, (ids, _) in enumerate(encoded) for window in _windows(index, ids, max_length, stride)]
    nll = nll_by_text(model, windows, len(encoded), batch_size, adjust_logits)
    _check_finite(nll)
    parts = Counter(window.text for window in windows)
    return [
        TextLikelihood(nll[index], max(0, len(ids) - 1), size, parts[index])
        for index, (ids, size) in enumerate(encoded)
    ]


@dataclass(frozen=True)
class Window:
    """Tokens that are read at once.

    Attributes:
        text: index of the text they are cut from.
        ids: token ids.
        first: position of the first token that is predicted here, at least 1; those before are context.
    """

    text: int
    ids: list[int]
    first: int


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
    """Token ids with their given first token, and how many bytes the tokens after it stand for."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = len(text.encode())
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos]:  # a chat template may have written the BOS already
        return ids, size - len(tokenizer.decode(ids[:1]).encode())
    return [bos, *ids], size


def _windows(text: int, ids: list[int], max_length: int, stride: int) -> Iterator[Window]:
    done, end = 1, max_length
    while done < len(ids):
        start = max(0, min(end, len(ids)) - max_length)
        yield Window(text, ids[start:end], done - start)
        done, end = end, end + stride


def nll_by_text(
    model: PreTrainedModel,
    windows: list[Window],
    texts: int,
    batch_size: int,
    adjust_logits: AdjustLogits | None,
    description: str = "perplexity",
) -> list[float]:
    """−log p of the predicted tokens of each of so many texts, summed over its windows, in nats."""
    # Longest first: little padding, and memory runs out at once or never.
    windows = sorted(windows, key=lambda window: -len(window.ids))
    batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    nll = [0.0] * texts
    with _evaluating(model):
        for batch in track(batches, description, len(batches), unit="batches"):
            for window, value in zip(batch, _batch_nll(model, batch, adjust_logits).tolist(), strict=True):
                nll[window.text] += value
    return nll


def _batch_nll(model: PreTrainedModel, batch: list[Window], adjust_logits: AdjustLogits | None) -> Tensor:
    """[B] sums of −log p over the predicted tokens of each window."""
    input_ids, attention_mask = pad_right([window.ids for window in batch], pad=0)
    labels, _ = pad_right([[IGNORE] * window.first + window.ids[window.first :] for window in batch], pad=IGNORE)
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    if adjust_logits is not None:
        logits = adjust_logits(logits, input_ids, attention_mask)
    targets, mask = (part.to(logits.device) for part in shift(labels))
    rows = zip(logits[:, :-1], targets, mask, strict=True)
    return torch.stack([_row_nll(*row) for row in rows])


def _row_nll(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Sum of −log p over one row, with few float32 logits at a time. Shapes: [T, V], [T], [T] -> []."""
    rows = max(1, FLOATS_AT_ONCE // logits.shape[-1])
    pieces = zip(logits.split(rows), targets.masked_fill(~mask, IGNORE).split(rows), strict=True)
    losses = [F.cross_entropy(some.float(), of, ignore_index=IGNORE, reduction="sum") for some, of in pieces]
    return torch.stack(losses).double().sum()


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def window_length(model: PreTrainedModel, max_length: int | None) -> int:
    """`max_length`, or the model's context; a UserError where there is neither or it is out of range."""
    limit = context_length(model)
    max_length = limit if max_length is None else max_length
    if max_length is None:
        raise UserError("max_length must be given: the model's config does not say how long its context is.")
    if max_length < 2 or (limit and max_length > limit):
        raise UserError(f"max_length is {max_length}; it must lie between 2 and the model's context, {limit}.")
    return int(max_length)


def _check_finite(nll: list[float]) -> None:
    for index, value in enumerate(nll):
        if not math.isfinite(value):
            raise UserError(
                f"texts[{index}] has likelihood {value} under the model: its weights or its guide hold NaN, "
                "or a token it needs is ruled out."
            )
