"""Whole checkpoints and exact resume, updates that are skipped, and a stop with its reason."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from bridle.errors import RunStopped
from bridle.training.config import ConstrainedConfig
from bridle.training.oom import CuttingTrainer
from bridle.training.schedule import SCHEDULE, SequentialSchedule
from bridle.training.state import readable
from bridle.utils.checkpoints import keep_last, whole_or_gone
from bridle.utils.distributed import is_main, world
from bridle.utils.interruption import deferring


class LastingTrainer(CuttingTrainer):
    """A trainer whose runs last.

    Attributes:
        schedule: of the rounds; what it keeps is a part of every checkpoint.
        skipped: whether the last update was, its loss or gradient not being finite.
        verdict: of a guard that stops the run; None while it goes on.
    """

    args: ConstrainedConfig
    schedule: SequentialSchedule
    skipped: bool = False
    verdict: str | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, as `Trainer.train` does.

        Raises:
            RunStopped: a guard stopped the run, or more than `max_missing` of a round's rollouts got no score.
            Interrupted: a signal came; the update under way was finished and a checkpoint written, unless it came in a
                round or there are several processes, which would have to agree on the update.
        """
        self.verdict = None
        with deferring() if world() == 1 else nullcontext():
            output = super().train(*args, **kwargs)
        if self.verdict is not None:
            raise RunStopped(f"{self.args.output_dir}: {self.verdict}; the last checkpoint is kept")
        return output

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that is logged; where it is not finite the update is skipped."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.skipped = norm is not None and not math.isfinite(norm)
        if self.skipped:
            model.zero_grad()  # without gradients an optimiser leaves the weights, and its own moments, as they are
        return norm

    # ------------------------------------------------------------------ checkpoints

    def _issue_warnings_after_load(self, load_result):
        """Of keys that a checkpoint lacks; a weight that is tied to another is saved once, and not missing."""
        tied = self.model.all_tied_weights_keys
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with whole_or_gone(checkpoint, SCHEDULE):
            super()._save_checkpoint(model, trial)
            self.schedule.save(checkpoint)
        if is_main():
            keep_last(self.args.output_dir, SCHEDULE, self.args.keep_last, self.state.best_model_checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            with readable(resume_from_checkpoint):
                self.schedule.load(Path(resume_from_checkpoint))
        return prepared

    def _run_epoch(self, **kwargs: Any) -> None:
        """A run that is resumed where it had ended takes no further step, as it would in `transformers`."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))  # read next

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)

    # ------------------------------------------------------------------ the log

    def log_apart(self, record: dict[str, Any]) -> None:
        """Logs a record of its own: neither `SFTTrainer`'s averages nor the log that this step may be due end here."""
        due = self.control.should_log
        Trainer.log(self, record)
        self.control.should_log = due
