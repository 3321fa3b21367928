"""The exact likelihood of held-out text, per token and per byte."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.core.tokens import pad_right
from bridle.errors import UserError
from bridle.evaluation.statistics import Estimate, Result, estimate_ratio
from bridle.models.hidden import evaluation_mode
from bridle.models.loading import context_length
from bridle.utils.progress import track

AdjustLogits = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

LOGITS_OF_A_BATCH = {"cpu": 2**25}  # else 2**28; 128 MB and 1 GB in float32
FLOATS_AT_ONCE = 2**24  # float32 logits in memory at a time, 64 MB; the model's own may be bfloat16


@dataclass(frozen=True)
class TextLikelihood:
    """The likelihood of one text.

    Attributes:
        nll: −log p of its predicted tokens, in nats.
        tokens: number of predicted tokens.
        bytes: number of UTF-8 bytes of those tokens.
        windows: number of windows; more than 1 where the text is longer than the context.
    """

    nll: float
    tokens: int
    bytes: int
    windows: int


@dataclass(frozen=True)
class Perplexity(Result):
    """Perplexity of a set of texts, each token with the same weight; the intervals resample whole texts.

    Attributes:
        per_token: exp of the mean −log p of a token; it depends on the tokenizer. `n` counts predicted tokens,
            `missing` texts without any.
        bits_per_byte: −log2 p over UTF-8 bytes; it compares models with different tokenizers. `n` counts bytes.
        texts: number of texts.
        windowed: number of texts longer than the context, which are read in overlapping windows.
    """

    per_token: Estimate
    bits_per_byte: Estimate
    texts: int
    windowed: int

    @classmethod
    def of(cls, texts: Sequence[TextLikelihood], *, seed: int = 0) -> "Perplexity":
        """The perplexity of texts with known likelihoods."""
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
    """−log p of each text under a causal language model, in evaluation mode.

    Each text starts with one beginning-of-text (BOS) token, which is not predicted; the end-of-text token is excluded.
    With a tokenizer without BOS, the first token is not predicted, and its bytes do not count. A text longer than
    `max_length` is read in windows that move by `stride`: every token is predicted once, from all of the text before it
    or from at least the last `max_length - stride` tokens.

    Args:
        batch_size: texts at a time; fewer where their logits would take more than 128 MB of a CPU's memory or 1 GB.
        max_length: tokens in a window, BOS included; the model's context by default.
        stride: between 1 and `max_length - 1`; half a window by default.
        adjust_logits: (logits [B, T, V], input_ids, attention_mask, begins) -> log-probabilities [B, T, V] that are
            measured instead, such as log q of a guided model; the other three are [B, T], as in
            `AuxiliaryModel.features`.

    Raises:
        UserError: `max_length` or `stride` is out of range, or a text's likelihood is not finite.
    """
    max_length = window_length(model, max_length)
    stride = max_length // 2 if stride is None else stride
    if not 0 < stride < max_length:
        raise UserError(f"stride is {stride}; it must lie between 1 and {max_length - 1} (max_length - 1)")
    encoded = [_encode(tokenizer, text) for text in texts]
    windows = [window for index, (ids, _) in enumerate(encoded) for window in _windows(index, ids, max_length, stride)]
    nll = nll_by_text(model, windows, len(encoded), batch_size, adjust_logits)
    check_finite(nll)
    parts = Counter(window.text for window in windows)
    return [
        TextLikelihood(nll[index], max(0, len(ids) - 1), size, parts[index])
        for index, (ids, size) in enumerate(encoded)
    ]


@dataclass(frozen=True)
class Window:
    """Tokens of one forward.

    Attributes:
        text: index of their text.
        ids: token ids.
        first: position of the first predicted token, at least 1; the tokens before it are context.
        begin: position of the last token that a guide takes for the prompt.
    """

    text: int
    ids: list[int]
    first: int
    begin: int = 0


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
    """Token ids with the first one, which is not predicted, and the number of bytes of the others."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = len(text.encode())
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos]:  # a chat template may have added the BOS already
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
    """−log p of the predicted tokens of each text, summed over its windows, in nats."""
    at_most = LOGITS_OF_A_BATCH.get(model.device.type, 2**28) // model.config.get_text_config().vocab_size
    batches = _batches(windows, batch_size, at_most)
    nll = [0.0] * texts
    with evaluation_mode(model), torch.inference_mode():
        for batch in track(batches, description, len(batches), unit="batches"):
            for window, value in zip(batch, _batch_nll(model, batch, adjust_logits).tolist(), strict=True):
                nll[window.text] += value
    return nll


def _batches(windows: list[Window], batch_size: int, positions: int) -> list[list[Window]]:
    """The windows in batches, longest first: little padding, and if memory runs out, it does so at once.

    Few positions at a time are fast on a CPU: 40 texts of SmolLM2 at once take six times as long as two at a time.
    """
    windows, batches = sorted(windows, key=lambda window: -len(window.ids)), []
    while windows:
        rows = max(1, min(batch_size, positions // len(windows[0].ids)))
        batches.append(windows[:rows])
        windows = windows[rows:]
    return batches


def _batch_nll(model: PreTrainedModel, batch: list[Window], adjust_logits: AdjustLogits | None) -> Tensor:
    """[B] sums of −log p over the predicted tokens of each window."""
    input_ids, attention_mask = (part.to(model.device) for part in pad_right([window.ids for window in batch], pad=0))
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    if adjust_logits is not None:
        last = torch.tensor([[window.begin] for window in batch], device=model.device)
        begins = torch.arange(input_ids.shape[1], device=model.device) == last
        logits = adjust_logits(logits, input_ids, attention_mask, begins)
    return torch.stack([_window_nll(row, window) for row, window in zip(logits, batch, strict=True)])


def _window_nll(logits: Tensor, window: Window) -> Tensor:
    """−log p of a window's predicted tokens, with few float32 logits at a time. Shapes: [T, V] -> []."""
    rows = max(1, FLOATS_AT_ONCE // logits.shape[-1])
    targets = torch.tensor(window.ids[window.first :], dtype=torch.long, device=logits.device)
    pieces = zip(logits[window.first - 1 : len(window.ids) - 1].split(rows), targets.split(rows), strict=True)
    return torch.stack([F.cross_entropy(some.float(), of, reduction="sum") for some, of in pieces]).double().sum()


def window_length(model: PreTrainedModel, max_length: int | None) -> int:
    """`max_length`, or the model's context; a `UserError` where there is neither or it is out of range."""
    limit = context_length(model)
    max_length = limit if max_length is None else max_length
    if max_length is None:
        raise UserError("max_length must be given: the model's config does not say how long its context is")
    if max_length < 2 or (limit and max_length > limit):
        raise UserError(f"max_length is {max_length}; it must lie between 2 and the model's context, {limit}")
    return int(max_length)


def check_finite(nll: Sequence[float]) -> None:
    """Raises a `UserError` that names the first text whose −log p is not finite."""
    for index, value in enumerate(nll):
        if not math.isfinite(value):
            raise UserError(
                f"texts[{index}] has likelihood {value} under the model: its weights or its guide hold NaN, "
                "or a token it needs is ruled out"
            )
