"""The state of a run between rounds, for checkpoints and other processes."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.constraints import Constraint
from bridle.data import Rollout, read_rollouts, write_rollouts
from bridle.data.target_cache import TargetCache, TargetShelf
from bridle.errors import RunStopped, UserError, first_line
from bridle.models.anchor import Anchor
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.sharding import in_shards, trainable, whole
from bridle.training.config import ConstrainedConfig, Regulariser
from bridle.training.dual_ascent import DualState
from bridle.training.running_means import Totals
from bridle.training.shares import degree, tilt_of
from bridle.utils.distributed import is_main
from bridle.utils.files import atomic_files, read_json, write_json

Weights = dict[str, Tensor]

# What torch, safetensors and the trainer raise on a damaged or foreign file.
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, UnpicklingError, SafetensorError)


PROGRESS_FILE = "schedule.json"
"""Written last: it marks a checkpoint as whole."""


@dataclass
class RoundProgress:
    """The progress of a run within a round.

    Attributes:
        round: the round, 1 for the first.
        record: its metrics so far.
        seconds_policy: of its updates.
        tally: sums of its updates, for their means.
        duals: λ of regularisers with a target.
    """

    round: int
    record: dict[str, Any]
    seconds_policy: float
    tally: Totals
    duals: dict[str, DualState] = field(default_factory=dict)


@dataclass
class PlainState:
    """A regulariser's state other than weights and rollouts.

    Attributes:
        rollout_cursor: rollouts taken by updates since the start of the round.
        is_fitted: whether R has been fitted.
        has_begun: whether a round has run.
        tilt: w of the round's share; None without one.
        fitted_tilt: w of the share that R was last fitted to.
        provenance: the data that R was fitted on.
        measured: the round's metrics.
    """

    rollout_cursor: int
    is_fitted: bool = False
    has_begun: bool = False
    tilt: float | None = None
    fitted_tilt: float | None = None
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
        stopped: why the round failed; not saved, since the run ends.
    """

    rollouts: list[Rollout] = field(default_factory=list)
    replayed: list[Rollout] = field(default_factory=list)
    auxiliary: Weights = field(default_factory=dict)
    anchor: Weights = field(default_factory=dict)
    stopped: Exception | None = None

    def save(self, folder: Path) -> None:
        """Writes the state, without pickles."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("auxiliary", "anchor"):
            if weights := getattr(self, name):
                save_file(weights, folder / f"{name}.safetensors")
        for name in ("rollouts", "replayed"):
            write_rollouts(folder / f"{name}.jsonl", getattr(self, name))
        write_json(folder / "state.json", {kept.name: getattr(self, kept.name) for kept in fields(PlainState)})

    @classmethod
    def load(cls, folder: Path) -> "RegulariserState":
        """Reads what `save` wrote."""
        files = {name: folder / f"{name}.safetensors" for name in ("auxiliary", "anchor")}
        weights: dict[str, Any] = {name: load_file(file) for name, file in files.items() if file.exists()}
        plain = vars(read_json(folder / "state.json", PlainState))
        rollouts: dict[str, Any] = {name: read_rollouts(folder / f"{name}.jsonl") for name in ("rollouts", "replayed")}
        return cls(**rollouts, **weights, **plain)


@dataclass
class StatefulRegulariser:
    """The parts of a regulariser, and the state that it keeps between rounds.

    Attributes:
        index: its place among the run's regularisers.
        name: in metrics and files.
        options: constraint, anchor and the rest.
        model: the policy.
        tokenizer: the policy's.
        corpus: rows of its domains by name, the source of prompts if `options` has none: tokenised, or chats.
        config: the run's configuration.
        rollouts: of the last round.
        replayed: scored rollouts of earlier rounds.
        is_fitted: R has been fitted; until then it is constant and q is p_a.
        has_begun: a round has run, so there is an anchor.
        rollout_cursor: rollouts taken by updates since the start of the round.
        targets: precomputed ones, see `precomputed`.
        tilt: w of the round's share; None without one.
        fitted_tilt: w of the share that R was last fitted to.
        dual: λ and its steps, if it has a target and a round has been measured. The policy's process alone steers.
    """

    index: int
    name: str
    options: Regulariser
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Mapping[str, Dataset]
    config: ConstrainedConfig
    anchor: Anchor | None = field(init=False, default=None)
    auxiliary: AuxiliaryModel | None = field(init=False, default=None)
    rollouts: list[Rollout] = field(init=False, default_factory=list)
    replayed: list[Rollout] = field(init=False, default_factory=list)
    is_fitted: bool = field(init=False, default=False)
    has_begun: bool = field(init=False, default=False)
    rollout_cursor: int = field(init=False, default=0)
    targets: TargetCache | TargetShelf | None = field(init=False, default=None)
    dual: DualState | None = field(init=False, default=None)
    tilt: float | None = field(init=False, default=None)
    fitted_tilt: float | None = field(init=False, default=None)

    @property
    def settled(self) -> bool:
        """Whether neither q nor the rollouts will change: p_a does not, and R has been fitted to it."""
        # Round 0 is the corpus, whose outputs are not p_a's.
        fitted_in = self.auxiliary.config.provenance.get("round", 0) if self.auxiliary is not None else 0
        return self.options.anchor == "initial" and self.is_fitted and fitted_in > 0

    @property
    def weight(self) -> float:
        """λ."""
        return self.options.weight if self.dual is None else self.dual.weight

    @property
    def constraint(self) -> Constraint:
        """C; none for retention."""
        assert self.options.constraint is not None, "retention asks no oracle"
        return self.options.constraint

    def seed(self, purpose: str) -> int:
        """A separate seed for each purpose and round, so that a resumed round draws the same numbers."""
        return zlib.crc32(f"{self.config.seed}/{self.index}/{purpose}".encode())

    def take(self, counts: Sequence[Sequence[int]]) -> tuple[list[list[Rollout]], int]:
        """The next rollouts of this round, in turn.

        Args:
            counts: by process, the number for each of its micro-batches.

        Returns:
            The rollouts of each micro-batch, process by process; and their sampled tokens.
        """
        taken = []
        for count in chain.from_iterable(zip(*counts, strict=True)):
            places = range(self.rollout_cursor, self.rollout_cursor + count)
            taken.append([self.rollouts[place % len(self.rollouts)] for place in places])
            self.rollout_cursor += count
        return taken, sum(len(rollout.completion_ids) for part in taken for rollout in part)

    def set_tilt(self) -> dict[str, Any]:
        """Measures the round's share, if the regulariser has one; where no output has a score, the tilt stays."""
        self.tilt = tilt_of(self.options.share, self.rollouts, self.tilt)
        return {} if self.tilt is None else {"tilt": self.tilt}

    @property
    def share_is_off(self) -> bool:
        """Whether the round's share is allowed as it is, or R was fitted to the opposite tilt and would pull away."""
        if self.tilt is None:
            return False
        fitted = self.tilt if self.fitted_tilt is None else self.fitted_tilt
        return self.tilt * fitted <= 0

    def label(self, rollout: Rollout) -> float | bool | None:
        """What R is fitted to for a rollout; None without a score."""
        if self.tilt is not None and rollout.complies is not None:
            return degree(self.tilt, rollout.complies)
        return rollout.value if self.options.soft_labels else rollout.complies

    def state(self, measured: dict[str, Any] | None = None) -> RegulariserState:
        """Everything that the next updates and rounds depend on, and the last round's metrics."""
        auxiliary = self.auxiliary
        return RegulariserState(
            is_fitted=self.is_fitted,
            has_begun=self.has_begun,
            tilt=self.tilt,
            fitted_tilt=self.fitted_tilt,
            rollout_cursor=self.rollout_cursor,
            rollouts=self.rollouts,
            replayed=self.replayed,
            auxiliary=on_cpu(auxiliary.state_dict()) if auxiliary is not None else {},
            anchor=on_cpu(self.anchor.state_dict()) if self.anchor is not None else {},
            provenance=auxiliary.config.provenance if auxiliary is not None else None,
            measured=measured or {},
        )

    def load_state(self, state: RegulariserState) -> None:
        """Resumes from a state, of this process or another."""
        if not self.settled:
            self.targets = None  # they were built on another R or anchor
        self.is_fitted, self.has_begun = state.is_fitted, state.has_begun
        self.tilt, self.fitted_tilt = state.tilt, state.fitted_tilt
        self.rollouts, self.replayed, self.rollout_cursor = state.rollouts, state.replayed, state.rollout_cursor
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state.auxiliary)
            self.auxiliary.config.provenance = state.provenance or {}
        if self.anchor is not None:
            self.anchor.load_state_dict(state.anchor)

    def set_policy(self, weights: Weights) -> None:
        """Gives this regulariser's model the policy's trainable weights."""
        for name, parameter in self.model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])

    def to(self, device: str) -> None:
        """Moves model, R and anchor to a device."""
        for part in (self.model, self.auxiliary, self.anchor):
            if part is not None:
                part.to(device)

    def keep_rollouts(self, round_index: int, rollouts: list[Rollout]) -> None:
        """Writes a round's samples, even if scoring or fitting failed."""
        if is_main() and rollouts and rollouts[0].round == round_index:
            folder = Path(self.config.output_dir) / "rollouts"
            write_rollouts(folder / f"round-{round_index}.{self.name}.jsonl", rollouts)

    def keep_auxiliary(self, folder: Path, round_index: int | None = None) -> None:
        """Writes R as the latest and by round, since R_1 guides the base model."""
        if is_main() and self.auxiliary is not None and self.is_fitted:
            for place in (folder, *([folder / f"round-{round_index}"] if round_index is not None else [])):
                with atomic_files(place) as unfinished:
                    self.auxiliary.save_pretrained(unfinished)


def on_cpu(weights: Weights) -> Weights:
    """A copy on the CPU that neither training nor another process changes."""
    return {name: whole(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in weights.items()}


def trainable_weights(model: nn.Module) -> Weights:
    """A copy of the trainable weights: with LoRA, only the adapter."""
    with in_shards(model):
        return on_cpu(dict(trainable(model)))


@contextmanager
def readable(checkpoint: str | Path | None) -> Iterator[None]:
    """Reports in one line a checkpoint that any library cannot read.

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
