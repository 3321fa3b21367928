"""A constraint that is a Hugging Face sequence classifier with its own tokenizer."""

import logging
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from transformers import AutoConfig

from bridle.constraints.base import Score
from bridle.constraints.network import Columns, Network, without_surrogates
from bridle.constraints.options import Probability, Text, checked
from bridle.constraints.reading import Reads
from bridle.errors import UserError

OVERLAP = 4  # a window shares 1/OVERLAP of its tokens with the one before it

logger = logging.getLogger(__name__)


def labels_of(model: object) -> list[str]:
    """The labels of a classifier on this machine; none where it cannot be read."""
    try:
        return list(AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False).id2label.values())
    except Exception:  # of several libraries, with no common base; loading says what is wrong
        return []


class Classifier(Network):
    """Scores a text by the probability P(label) of any `AutoModelForSequenceClassification`.

    The value is 1 − P(label) if the label means a violation, else P(label). P is a sigmoid for multi-label heads and
    heads with one logit, else a softmax. How it is loaded and run: see `Network`.

    A text of more than `max_length` tokens, special tokens included, is scored in windows of that length that overlap
    by a quarter; the window that complies least counts. `long_texts: truncate` scores one window only: the beginning of
    a completion, or the end if the prompt is read too; `cut_texts` counts these. A text without tokens is missing.

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

    type_name = "classifier"
    setting_names: ClassVar[tuple[str, ...]] = ("label", "means", "threshold", "max_length", "long_texts")
    _cut = 0

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
        self._set_common(model, device, batch_size, timeout, name or f"{Path(model).name}:{label}", reads)
        self.label, self.means, self.threshold = label, means, threshold
        self.max_length, self.long_texts = max_length, long_texts

    def _prepare(self, where: str, network: Any) -> None:
        labels = {name: index for index, name in network.config.id2label.items()}
        if self.label not in labels:
            raise UserError(f"{where}: has no label '{self.label}'; its labels are: {', '.join(labels)}")
        self._label_index = labels[self.label]
        self._one_by_one = network.config.problem_type == "multi_label_classification" or len(labels) == 1

    def cut_texts(self) -> int:
        return self._cut

    def _score(self, texts: list[str]) -> list[Score]:
        self.load()
        columns, texts_of = self._tokenize([without_surrogates(text) for text in texts])
        scores: list[list[Score]] = [[] for _ in texts]
        for index, score in zip(texts_of, self._score_rows(columns), strict=True):
            if score is not None:
                scores[index].append(score)
        return [_worst(of_text) for of_text in scores]

    def _tokenize(self, texts: list[str]) -> tuple[Columns, list[int]]:
        """Returns the network's inputs, a row for every window, and each window's text index."""
        columns = self._encode(texts, truncation=False)
        too_long = sum(len(ids) > self._limit for ids in columns["input_ids"])
        if too_long:
            columns = self._encode(texts, truncation=True, max_length=self._limit, **self._long_text_options())
        texts_of = columns.get("overflow_to_sample_mapping") or [*range(len(texts))]
        if too_long and self.long_texts == "truncate":
            if not self._cut:
                logger.warning(
                    "constraint '%s': scores %d of %d texts in part, as they have more than %d tokens; "
                    "long_texts: windows scores them whole",
                    *(self.name, too_long, len(texts), self._limit),
                )
            self._cut += too_long
        return columns, texts_of

    def _encode(self, texts: list[str], **options: Any) -> Any:
        return self._tokenizer(texts, padding=False, verbose=False, **options)

    def _long_text_options(self) -> dict[str, Any]:
        if self.long_texts == "truncate":
            return {}
        if not self._tokenizer.is_fast:
            raise UserError(f"constraint '{self.name}': its tokenizer makes no windows; set long_texts: truncate")
        return {"return_overflowing_tokens": True, "stride": self._room() // OVERLAP}

    def _room(self) -> int:
        """Returns how many tokens of a text are in a window."""
        return int(self._limit - self._tokenizer.num_special_tokens_to_add())

    def _degree(self, logits: Tensor) -> Tensor:
        return (logits.sigmoid() if self._one_by_one else logits.softmax(dim=-1))[:, self._label_index]

    def _as_score(self, probability: float) -> Score:
        if self.means == "violates":
            return Score(1.0 - probability, not probability > self.threshold)
        return Score(probability, not probability < self.threshold)


def _worst(windows: list[Score]) -> Score:
    """Returns the score of a text's window that complies least; missing if one of its windows is."""
    missing = next((score for score in windows if score.is_missing), None)
    if missing or not windows:
        return missing or Score.missing("the text has no token")
    return min(windows, key=lambda score: score.value or 0.0)
