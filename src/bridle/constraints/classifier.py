"""A constraint that is a Hugging Face sequence classifier with its own tokenizer."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from inspect import signature
from itertools import chain, groupby
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bridle.constraints.base import Constraint, Score
from bridle.constraints.deadline import batches, scored
from bridle.constraints.options import Probability, Text, cause, checked
from bridle.constraints.reading import Messages, Reads, as_lines
from bridle.errors import UserError
from bridle.utils.oom import RowLimit
from bridle.utils.quiet import only_errors
from bridle.utils.safe_loading import refusal

OVERLAP = 4  # a window shares 1/OVERLAP of its tokens with the one before it

logger = logging.getLogger(__name__)


class Classifier(Constraint):
    """Scores a text by the probability P(label) of any `AutoModelForSequenceClassification`.

    The value is 1 − P(label) if the label means a violation, else P(label). P is a sigmoid for multi-label heads and
    heads with one logit, else a softmax. Weights are float32 on the CPU and of the checkpoint's type elsewhere. They
    are loaded from safetensors only, and no code of the checkpoint runs.

    A text of more than `max_length` tokens, special tokens included, is scored in windows of that length that overlap
    by a quarter; the window that complies least counts. `long_texts: truncate` scores one window only: the beginning of
    a completion, or the end if the prompt is read too; `cut_texts` counts these. A text without tokens is missing. A
    chat becomes text by the tokenizer's chat template, or as lines "role: content" if it has none.

    Args:
        model: a folder written by `save_pretrained`, or a name on the hub; loaded at the first use.
        label: its name in the model's `id2label`.
        means: whether the label "violates" or "complies".
        threshold: a text violates if P(label) > threshold, or P(label) < threshold for a label that means "complies".
        batch_size: most texts in one forward pass; halved if memory runs out.
        device: e.g. "cpu" or "cuda:1"; a GPU by default if there is one.
        max_length: in tokens; the limit of tokenizer and model by default.
        name: "FOLDER:LABEL" by default.
        reads: see `Constraint`.
        long_texts: score long texts in "windows", or "truncate" them.
        timeout: seconds for a batch, whose texts are missing after that.

    Raises:
        UserError: from `load` and `score`: there is no such model, weight or label, or it is not a classifier.
    """

    type_name, takes_messages = "classifier", False

    @checked
    def __init__(
        self,
        model: str | Path,
        label: Text,
        means: Literal["violates", "complies"] = "violates",
        threshold: Probability = 0.5,
        batch_size: PositiveInt = 64,
        device: str | None = None,
        max_length: PositiveInt | None = None,
        name: str | None = None,
        reads: Reads = "completion",
        long_texts: Literal["truncate", "windows"] = "windows",
        timeout: PositiveFloat = 600.0,
    ):
        self.model, self.label, self.means, self.threshold = str(model), label, means, threshold
        self.batch_size, self.max_length = batch_size, max_length
        self.long_texts, self.timeout = long_texts, timeout
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.name, self.reads = name or f"{Path(model).name}:{label}", reads
        self._cut = 0
        self._network: Any = None

    def load(self) -> None:
        """Loads tokenizer and network.

        Raises:
            UserError: there is no such model, weight, label or device, or it is not a classifier.
        """
        if self._network is not None:
            return
        where = f"constraint '{self.name}', model '{self.model}'"
        if _is_path(self.model) and not os.path.isdir(self.model):
            raise UserError(f"{where}: there is no such folder")
        network = _load_network(where, self.model, self.device)
        self._tokenizer = _load_tokenizer(where, self.model, "right" if self.reads == "completion" else "left")
        labels = {name: index for index, name in network.config.id2label.items()}
        if self.label not in labels:
            raise UserError(f"{where}: has no label '{self.label}'; its labels are: {', '.join(labels)}")
        self._label_index = labels[self.label]
        self._limit = _token_limit(where, self._tokenizer, network, self.max_length)
        self._rows = RowLimit(f"scoring ({self.name})")
        self._network = network

    def cut_texts(self) -> int:
        return self._cut

    def files(self) -> list[Path]:
        """Returns the model's folder, if it is one."""
        return [Path(self.model)] if Path(self.model).is_dir() else []

    def identity(self) -> dict[str, Any]:
        """Returns the settings with the time and size of each file of the model's folder."""
        files = {path.name: path.stat() for path in sorted(Path(self.model).glob("*"))}
        stamps = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files.items()]
        return self._settings() | {"model": str(Path(self.model).absolute()) if files else self.model, "files": stamps}

    def _settings(self) -> dict[str, Any]:
        keys = ("model", "label", "means", "threshold", "max_length", "long_texts")
        return super()._settings() | {key: getattr(self, key) for key in keys}

    def _score(self, texts: list[str]) -> list[Score]:
        self.load()
        columns, texts_of = self._tokenize(texts)
        lengths = [len(ids) for ids in columns["input_ids"]]
        scores: list[list[Score]] = [[] for _ in texts]
        parts = [*_batches(lengths, self.batch_size)]
        found = scored(self.name, parts, partial(self._score_batch, columns), self.timeout)
        for index, score in zip(chain.from_iterable(parts), found, strict=True):
            scores[texts_of[index]].append(score)
        return [_worst(of_text) for of_text in scores]

    def _score_batch(self, columns: dict[str, list[list[int]]], batch: Sequence[int]) -> list[Score]:
        probabilities = self._rows.run(partial(self._probabilities, columns), batch)
        return [self._as_score(probability) for probability in chain.from_iterable(probabilities)]

    def _as_text(self, messages: Messages) -> str:
        self.load()
        if self._tokenizer.chat_template is None:
            return as_lines(messages)
        try:
            written: str = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"constraint '{self.name}': its chat template refuses these messages: {cause(error)}"
            ) from error
        # the tokenizer may add the template's first token a second time
        bos = self._tokenizer.bos_token
        adds_bos = bos is not None and self._tokenizer("").input_ids[:1] == [self._tokenizer.bos_token_id]
        return written.removeprefix(bos) if adds_bos else written

    def _tokenize(self, texts: list[str]) -> tuple[dict[str, list[list[int]]], list[int]]:
        """Returns the network's inputs, each with a list of numbers for every window, and each window's text index."""
        # tokenizers refuse lone surrogates, which JSON can hold; they become U+FFFD
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        columns = self._tokenizer(texts, truncation=False, padding=False, verbose=False)
        too_long = sum(len(ids) > self._limit for ids in columns["input_ids"])
        if too_long:
            columns = self._tokenizer(
                texts, truncation=True, padding=False, max_length=self._limit, **self._long_text_options()
            )
        texts_of = columns.get("overflow_to_sample_mapping") or [*range(len(texts))]
        if too_long and self.long_texts == "truncate":
            if not self._cut:
                logger.warning(
                    "constraint '%s': scores %d of %d texts in part, as they have more than %d tokens; "
                    "long_texts: windows scores them whole",
                    *(self.name, too_long, len(texts), self._limit),
                )
            self._cut += too_long
        known = signature(self._network.forward).parameters
        return {key: column for key, column in columns.items() if key in known}, texts_of

    def _long_text_options(self) -> dict[str, Any]:
        if self.long_texts == "truncate":
            return {}
        if not self._tokenizer.is_fast:
            raise UserError(f"constraint '{self.name}': its tokenizer makes no windows; set long_texts: truncate")
        stride = int(self._limit - self._tokenizer.num_special_tokens_to_add()) // OVERLAP
        return {"return_overflowing_tokens": True, "stride": stride}

    @torch.inference_mode()
    def _probabilities(self, columns: dict[str, list[list[int]]], batch: Sequence[int]) -> list[float]:
        """Returns P(label) for a batch of windows of one length; the inputs are [batch, tokens]."""
        inputs = {
            key: torch.tensor([column[index] for index in batch], device=self._network.device)
            for key, column in columns.items()
        }
        logits = self._network(**inputs).logits.cpu().double()  # [batch, labels]
        one_by_one = self._network.config.problem_type == "multi_label_classification" or logits.shape[-1] == 1
        return (logits.sigmoid() if one_by_one else logits.softmax(dim=-1))[:, self._label_index].tolist()

    def _as_score(self, probability: float) -> Score:
        if self.means == "violates":
            return Score(1.0 - probability, not probability > self.threshold)
        return Score(probability, not probability < self.threshold)


