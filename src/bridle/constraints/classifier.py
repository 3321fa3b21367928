"""A constraint that is a Hugging Face sequence classifier with a tokenizer of its own."""

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
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bridle.constraints.base import Score, TextConstraint
from bridle.constraints.deadline import TimedOut, within
from bridle.constraints.options import Probability, Text, cause, checked
from bridle.constraints.reading import Messages, Reads, as_lines
from bridle.errors import UserError
from bridle.utils.oom import RowLimit
from bridle.utils.progress import Progress
from bridle.utils.safe_loading import quiet_loading, refusal

OVERLAP = 4  # a window shares one part in so many with the one before it

logger = logging.getLogger(__name__)


class Classifier(TextConstraint):
    """Scores a text by the probability P(label) that any `AutoModelForSequenceClassification` gives it.

    The value is 1 − P(label) where the label means a violation, else P(label). P is a sigmoid for heads with
    one logit and for multi-label heads, else a softmax. Weights are float32 on the CPU and as the checkpoint
    stores them elsewhere; they come from safetensors only, and no code from the checkpoint is run.

    A text of more than `max_length` tokens, special tokens included, is scored in windows of that length, each with a
    quarter of the one before it, and the window that complies least speaks for it. With `long_texts: truncate` only
    one is scored: the beginning of a completion, or the end where the prompt is read too. `cut_texts` counts these. A
    text without any token is missing. A chat is written by the tokenizer's chat template, or as lines "role: content"
    if it has none.

    Args:
        model: a folder written by `save_pretrained`, or a name on the hub. It is loaded at the first use.
        label: the label's name in the model's `id2label`.
        means: whether the label "violates" or "complies".
        threshold: a text violates where P(label) > threshold, if the label means so; where the label means
            "complies", a text violates where P(label) < threshold.
        batch_size: texts in one forward pass, at most; fewer from where memory runs out.
        device: e.g. "cpu" or "cuda:1"; a GPU if there is one, by default.
        max_length: in tokens; what tokenizer and model take, by default.
        name: how errors and tables call it; "FOLDER:LABEL" if not given.
        reads: see `Constraint`.
        long_texts: score all of a text that is too long, in "windows", or "truncate" it.
        timeout: seconds for a batch; after that its texts are missing.

    Raises:
        UserError: from `load` and `score`: there is no such model, weight or label, or it is no classifier.
    """

    type_name = "classifier"

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
            UserError: there is no such model, weight, label or device, or it is no classifier.
        """
        if self._network is not None:
            return
        where = f"constraint '{self.name}', model '{self.model}'"
        if _is_path(self.model) and not os.path.isdir(self.model):
            raise UserError(f"{where}: there is no such folder")
        network = _load_network(where, self.model, self.device)
        self._tokenizer = _load_tokenizer(where, self.model, "right" if self.reads == "completion" else "left")
        self._label_index = _index(where, network, self.label)
        self._limit = _token_limit(where, self._tokenizer, network, self.max_length)
        self._rows = RowLimit(f"scoring ({self.name})")
        self._network = network

    def cut_texts(self) -> int:
        return self._cut

    def files(self) -> list[Path]:
        """The model's folder, where it is one."""
        return [Path(self.model)] if Path(self.model).is_dir() else []

    def identity(self) -> dict[str, Any]:
        """With the time and size of each of the model's files, where it is a folder."""
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
        with Progress(f"scoring ({self.name})", len(lengths), unit="texts") as progress:
            for batch in _batches(lengths, self.batch_size):
                for index, score in zip(batch, self._in_time(columns, batch), strict=True):
                    scores[texts_of[index]].append(score)
                progress.update(len(batch))
        return [_worst(of_text) for of_text in scores]

    def _in_time(self, columns: dict[str, list[list[int]]], batch: list[int]) -> list[Score]:
        """Returns the scores of a batch of windows."""
        run = partial(self._rows.run, partial(self._probabilities, columns), batch)
        try:
            return [self._as_score(probability) for probability in chain.from_iterable(within(self.timeout, run))]
        except TimedOut as late:
            return [Score.missing(str(late))] * len(batch)

    def _as_text(self, messages: Messages) -> str:
        self.load()
        if self._tokenizer.chat_template is None:
            return as_lines(messages)
        try:
            written: str = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever the template raises
            raise UserError(
                f"constraint '{self.name}': its chat template refuses these messages: {cause(error)}"
            ) from error
        # what the template begins with comes a second time where the tokenizer adds it
        bos = self._tokenizer.bos_token
        adds_bos = bos is not None and self._tokenizer("").input_ids[:1] == [self._tokenizer.bos_token_id]
        return written.removeprefix(bos) if adds_bos else written

    def _tokenize(self, texts: list[str]) -> tuple[dict[str, list[list[int]]], list[int]]:
        """Returns the network's inputs, each a list of whole numbers for every window, and the windows' texts."""
        texts = [_without_lone_surrogates(text) for text in texts]
        columns = self._tokenizer(texts, truncation=False, padding=False, verbose=False)
        too_long = sum(len(ids) > self._limit for ids in columns["input_ids"])
        texts_of = list(range(len(texts)))
        if too_long and self.long_texts == "windows":
            if not self._tokenizer.is_fast:
                raise UserError(f"constraint '{self.name}': its tokenizer makes no windows; set long_texts: truncate")
            columns = self._tokenizer(
                texts,
                truncation=True,
                padding=False,
                max_length=self._limit,
                return_overflowing_tokens=True,
                stride=int(self._limit - self._tokenizer.num_special_tokens_to_add()) // OVERLAP,
            )
            texts_of = columns["overflow_to_sample_mapping"]
        elif too_long:
            self._warn_of_cutting(too_long, len(texts))
            columns = self._tokenizer(texts, truncation=True, padding=False, max_length=self._limit)
        known = signature(self._network.forward).parameters
        return {key: column for key, column in columns.items() if key in known}, texts_of

    def _warn_of_cutting(self, too_long: int, count: int) -> None:
        """Counts, and warns the first time."""
        if not self._cut:
            logger.warning(
                "constraint '%s': scores %d of %d texts in part, as they have more than %d tokens; "
                "long_texts: windows scores them whole",
                *(self.name, too_long, count, self._limit),
            )
        self._cut += too_long

    @torch.inference_mode()
    def _probabilities(self, columns: dict[str, list[list[int]]], batch: list[int]) -> list[float]:
        """Returns P(label) for the texts of a batch, which have one length: inputs are [batch, tokens]."""
        inputs = {
            key: torch.tensor([column[index] for index in batch], device=self._network.device)
            for key, column in columns.items()
        }
        logits = self._network(**inputs).logits.cpu().double()  # [batch, labels]
        return _activation(self._network.config, logits)[:, self._label_index].tolist()

    def _as_score(self, probability: float) -> Score:
        if self.means == "violates":
            return Score(1.0 - probability, not probability > self.threshold)
        return Score(probability, not probability < self.threshold)


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields the indices of texts of one length, the longest first; texts without tokens are left out.

    Nothing is padded, so a score does not hang on its neighbours, any pooling works on either side, and no
    pad token is needed. The price is at most one batch more for every distinct length.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for length, group in groupby(longest_first, key=lambda index: lengths[index]):
        indices = list(group) if length else []
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _worst(windows: list[Score]) -> Score:
    """The score of a text: that of its window that complies least, or missing where one is."""
    missing = next((score for score in windows if score.is_missing), None)
    if missing or not windows:
        return missing or Score.missing("the text has no token")
    return min(windows, key=lambda score: score.value or 0.0)


