"""A constraint that is the nearness of a text to given texts, by an embedding model."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from transformers import AutoModel
from transformers.utils import cached_file

from bridle.constraints.classifier import Classifier
from bridle.constraints.network import Columns, without_surrogates
from bridle.constraints.options import Probability, Text, cause, checked
from bridle.constraints.reading import Reads
from bridle.errors import UserError
from bridle.utils.files import read_json

POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda states: states.mean(dim=1),
    "cls": lambda states: states[:, 0],
    "last": lambda states: states[:, -1],
}
"""From [batch, tokens, hidden], where no token is padding, to [batch, hidden]."""
POOLING_MODES = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last"}
"""As the package sentence-transformers names them."""


class Similarity(Classifier):
    """Scores a text by the largest cosine similarity of its embedding to those of some texts.

    The embedding [hidden] is the model's last hidden state [tokens, hidden], pooled over the tokens. A negative
    similarity counts as 0.

    Args:
        model: a folder or a name on the hub, of an `AutoModel` such as those of sentence-transformers; loaded at the
            first use.
        texts: what a text may be near to, one or several.
        threshold: a text violates if its similarity is above it, or below it for texts that mean "complies".
        means: whether a text near to one of `texts` "violates" or "complies".
        pooling: "mean" over the tokens, the first ("cls") or the "last". By default as sentence-transformers' files
            beside the model say; "mean" without them.
        name: the folder by default.
        batch_size, device, max_length, reads, long_texts, timeout: as in `Classifier`.

    Raises:
        UserError: from `load` and `score`: there is no such model or weight, or its embedding is not a pooled state.
    """

    type_name = "similarity"
    auto_class = AutoModel
    setting_names: ClassVar[tuple[str, ...]] = ("texts", "means", "threshold", "pooling", "max_length", "long_texts")
    _reference: Tensor | None = None
    """Embeddings of `texts` [texts, hidden]; None before `load`."""

    @checked
    def __init__(
        self,
        model: str | Path,
        texts: Text | list[Text],
        threshold: Probability,
        means: Literal["violates", "complies"] = "violates",
        pooling: Literal["mean", "cls", "last"] | None = None,
        batch_size: PositiveInt = 64,
        device: str | None = None,
        max_length: PositiveInt | None = None,
        name: str | None = None,
        reads: Reads = "completion",
        long_texts: Literal["truncate", "windows"] = "windows",
        timeout: PositiveFloat = 600.0,
    ):
        self._set_common(model, device, batch_size, timeout, name or Path(model).name, reads)
        self.texts, self.means, self.threshold = [texts] if isinstance(texts, str) else texts, means, threshold
        self.pooling, self.max_length, self.long_texts = pooling, max_length, long_texts
        if not self.texts:
            raise UserError("constraint 'similarity', key 'texts': names no text")

    def load(self) -> None:
        super().load()
        if self._reference is None:
            rows, _ = self._tokenize([without_surrogates(text) for text in self.texts])
            if not any(rows["input_ids"]):
                raise UserError(f"constraint '{self.name}': no text of 'texts' has a token of {self.model}")
            self._reference = self._embedded(rows)
            self._cut = 0  # counts outputs

    def _prepare(self, where: str, network: Any) -> None:
        self._pool = POOLINGS[self.pooling or saved_pooling(where, self.model) or "mean"]

    @torch.inference_mode()
    def _embedded(self, columns: Columns) -> Tensor:
        """Returns embeddings of length 1, [rows, hidden]."""
        return torch.cat([self._outputs(columns, [row]) for row, ids in enumerate(columns["input_ids"]) if ids])

    def _features(self, output: Any) -> Tensor:
        return F.normalize(self._pool(output.last_hidden_state), dim=-1)

    def _degree(self, embeddings: Tensor) -> Tensor:
        assert self._reference is not None, "load() comes first"
        return (embeddings @ self._reference.T).amax(dim=-1).clamp(0, 1)


def saved_pooling(where: str, model: str) -> str | None:
    """Returns the pooling that the files of sentence-transformers beside a model name, None without such files.

    Args:
        where: begins the errors.
        model: a folder or a name on the hub.

    Raises:
        UserError: they name another pooling, or layers after it.
    """
    modules = _saved(where, model, "modules.json", list[dict[str, Any]]) or []
    kinds = {str(module.get("type")).rpartition(".")[2]: module for module in modules}
    if kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"{where}: its embedding goes through further layers ({', '.join(kinds)}), which are not read")
    if "Pooling" not in kinds:
        return None
    config = _saved(where, model, f"{kinds['Pooling'].get('path')}/config.json", dict[str, Any]) or {}
    flags = [key.removeprefix("pooling_mode_") for key, used in config.items() if used is True]
    modes = (
        [str(config["pooling_mode"])]
        if "pooling_mode" in config
        else [mode for mode in flags if mode != "include_prompt"]
    )
    known = [POOLING_MODES[mode] for mode in modes if mode in POOLING_MODES]
    if len(known) != 1:
        raise UserError(f"{where}: its pooling ({', '.join(modes)}) is none of {', '.join(POOLINGS)}; set pooling")
    return known[0]


def _saved(where: str, model: str, file: str, kind: type[Any]) -> Any:
    """Returns the content of a JSON file beside a model; None if there is none.

    Raises:
        UserError: without a network it is not known whether there is one.
    """
    is_local = os.path.isdir(model)
    try:
        path = cached_file(model, file, local_files_only=is_local, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"{where}: whether it has a {file} cannot be seen ({cause(error)}); set pooling") from error
    return None if path is None else read_json(path, kind)
