"""Whole checkpoints and exact resume, skipped updates, and a stop with its reason."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from bridle.errors import RunStopped, UserError
from bridle.training.config import ConstrainedConfig
from bridle.training.guards import Supervisor
from bridle.training.oom import OomSafeTrainer
from bridle.training.state import PROGRESS_FILE, readable
from bridle.utils.checkpoints import EndsWhereItEnded, keep_last, last_whole, whole_or_gone
from bridle.utils.distributed import is_main, world_size
from bridle.utils.files import read_json, sync_files, write_json
from bridle.utils.interruption import deferring


class Resumable(Protocol):
    """An object whose state is part of every checkpoint.

    Attributes:
        round: the round that has begun; 0 before training.
    """

    round: int

    def save(self, checkpoint: Path) -> dict[str, Any]:
        """Writes its files; returns what goes into `PROGRESS_FILE`."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Resumes from a checkpoint."""
        ...

    def on_train_end(self, args: Any, state: Any, control: Any) -> None:
        """Writes what belongs to the final model."""
        ...


def last_checkpoint(folder: str | Path) -> Path | None:
    """The last whole checkpoint of a run; half-written ones are skipped."""
    return last_whole(folder, PROGRESS_FILE)


class CheckpointedTrainer(EndsWhereItEnded, OomSafeTrainer):
    """A trainer with atomic checkpoints, whose resumed run equals an uninterrupted one.

    Attributes:
        schedule: of the rounds.
        supervisor: of the guards.
    """

    args: ConstrainedConfig
    schedule: Resumable

    def __init__(self, *args: Any, **kwargs: Any):
        self.supervisor = Supervisor(self.log_apart)
        self._written: tuple[int, int] | None = None  # step and records of the last checkpoint
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, as `Trainer.train` does.

        Raises:
            UserError: the trainer has trained already, and is given no checkpoint to resume from.
            RunStopped: a guard stopped the run, or more than `max_missing` of a round's rollouts got no score.
            Interrupted: a signal arrived. The current update is complete and a checkpoint written, unless the signal
                arrived in a round or there are several processes, which would have to agree on the update.
        """
        self.supervisor.verdict = None
        with deferring() if world_size() == 1 else nullcontext():
            output = super().train(*args, **kwargs)
        if self.supervisor.verdict is not None:
            raise RunStopped(f"{self.args.output_dir}: {self.supervisor.verdict}; the last checkpoint is kept")
        return output

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient norm for the log; an update in which it is not finite, or in which nothing acts, is skipped."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.supervisor.skipped = norm is not None and not math.isfinite(norm)
        if self.supervisor.skipped and self.is_deepspeed_enabled and not self.args.fp16:
            raise RunStopped(
                f"{self.args.output_dir}: update {self.state.global_step + 1} is not finite, and DeepSpeed has made it "
                "already; resume from the last checkpoint with a lower learning_rate"
            )
        if self.supervisor.skipped or norm == 0:
            model.zero_grad()  # without gradients an optimiser changes neither weights, by momentum, nor its moments
        return norm

    def log_apart(self, record: dict[str, Any]) -> None:
        """Logs a separate record, without resetting `SFTTrainer`'s averages or this step's own log."""
        due = self.control.should_log
        Trainer.log(self, record)
        self.control.should_log = due

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        now = self.state.global_step, len(self.state.log_history)
        if now == self._written:
            return  # a round and an epoch end together; to write it again would risk the only whole one
        with whole_or_gone(checkpoint, PROGRESS_FILE):
            super()._save_checkpoint(model, trial)
            progress = self.schedule.save(checkpoint)
            if is_main():
                sync_files(checkpoint)
                write_json(checkpoint / PROGRESS_FILE, {**progress, "row_limit": self.row_limit.rows})
        self._written = now
        if is_main():
            keep_last(self.args.output_dir, PROGRESS_FILE, self.args.keep_last, self.state.best_model_checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        acts = any(one.options.weight > 0 for one in self.regularisers)
        if resume_from_checkpoint is None and self.schedule.round and acts:
            raise UserError(
                "train: this trainer has begun its rounds already; make another one of its model, or give "
                "resume_from_checkpoint"
            )
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir():  # the run may have been moved since
                self.state.best_model_checkpoint = str(best)
            with readable(resume_from_checkpoint):
                checkpoint = Path(resume_from_checkpoint)
                self.row_limit.rows = read_json(checkpoint / PROGRESS_FILE, dict[str, Any])["row_limit"]
                self.schedule.load(checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not Path(resume_from_checkpoint).is_dir():
            raise UserError(f"resume_from_checkpoint: there is no folder {resume_from_checkpoint}")
        with readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))  # read next

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result):
        """Warns of keys that a checkpoint lacks, except tied weights, which are saved once."""
        tied = self.model.all_tied_weights_keys
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))
