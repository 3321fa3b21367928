"""A constraint that is a reward model: a sequence classifier with one output."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import FiniteFloat, PositiveFloat, PositiveInt
from torch import Tensor

from bridle.constraints.base import Score
from bridle.constraints.classifier import Classifier
from bridle.constraints.options import checked
from bridle.constraints.reading import Reads
from bridle.errors import UserError


class Reward(Classifier):
    """Scores a text by a reward model: it complies if its reward is at least `threshold`.

    The value is sigmoid(reward − threshold): by the model of Bradley and Terry (1952), on which reward models are
    trained, the probability that the text is preferred to one whose reward is the threshold.

    Args:
        model: a folder written by `save_pretrained`, or a name on the hub, of an `AutoModelForSequenceClassification`
            with one output; loaded at the first use.
        threshold: the least reward that complies; `bridle score` shows how rewards are distributed around it.
        name: the folder by default.
        reads: see `Constraint`; most reward models were trained on a "chat".
        batch_size, device, max_length, long_texts, timeout: as in `Classifier`.

    Raises:
        UserError: as `Classifier`, or the model has several outputs.
    """

    type_name = "reward"
    setting_names: ClassVar[tuple[str, ...]] = ("threshold", "max_length", "long_texts")

    @checked
    def __init__(
        self,
        model: str | Path,
        threshold: FiniteFloat,
        batch_size: PositiveInt = 64,
        device: str | None = None,
        max_length: PositiveInt | None = None,
        name: str | None = None,
        reads: Reads = "completion",
        long_texts: Literal["truncate", "windows"] = "windows",
        timeout: PositiveFloat = 600.0,
    ):
        self._set_common(model, device, batch_size, timeout, name or Path(model).name, reads)
        self.threshold, self.max_length, self.long_texts = threshold, max_length, long_texts

    def _prepare(self, where: str, network: Any) -> None:
        if network.config.num_labels != 1:
            raise UserError(
                f"{where}: has {network.config.num_labels} outputs, and a reward model has one; use type: classifier"
            )

    def _degree(self, logits: Tensor) -> Tensor:
        return (logits[:, 0] - self.threshold).sigmoid()

    def _as_score(self, degree: float) -> Score:
        return Score.of(degree)
