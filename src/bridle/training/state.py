"""What a run keeps between rounds: written into checkpoints, and passed between processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridle.data import Rollout, read_rollouts, write_rollouts
from bridle.errors import RunStopped, UserError, first_line
from bridle.models.sharding import in_shards, trainable, whole
from bridle.training.running_means import Totals
from bridle.utils.files import read_json, write_json

Weights = dict[str, Tensor]

# What torch, safetensors and the trainer raise on a file that is damaged, or a part of something else.
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, UnpicklingError, SafetensorError)


PROGRESS_FILE = "schedule.json"
"""Written last: it marks a checkpoint as whole."""


@dataclass
class RoundProgress:
    """How far a run is in a round.

    Attributes:
        round: the round, 1 for the first.
        record: what it has measured.
        seconds_policy: of its updates.
        tally: sums of its updates, for their means.
    """

    round: int
    record: dict[str, Any]
    seconds_policy: float
    tally: Totals


@dataclass
class PlainState:
    """What of a regulariser's state is neither weights nor rollouts.

    Attributes:
        rollout_cursor: rollouts that the update has taken since the round began.
        is_fitted: whether R has been fitted.
        has_begun: whether a round has been made.
        provenance: what R was fitted on.
        measured: what the round measured.
    """

    rollout_cursor: int  # required, so that a state from before it had this name is refused
    is_fitted: bool = False
    has_begun: bool = False
    provenance: dict[str, Any] | None = None
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass
class RegulariserState(PlainState):
    """Everything the next updates and rounds depend on, on the CPU.

    Attributes:
        rollouts: of the last round.
        replayed: of rounds before it.
        auxiliary: R's weights by name; empty for retention.
        anchor: the snapshot p_a by name; empty for `live`.
        stopped: why the round could not be ended; not saved, since the run ends with it.
    """

    rollouts: list[Rollout] = field(default_factory=list)
    replayed: list[Rollout] = field(default_factory=list)
    auxiliary: Weights = field(default_factory=dict)
    anchor: Weights = field(default_factory=dict)
    stopped: Exception | None = None

    def save(self, folder: Path) -> None:
        """Writes it, without pickles."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("auxiliary", "anchor"):
            if weights := getattr(self, name):
                save_file(weights, folder / f"{name}.safetensors")
        for name in ("rollouts", "replayed"):
            write_rollouts(folder / f"{name}.jsonl", getattr(self, name))
        write_json(folder / "state.json", {kept.name: getattr(self, kept.name) for kept in fields(PlainState)})

    @classmethod
    def load(cls, folder: Path) -> "RegulariserState":
        """What `save` wrote."""
        files = {name: folder / f"{name}.safetensors" for name in ("auxiliary", "anchor")}
        weights: dict[str, Any] = {name: load_file(file) for name, file in files.items() if file.exists()}
        plain = vars(read_json(folder / "state.json", PlainState))
        rollouts: dict[str, Any] = {name: read_rollouts(folder / f"{name}.jsonl") for name in ("rollouts", "replayed")}
        return cls(**rollouts, **weights, **plain)


def on_cpu(weights: Weights) -> Weights:
    """A copy that neither training nor another process changes."""
    return {name: whole(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in weights.items()}


def trainable_weights(model: nn.Module) -> Weights:
    """A copy of what training changes: with LoRA, the adapter alone."""
    with in_shards(model):
        return on_cpu(dict(trainable(model)))


@contextmanager
def readable(checkpoint: str | Path | None) -> Iterator[None]:
    """Reports in one line that a checkpoint cannot be read, whichever library finds out.

    Raises:
        UserError: naming the checkpoint.
    """
    try:
        yield
    except (UserError, RunStopped):
        raise
    except _UNREADABLE as error:
        advice = "remove that folder to go on from the checkpoint before it"
        raise UserError(f"{checkpoint}: cannot be read ({first_line(error)}); {advice}") from error
