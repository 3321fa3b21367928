"""The sequential schedule (EMNLP 2024, the first of two): refresh R from the policy, then train the policy, in turn.

Round i's policy steps use R_i, fitted on samples of p_{i-1}, the policy at the end of round i-1.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from bridle.errors import UserError
from bridle.models.auxiliary import fingerprint
from bridle.training.config import ConstrainedConfig
from bridle.training.guards import Supervisor, round_warnings, unreached_warnings, warn
from bridle.training.regulariser import DomainRegulariser
from bridle.training.regulariser_set import RegulariserSet
from bridle.training.state import PROGRESS_FILE, RegulariserState, RoundProgress
from bridle.training.steering import guard_entropy, steer
from bridle.utils.distributed import is_main
from bridle.utils.files import read_json
from bridle.utils.interruption import at_once, is_pending

Log = Sequence[Mapping[str, Any]]  # a run's records

ENDED = "seconds_policy"  # the metric that comes when a round ends


class SequentialSchedule(TrainerCallback):
    """Runs a round of every regulariser before the first policy step of each round.

    Args:
        regularisers: the ones to update.
        config: its `rounds` divide the policy's steps evenly.
        supervisor: logs each round, and stops the run if the policy collapses.
        evaluates: whether an evaluation is due at each round's end.
    """

    def __init__(
        self, regularisers: RegulariserSet, config: ConstrainedConfig, supervisor: Supervisor, evaluates: bool = False
    ):
        self.regularisers, self.config, self.supervisor, self.evaluates = regularisers, config, supervisor, evaluates
        self.round = 0
        self._record: dict[str, Any] = {}
        self._policy_began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if args.rounds > state.max_steps and any(one.options.samples for one in self.regularisers):
            raise UserError(
                f"rounds: {args.rounds} are more than the run's {state.max_steps} updates; lower rounds, or train for "
                "longer"
            )

    def on_step_begin(self, args, state, control, **kwargs):
        due = self._round_of(state.global_step, state)
        if due > self.round:
            with at_once():  # a round is long, and the last checkpoint resumes before it
                self.begin_round(due, state.log_history)
            for regulariser in self.regularisers:
                guard_entropy(regulariser, self._record, state, self.supervisor, control)

    def on_step_end(self, args, state, control, **kwargs):
        finished = state.global_step == state.max_steps
        if finished or self._round_of(state.global_step, state) > self.round:
            self._end_round()
            control.should_save = args.save_strategy != "no"
            control.should_evaluate |= self.evaluates
        return control

    def on_train_end(self, args, state, control, **kwargs):
        is_open = bool(self._record) and ENDED not in self._record
        if is_open and self.supervisor.verdict is None and not is_pending():  # else a resumed run ends it
            self._end_round()
        for regulariser in self.regularisers:
            if regulariser.auxiliary is not None and regulariser.is_fitted:  # the final model has the last R too
                regulariser.auxiliary.config.provenance["trained_model"] = fingerprint(regulariser.model)
                self._keep_auxiliary(regulariser)

    def _round_of(self, step: int, state: TrainerState) -> int:
        """The round, counted from 1, that policy step `step`, counted from 0, belongs to."""
        return step * self.config.rounds // state.max_steps + 1

    def begin_round(self, index: int, log: Log = ()) -> dict[str, Any]:
        """Refreshes every R from the current policy.

        Args:
            index: of the round, 1 for the first.
            log: the run's records so far.

        Returns:
            The metrics, by regulariser.
        """
        self.round, self._record = index, {"round": index}
        self._refresh(index, log)
        self._policy_began = time.perf_counter()
        return self._record

    def _refresh(self, index: int, log: Log) -> None:
        for regulariser in self.regularisers:
            try:
                measured = regulariser.update(index)
            finally:
                regulariser.keep_rollouts(index, regulariser.rollouts)
            self._note(index, regulariser, measured, log)

    def _note(self, index: int, regulariser: DomainRegulariser, measured: dict[str, Any], log: Log) -> None:
        """Keeps R of round `index` and records its metrics."""
        self._keep_auxiliary(regulariser, index)
        steered = steer(regulariser, index, self.round) if measured else {}
        measured = measured | steered | {"lambda": regulariser.weight, "term_on": regulariser.active}
        self._record |= {f"{regulariser.name}/{self.recorded_as(key)}": value for key, value in measured.items()}
        self._warn(round_warnings(regulariser.name, index, measured, log, self.config))

    @staticmethod
    def recorded_as(key: str) -> str:
        """The name of a regulariser's measure in the record."""
        return key

    def _warn(self, warnings: list[str]) -> None:
        for warning in warnings:
            warn(warning)
            self._record.setdefault("warnings", []).append(warning)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Attributes time just spent to a phase of the round instead of the policy's steps."""
        self._record[f"seconds_{phase}"] = self._record.get(f"seconds_{phase}", 0.0) + seconds
        self._policy_began += seconds

    def _end_round(self) -> None:
        self._record[ENDED] = time.perf_counter() - self._policy_began
        self._record |= self.regularisers.means.of_round()
        self._warn(unreached_warnings(self._record))
        self.supervisor.log(self._record)

    # ------------------------------------------------------------------ files

    def _keep_auxiliary(self, regulariser: DomainRegulariser, index: int | None = None) -> None:
        folder = Path(self.config.output_dir) / "auxiliary"
        several = sum(other.auxiliary is not None for other in self.regularisers) > 1
        regulariser.keep_auxiliary(folder / regulariser.name if several else folder, index)

    def save(self, checkpoint: Path) -> dict[str, Any]:
        """Writes the regularisers' states into a checkpoint; returns the progress of the round."""
        seconds, tally = time.perf_counter() - self._policy_began, self.regularisers.means.state()
        self._save_states(checkpoint)
        duals = {one.name: vars(one.dual) for one in self.regularisers if one.dual is not None}
        return vars(RoundProgress(self.round, self._record, seconds, tally)) | {"duals": duals}

    def _save_states(self, checkpoint: Path) -> None:
        states = {regulariser.name: regulariser.state() for regulariser in self.regularisers}
        if is_main():
            for name, kept in states.items():
                kept.save(checkpoint / "regularisers" / name)

    def load(self, checkpoint: Path) -> None:
        """Resumes from a checkpoint."""
        saved = read_json(checkpoint / PROGRESS_FILE, RoundProgress)
        self.round, self._record = saved.round, saved.record
        self._policy_began = time.perf_counter() - saved.seconds_policy
        self.regularisers.means.restore(saved.tally)
        for regulariser in self.regularisers:
            regulariser.load_state(RegulariserState.load(checkpoint / "regularisers" / regulariser.name))
            regulariser.dual = saved.duals.get(regulariser.name)