def _activation(config: Any, logits: Tensor) -> Tensor:
    independent = config.problem_type == "multi_label_classification" or logits.shape[-1] == 1
    return logits.sigmoid() if independent else logits.softmax(dim=-1)


def _without_lone_surrogates(text: str) -> str:
    """Replaces halves of characters, which JSON can hold but tokenizers refuse, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _load_network(where: str, model: str, device: str) -> Any:
    """Returns the classifier on its device, every weight of it from the checkpoint."""
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
    if unfit:  # transformers fills them with random numbers
        raise UserError(f"{where}: is no whole classifier: '{unfit[0]}' is missing or of another shape")
    text_config = network.config.get_text_config()
    if getattr(text_config, "pad_token_id", None) is None:
        text_config.pad_token_id = -1  # matches no token: decoders look for the last one that is not padding
    return network.eval()


def _load_tokenizer(where: str, model: str, truncation_side: str) -> Any:
    tokenizer = _from_pretrained(
        f"{where}: cannot load its tokenizer", AutoTokenizer, model, truncation_side=truncation_side
    )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up by transformers, where there is no file
        raise UserError(f"{where}: cannot load its tokenizer: no vocabulary is saved beside the weights")
    return tokenizer


def _from_pretrained(failure: str, auto_class: Any, model: str, **options: Any) -> Any:
    try:
        with quiet_loading():
            return auto_class.from_pretrained(
                model, local_files_only=os.path.isdir(model), trust_remote_code=False, **options
            )
    except Exception as error:  # transformers and its file formats raise nearly anything on a broken folder
        raise UserError(f"{failure}: {refusal(model, error) or cause(error)}") from error


def _index(where: str, network: Any, label: str) -> int:
    labels: dict[str, int] = {name: index for index, name in network.config.id2label.items()}
    if label not in labels:
        raise UserError(f"{where}: has no label '{label}'; its labels are: {', '.join(labels)}")
    return labels[label]


def _token_limit(where: str, tokenizer: Any, network: nn.Module, max_length: int | None) -> float:
    """Returns the largest number of tokens to score: `max_length`, or what tokenizer and network take."""
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
        # RoBERTa and its kin number positions from pad + 1 and count the rows so skipped: 514 for 512 tokens
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - int(module.padding_idx) - 1
    return limit if limit > 0 else inf


def _is_path(model: str) -> bool:
    """Whether a name can only be a folder: looking for it on the hub would take long and say less."""
    hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model)
    return hub_name is None or os.path.exists(Path(model).parts[0])
