"""The sequential schedule (EMNLP 2024, the first of two): refresh R from the policy, then train the policy, in turn.

Round i's policy steps use R_i, fitted on samples of p_{i-1}, the policy at the end of round i-1.
"""

import time
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState

from bridle.data import Rollout, write_rollouts
from bridle.errors import UserError
from bridle.models.auxiliary import fingerprint
from bridle.training.guards import EntropyGuard, round_warnings, tell, unreached_warnings
from bridle.training.precomputed import make_targets, upcoming
from bridle.training.regulariser import DomainRegulariser
from bridle.training.running_means import Sums
from bridle.training.state import RegulariserState
from bridle.utils.checkpoints import last_whole
from bridle.utils.distributed import is_main, rank
from bridle.utils.files import atomic_files, read_json, sync_files, write_json
from bridle.utils.interruption import at_once

if TYPE_CHECKING:
    from bridle.training.trainer import ConstrainedTrainer


SCHEDULE = "schedule.json"
"""Written last: it says that a checkpoint is whole."""


@dataclass
class Begun:
    """How far a schedule is in a round: what it measured; the seconds, sums and row limit of the policy's steps."""

    round: int
    record: dict[str, Any]
    seconds_policy: float
    tally: Sums
    row_limit: int | None


def last_checkpoint(folder: str | Path) -> Path | None:
    """The last whole checkpoint of a run; one that a dead run left half-written is passed over."""
    return last_whole(folder, SCHEDULE)


