"""A constraint that is a hypothesis about the text, which a model of natural language inference decides."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from bridle.constraints.classifier import Classifier
from bridle.constraints.options import Probability, Text, checked
from bridle.constraints.reading import Reads
from bridle.errors import UserError


class NLI(Classifier):
    """Scores a text by the probability that it entails a hypothesis, such as "This text is rude.".

    The model is any `AutoModelForSequenceClassification` of pairs of texts with a label that begins with "entail", in
    either case. P is the softmax over all its labels. Long texts are scored in windows, each with the hypothesis.

    Args:
        model: a folder written by `save_pretrained`, or a name on the hub; loaded at the first use.
        hypothesis: what the text may entail, as a sentence.
        means: whether a text that entails it "violates" or "complies".
        threshold: a text violates if P > threshold, or P < threshold for a hypothesis that means "complies".
        name: "FOLDER:HYPOTHESIS" by default.
        batch_size, device, max_length, reads, long_texts, timeout: as in `Classifier`.

    Raises:
        UserError: as `Classifier`, or the hypothesis leaves no room for the text.
    """

    type_name = "nli"
    setting_names: ClassVar[tuple[str, ...]] = ("hypothesis", "means", "threshold", "max_length", "long_texts")

    @checked
    def __init__(
        self,
        model: str | Path,
        hypothesis: Text,
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
        self._set_common(model, device, batch_size, timeout, name or f"{Path(model).name}:{hypothesis}", reads)
        self.hypothesis, self.means, self.threshold = hypothesis, means, threshold
        self.max_length, self.long_texts = max_length, long_texts

    def load(self) -> None:
        super().load()
        if self._room() < 1:
            raise UserError(
                f"constraint '{self.name}': hypothesis: leaves no room for a text in the {self._limit:g} tokens that "
                "its model takes"
            )

    def _prepare(self, where: str, network: Any) -> None:
        labels = [name for name in network.config.id2label.values() if name.lower().startswith("entail")]
        if len(labels) != 1:
            known = ", ".join(network.config.id2label.values())
            raise UserError(f"{where}: needs one label that begins with 'entail'; its labels are: {known}")
        (self.label,) = labels
        super()._prepare(where, network)
        self._one_by_one = False  # the labels exclude each other, whatever the configuration says of the head

    def _encode(self, texts: list[str], **options: Any) -> Any:
        cut = {"truncation": "only_first"} if options.get("truncation") else {}
        return self._tokenizer(texts, [self.hypothesis] * len(texts), padding=False, verbose=False, **options | cut)

    def _room(self) -> int:
        hypothesis = self._tokenizer(self.hypothesis, add_special_tokens=False)["input_ids"]
        return int(self._limit - self._tokenizer.num_special_tokens_to_add(pair=True)) - len(hypothesis)
