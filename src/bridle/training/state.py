"""What a regulariser keeps between rounds: written into checkpoints, and handed over between processes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridle.data import Rollout, read_rollouts, write_rollouts
from bridle.data.targets import TargetCache
from bridle.environment import write_json
from bridle.models.sharding import in_shards, trainable, whole

Weights = dict[str, Tensor]


@dataclass
class RegulariserState:
    """Everything the next updates and rounds depend on, on the CPU.

    Attributes:
        informed: whether R says something.
        drawn: rollouts handed to the update since the round began.
        rollouts: of the last round.
        replayed: of rounds before it.
        auxiliary: R's weights by name; empty for retention.
        anchor: the snapshot p_a by name; empty for `live`.
        provenance: what R was fitted on.
        targets: made ahead of the next updates. Not saved: they are made again from R and the anchor.
        measured: what the round measured.
        stopped: why the round could not be ended; not saved, since the run ends with it.
    """

    informed: bool = False
    drawn: int = 0
    rollouts: list[Rollout] = field(default_factory=list)
    replayed: list[Rollout] = field(default_factory=list)
    auxiliary: Weights = field(default_factory=dict)
    anchor: Weights = field(default_factory=dict)
    provenance: dict[str, Any] | None = None
    targets: TargetCache | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    stopped: Exception | None = None

    def save(self, folder: Path) -> None:
        """Writes it, without pickles."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("auxiliary", "anchor"):
            if weights := getattr(self, name):
                save_file(weights, folder / f"{name}.safetensors")
        for name in ("rollouts", "replayed"):
            write_rollouts(folder / f"{name}.jsonl", getattr(self, name))
        plain = ("informed", "drawn", "provenance", "measured")
        write_json(folder / "state.json", {name: getattr(self, name) for name in plain})

    @classmethod
    def load(cls, folder: Path) -> "RegulariserState":
        """What `save` wrote."""
        files = {name: folder / f"{name}.safetensors" for name in ("auxiliary", "anchor")}
        weights: dict[str, Any] = {name: load_file(file) for name, file in files.items() if file.exists()}
        plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        rollouts: dict[str, Any] = {name: read_rollouts(folder / f"{name}.jsonl") for name in ("rollouts", "replayed")}
        return cls(**rollouts, **weights, **plain)


def on_cpu(weights: Weights) -> Weights:
    """A copy that neither training nor another process changes."""
    return {name: whole(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in weights.items()}


def trainable_weights(model: nn.Module) -> Weights:
    """A copy of what training changes: with LoRA, the adapter alone."""
    with in_shards(model):
        return on_cpu(dict(trainable(model)))