class SequentialSchedule(TrainerCallback):
    """Runs a regulariser round before the first policy step of each round.

    Args:
        trainer: whose regularisers are updated; its `args.rounds` divide the policy's steps evenly.
    """

    def __init__(self, trainer: "ConstrainedTrainer"):
        self.trainer = trainer
        self.round = 0
        self._record: dict[str, Any] = {}
        self._policy_began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.args.rounds > state.max_steps and any(one.auxiliary for one in self.trainer.regularisers):
            raise UserError(
                f"rounds: {self.trainer.args.rounds} are more than the run's {state.max_steps} updates; lower rounds, "
                "or train for longer"
            )

    def on_step_begin(self, args, state, control, **kwargs):
        due = self._round_of(state.global_step, state)
        if due > self.round or any(self._lacking_targets()):
            with at_once():  # a round is long, and the last checkpoint goes on from before it
                if due > self.round:
                    self.begin_round(due)
                self._make_targets()

    def on_step_end(self, args, state, control, **kwargs):
        finished = state.global_step == state.max_steps
        if finished or self._round_of(state.global_step, state) > self.round:
            self._end_round()
            control.should_save = args.save_strategy != "no"
            control.should_evaluate |= self.trainer.eval_options is not None
        return control

    def _round_of(self, step: int, state: TrainerState) -> int:
        """The round, counted from 1, that policy step `step`, counted from 0, belongs to."""
        return step * self.trainer.args.rounds // state.max_steps + 1

    def _make_targets(self) -> None:
        """Makes the targets that this round's updates lack: all of them, or after a resume."""
        if any(lacking := self._lacking_targets()):
            began = time.perf_counter()
            rows = upcoming(self.trainer, self.round)
            for regulariser in compress(self.trainer.regularisers, lacking):
                regulariser.targets = make_targets(regulariser, rows[regulariser.index], self.round)
            self._record["seconds_targets"] = time.perf_counter() - began
            self._policy_began += self._record["seconds_targets"]

    def _lacking_targets(self) -> list[bool]:
        """Of which regularisers targets are to be made."""
        shipped = self.trainer.args.targets == "shipped"
        return [shipped and one.active and one.targets is None for one in self.trainer.regularisers]

    def begin_round(self, index: int) -> dict[str, Any]:
        """Refreshes every R from the policy as it stands; returns what was measured, by regulariser."""
        self.round, self._record = index, {"round": index}
        self._refresh(index)
        self._policy_began = time.perf_counter()
        return self._record

    def _refresh(self, index: int) -> None:
        for regulariser in self.trainer.regularisers:
            try:
                measured = regulariser.update(index)
            finally:
                self._keep_rollouts(index, regulariser.name, regulariser.rollouts)
            self._note(index, regulariser, measured)
        self._drop_old_targets()

    def _drop_old_targets(self) -> None:
        """Removes files of targets that no regulariser reads any more; each process its own."""
        read = {
            regulariser.targets.path for regulariser in self.trainer.regularisers if regulariser.targets is not None
        }
        for file in (Path(self.trainer.args.output_dir).resolve() / "targets").glob(f"*.{rank()}.arrow"):
            if file not in read:
                file.unlink()

    def on_train_end(self, args, state, control, **kwargs):
        for regulariser in self.trainer.regularisers:
            regulariser.targets = None
            if regulariser.auxiliary is not None and regulariser.is_fitted:  # the last R goes with the final model too
                regulariser.auxiliary.config.provenance["trained_model"] = fingerprint(self.trainer.model)
                self._keep_auxiliary(regulariser)
        self._drop_old_targets()

    def _note(self, index: int, regulariser: DomainRegulariser, measured: dict[str, Any]) -> None:
        """Keeps R of round `index` and writes down what was measured."""
        self._keep_auxiliary(regulariser, index)
        measured = measured | {"lambda": regulariser.options.weight, "term_on": regulariser.active}
        self._record |= {f"{regulariser.name}/{key}": value for key, value in measured.items()}
        log, config = self.trainer.state.log_history, self.trainer.args
        self._warn(round_warnings(regulariser.name, index, measured, log, config))
        EntropyGuard(self.trainer).check(regulariser.name, measured)

    def _warn(self, warnings: list[str]) -> None:
        for warning in warnings:
            tell(warning)
            self._record.setdefault("warnings", []).append(warning)

    def _end_round(self) -> None:
        self._record["seconds_policy"] = time.perf_counter() - self._policy_began
        self._record |= self.trainer.tally.of_round()
        self._warn(unreached_warnings(self._record))
        self.trainer.log_apart(self._record)

    def _keep_rollouts(self, index: int, name: str, rollouts: list[Rollout]) -> None:
        """Writes what a round sampled, also when scoring or fitting it failed."""
        if is_main() and rollouts and rollouts[0].round == index:
            folder = Path(self.trainer.args.output_dir) / "rollouts"
            write_rollouts(folder / f"round-{index}.{name}.jsonl", rollouts)

    def _keep_auxiliary(self, regulariser: DomainRegulariser, index: int | None = None) -> None:
        """Writes R where the latest is found, and by round, since R_1 is what guides the base model."""
        if is_main() and regulariser.auxiliary is not None and regulariser.is_fitted:
            folder = Path(self.trainer.args.output_dir) / "auxiliary"
            if sum(other.auxiliary is not None for other in self.trainer.regularisers) > 1:
                folder = folder / regulariser.name
            for place in (folder, *([folder / f"round-{index}"] if index is not None else [])):
                with atomic_files(place) as unfinished:
                    regulariser.auxiliary.save_pretrained(unfinished)

    # ------------------------------------------------------------------ resume

    def save(self, checkpoint: Path) -> None:
        """Completes a checkpoint that `transformers` has begun."""
        seconds, tally = time.perf_counter() - self._policy_began, self.trainer.tally.state()
        self._save_states(checkpoint)
        if is_main():
            sync_files(checkpoint)
            begun = Begun(self.round, self._record, seconds, tally, self.trainer.row_limit.rows)
            write_json(checkpoint / SCHEDULE, vars(begun))

    def _save_states(self, checkpoint: Path) -> None:
        states = {regulariser.name: regulariser.state() for regulariser in self.trainer.regularisers}
        if is_main():
            for name, kept in states.items():
                kept.save(checkpoint / "regularisers" / name)

    def load(self, checkpoint: Path) -> None:
        """Goes back to where a checkpoint was written."""
        saved = read_json(checkpoint / SCHEDULE, Begun)
        self.round, self._record = saved.round, saved.record
        self._policy_began = time.perf_counter() - saved.seconds_policy
        self.trainer.tally.restore(saved.tally)
        self.trainer.row_limit.rows = saved.row_limit
        for regulariser in self.trainer.regularisers:
            regulariser.adopt(RegulariserState.load(checkpoint / "regularisers" / regulariser.name))