def _batches(lengths: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yields batches of indices of texts of one length, the longest first, without texts of no tokens.

    Without padding a score does not depend on the batch, any pooling works on either side, and no pad token is
    needed. It costs at most one more batch for each distinct length.
    """
    longest_first = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index])
    for _, group in groupby(longest_first, key=lambda index: lengths[index]):
        yield from batches([*group], size)


def _worst(windows: list[Score]) -> Score:
    """Returns the score of a text's window that complies least; missing if one of its windows is."""
    missing = next((score for score in windows if score.is_missing), None)
    if missing or not windows:
        return missing or Score.missing("the text has no token")
    return min(windows, key=lambda score: score.value or 0.0)


def _load_network(where: str, model: str, device: str) -> Any:
    """Returns the classifier on its device, with every weight from the checkpoint."""
    network, info = _from_pretrained(
        f"{where}: cannot load its network",
        AutoModelForSequenceClassification,
        model,
        dtype=torch.float32 if device.startswith("cpu") else "auto",
        device_map=device,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    unfit = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if unfit:  # transformers initialises them at random
        raise UserError(f"{where}: is not a complete classifier: '{unfit[0]}' is missing or of another shape")
    text_config = network.config.get_text_config()
    if getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = -1  # matches no token: decoders look for the last non-padding one
    return network.eval()


def _load_tokenizer(where: str, model: str, truncation_side: str) -> Any:
    tokenizer = _from_pretrained(
        f"{where}: cannot load its tokenizer", AutoTokenizer, model, truncation_side=truncation_side
    )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up if there is no file
        raise UserError(f"{where}: cannot load its tokenizer: no vocabulary is saved beside the weights")
    return tokenizer


def _from_pretrained(failure: str, auto_class: Any, model: str, **options: Any) -> Any:
    try:
        with only_errors("transformers"):
            return auto_class.from_pretrained(
                model, local_files_only=os.path.isdir(model), trust_remote_code=False, **options
            )
    except Exception as error:  # a broken folder may raise anything
        raise UserError(f"{failure}: {refusal(model, error) or cause(error)}") from error


def _token_limit(where: str, tokenizer: Any, network: nn.Module, max_length: int | None) -> float:
    """Returns the most tokens to score: `max_length`, or the limit of tokenizer and network."""
    most: float = min(tokenizer.model_max_length, _positions(network))
    if max_length is None:
        return most
    least = tokenizer.num_special_tokens_to_add() + 1
    if not least <= max_length <= most:
        raise UserError(f"{where}: max_length is {max_length}, but it takes {least} to {most} tokens")
    return max_length


def _positions(network: Any) -> float:
    limit: float = getattr(network.config.get_text_config(), "max_position_embeddings", None) or inf
    for name, module in network.named_modules():
        # RoBERTa numbers positions from pad + 1 and counts the skipped rows: 514 for 512 tokens
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - int(module.padding_idx) - 1
    return limit if limit > 0 else inf


def _is_path(model: str) -> bool:
    """Whether a name can only be a folder, so that the hub need not be asked."""
    hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model)
    return hub_name is None or os.path.exists(Path(model).parts[0])
