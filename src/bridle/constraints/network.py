"""A constraint that runs a Hugging Face model with its own tokenizer: loading, batches, identity."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache, partial
from inspect import signature
from itertools import chain, groupby
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bridle.constraints.base import Constraint, Score
from bridle.constraints.deadline import batches, scored
from bridle.constraints.options import cause
from bridle.constraints.reading import Messages, Reads, as_lines, text_of
from bridle.errors import UserError
from bridle.utils.oom import RowLimit
from bridle.utils.quiet import only_errors
from bridle.utils.safe_loading import is_path, refusal

KINDS = {AutoModelForSequenceClassification: "classifier", AutoModelForCausalLM: "language model", AutoModel: "model"}

Columns = dict[str, list[list[int]]]
"""The network's inputs by name, each with a list of numbers for every row."""


class Network(Constraint):
    """A constraint by a model that reads tokens. A subclass makes rows of tokens, and a degree of each row's outputs.

    Weights are float32 on the CPU and of the checkpoint's type elsewhere. They are loaded from safetensors only, and no
    code of the checkpoint runs. Rows of one length share a forward pass, so that nothing is padded. A chat becomes text
    by the tokenizer's chat template, or as lines "role: content" if it has none.
    """

    takes_messages = False
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    setting_names: ClassVar[tuple[str, ...]]
    """Attributes that decide the scores."""
    forward_options: ClassVar[dict[str, Any]] = {}

    model: str
    batch_size: int
    device: str
    timeout: float
    max_length: int | None = None
    _network: Any = None

    def _set_common(
        self, model: str | Path, device: str | None, batch_size: int, timeout: float, name: str, reads: Reads
    ) -> None:
        """Sets what every constructor takes."""
        self.model, self.batch_size, self.timeout = str(model), batch_size, timeout
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.name, self.reads = name, reads

    def load(self) -> None:
        """Loads tokenizer and network.

        Raises:
            UserError: there is no such model, weight or device, or it is not of the right kind.
        """
        if self._network is not None:
            return
        where = f"constraint '{self.name}', model '{self.model}'"
        if is_path(self.model) and not os.path.isdir(self.model):
            raise UserError(f"{where}: there is no such folder")
        network = _load_network(where, self.auto_class, self.model, self.device)
        self._tokenizer = _load_tokenizer(where, self.model, "right" if self.reads == "completion" else "left")
        self._prepare(where, network)
        self._limit = _token_limit(where, self._tokenizer, network, self.max_length)
        self._rows = RowLimit(f"scoring ({self.name})")
        self._network = network

    def files(self) -> list[Path]:
        """Returns the model's folder, if it is one."""
        return [Path(self.model)] if Path(self.model).is_dir() else []

    def identity(self) -> dict[str, Any]:
        """Returns the settings with a hash of each file of the model's folder, wherever it lies, but hidden ones.

        Raises:
            UserError: a file cannot be read.
        """
        folder, hashes = Path(self.model), []
        try:
            for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
                name = path.relative_to(folder)
                if path.is_file() and not any(part.startswith(".") for part in name.parts):
                    stat = path.stat()
                    hashes.append([name.as_posix(), _content(path, stat.st_mtime_ns, stat.st_size)])
        except OSError as error:
            raise UserError(f"constraint '{self.name}': cannot read {error.filename}: {error.strerror}") from error
        return self._settings() | {"model": "" if hashes else self.model, "files": hashes}

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {key: getattr(self, key) for key in ("model", *self.setting_names)}

    @abstractmethod
    def _prepare(self, where: str, network: Any) -> None:
        """Finds in tokenizer and network what scoring needs; `where` begins its errors."""

    @abstractmethod
    def _degree(self, outputs: Tensor) -> Tensor:
        """Returns [rows] numbers in [0, 1] of the network's outputs, a first axis of rows; logits by default."""

    @abstractmethod
    def _as_score(self, degree: float) -> Score:
        """Returns the score of a row."""

    def _score_rows(self, columns: Columns) -> list[Score | None]:
        """Returns the score of each row, None for a row without tokens."""
        lengths = [len(ids) for ids in columns["input_ids"]]
        found: list[Score | None] = [None] * len(lengths)
        parts = [*_batches(lengths, self.batch_size)]
        scores = scored(self.name, parts, partial(self._score_batch, columns), self.timeout)
        for index, score in zip(chain.from_iterable(parts), scores, strict=True):
            found[index] = score
        return found

    def _score_batch(self, columns: Columns, batch: Sequence[int]) -> list[Score]:
        degrees = self._rows.run(partial(self._degrees, columns), batch)
        return [self._as_score(degree) for degree in chain.from_iterable(degrees)]

    @torch.inference_mode()
    def _degrees(self, columns: Columns, batch: Sequence[int]) -> list[float]:
        """Returns the degrees of a batch of rows of one length."""
        return [float(degree) for degree in self._degree(self._outputs(columns, batch))]

    def _outputs(self, columns: Columns, batch: Sequence[int]) -> Tensor:
        """Returns what `_degree` takes, of rows of one length; the network's inputs are [batch, tokens]."""
        known = signature(self._network.forward).parameters
        inputs = {
            key: torch.tensor([column[index] for index in batch], device=self._network.device)
            for key, column in columns.items()
            if key in known
        }
        return self._features(self._network(**inputs, **self.forward_options)).cpu().double()

    def _features(self, output: Any) -> Tensor:
        logits: Tensor = output.logits
        return logits

    def _as_text(self, messages: Messages) -> str:
        self.load()
        if len(messages) == 1:  # without a prompt; most templates refuse an assistant's turn alone
            return text_of(messages[0].get("content"))
        if self._tokenizer.chat_template is None:
            return as_lines(messages)
        return self._written(messages)

    def _written(self, messages: Messages, **options: Any) -> str:
        """Returns a chat as the tokenizer's template writes it."""
        try:
            written: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"constraint '{self.name}': its chat template refuses these messages: {cause(error)}"
            ) from error
        # the tokenizer may add the template's first token a second time
        bos = self._tokenizer.bos_token
        adds_bos = bos is not None and self._tokenizer("").input_ids[:1] == [self._tokenizer.bos_token_id]
        return written.removeprefix(bos) if adds_bos else written


def without_surrogates(text: str) -> str:
    """Replaces lone surrogates, which JSON can hold and tokenizers refuse, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@cache
def _content(path: Path, changed: int, size: int) -> str:
    """A hash of a file's content, which is read once as long as it does not change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _batches(lengths: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yields batches of indices of texts of one length, the longest first, without texts of no tokens.

    Without padding a score does not depend on the batch, any pooling works on either side, and no pad token is
    needed. It costs at most one more batch for each distinct length.
    """
    longest_first = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index])
    for _, group in groupby(longest_first, key=lambda index: lengths[index]):
        yield from batches([*group], size)


def _load_network(where: str, auto_class: Any, model: str, device: str) -> Any:
    """Returns the network on its device, with every weight from the checkpoint."""
    network, info = _from_pretrained(
        f"{where}: cannot load its network",
        auto_class,
        model,
        dtype=torch.float32 if device.startswith("cpu") else "auto",
        device_map=device,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    unfit = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if auto_class is AutoModel:
        unfit = [key for key in unfit if not key.startswith("pooler.")]  # which states do not go through
    if unfit:  # transformers initialises them at random
        kind = KINDS[auto_class]
        raise UserError(f"{where}: is not a complete {kind}: '{unfit[0]}' is missing or of another shape")
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
