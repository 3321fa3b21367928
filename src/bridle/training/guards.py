"""Guards: each detects one problem, reports it with advice, and warns or stops the run.

Their reports are under `warnings` in the log, `metrics.jsonl` and the report. A resumed run reads its history from the
log.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from bridle.training.config import ConstrainedConfig
from bridle.utils.distributed import is_main
from bridle.utils.interruption import is_pending

Measured = Mapping[str, Any]  # what a round measured for one regulariser, by the keys of docs/metrics.md

UNREACHED_BOUND = 0.05  # of a domain's prefixes; prompts take a token or two at the beginning of each row
FEWEST_KEPT_BACK = 20  # rollouts; on fewer the calibration error of a perfect R can exceed any useful bound
FEWEST_OF_EACH = 5  # kept back of those that violate and of those that comply; on fewer R's skill is noise
DOMINANT_SHARE = 0.5  # of a round that goes into scoring
NOTICEABLE = 10.0  # seconds

logger = logging.getLogger(__name__)


def warn(warning: str) -> None:
    """Warns on stderr, from one process only."""
    if is_main():
        logger.warning(warning)


class Supervisor:
    """Logs the guards' reports, and keeps the reason for a stop.

    Args:
        log: takes a record of the run's log.

    Attributes:
        skipped: whether the last update was skipped because its loss or gradient was not finite.
        verdict: why the run stops; None while it continues.
    """

    def __init__(self, log: Callable[[dict[str, Any]], None]):
        self.log = log
        self.skipped = False
        self.verdict: str | None = None

    def warn(self, warning: str, **measured: Any) -> None:
        """Reports a problem; the run continues."""
        warn(warning)
        self.log({**measured, "warnings": [warning]})

    def stop(self, verdict: str, control: TrainerControl, **measured: Any) -> None:
        """Ends the run once a checkpoint is written; `train` then raises the verdict."""
        self.verdict = verdict
        self.log({**measured, "warnings": [verdict]})
        control.should_training_stop = control.should_save = True


class FiniteGuard(TrainerCallback):
    """Reports each update that was skipped because its loss or gradient was not finite; stops at too many."""

    def __init__(self, supervisor: Supervisor):
        self.supervisor = supervisor

    def on_step_end(self, args, state, control, **kwargs):
        if not self.supervisor.skipped:
            return
        in_a_row = _skipped_before(state) + 1
        report = (
            f"update {state.global_step} was skipped: its loss or gradient was not finite ({in_a_row} in a row); try a "
            "smaller learning_rate or regulariser weight, or float32 or bf16 in place of half precision"
        )
        if in_a_row > args.max_skipped_steps:
            verdict = f"{report}; max_skipped_steps is {args.max_skipped_steps}"
            self.supervisor.stop(verdict, control, skipped_in_a_row=in_a_row)
        else:
            self.supervisor.warn(report, skipped_in_a_row=in_a_row)


def _skipped_before(state: TrainerState) -> int:
    """The number of consecutive skipped updates before this one."""
    last = next((record for record in reversed(state.log_history) if "skipped_in_a_row" in record), None)
    return last["skipped_in_a_row"] if last and last["step"] == state.global_step - 1 else 0


class InterruptionGuard(TrainerCallback):
    """Ends a run with a checkpoint, after the update in which a signal arrived."""

    def on_step_end(self, args, state, control, **kwargs):
        if is_pending():
            control.should_training_stop = control.should_save = True


def lost_entropy(name: str, entropy: float, log: Sequence[Measured], floor: float) -> str | None:
    """Describes a loss of entropy: a stale R and a strong λ drive the policy's samples towards one text.

    Args:
        name: of the regulariser.
        entropy: of the policy's samples now, in nats a token; NaN if nothing was sampled.
        log: the run's records, the first round's among them.
        floor: the share of the first round's entropy that must remain.
    """
    known = (record.get(f"{name}/entropy_sampled", math.nan) for record in log)
    first = next(filter(math.isfinite, known), math.nan)
    if not entropy < floor * first:
        return None
    return (
        f"the entropy of the policy's samples for {name} fell from {first:.2f} to {entropy:.2f} nats a token, "
        f"below entropy_floor {floor}"
    )


# ---------------------------------------------------------------------- a round


def round_warnings(
    name: str, round_index: int, measured: Measured, log: Sequence[Measured], config: ConstrainedConfig
) -> list[str]:
    """Warnings about a regulariser's round, a sentence each; the run continues.

    Args:
        name: the regulariser's.
        round_index: the round that was measured, 1 for the first.
        measured: what it measured.
        log: all records of the run so far.
        config: the bounds.
    """
    found = (
        *_of_labels(measured, config),
        *_of_fit(measured, config),
        *_of_silence(measured, config),
        *_of_clipping(measured, config),
        *_of_scoring(round_index, measured),
        *_of_rising_violations(measured, [_of_regulariser(name, record) for record in log]),
    )
    return [f"round {round_index}, {name}: {warning}" for warning in found]


def unreached_warnings(record: Measured) -> list[str]:
    """Warnings, a sentence each, about prefixes left out of the KL because no rollout can reach them.

    Args:
        record: of the round, with the means over its updates.
    """
    shares = {key.removeprefix("kl_unreached/"): share for key, share in record.items() if "kl_unreached/" in key}
    return [
        f"round {record['round']}, {name}: the KL left out {share:.0%} of the corpus's prefixes, since no rollout can "
        "be there and R was not fitted on them; widen prompt_tokens or raise max_new_tokens, and for chats set "
        "assistant_only_loss: true"
        for name, share in shares.items()
        if share > UNREACHED_BOUND
    ]


def _of_regulariser(name: str, record: Measured) -> Measured:
    return {key.removeprefix(f"{name}/"): value for key, value in record.items() if key.startswith(f"{name}/")}


def _of_labels(now: Measured, config: ConstrainedConfig) -> Iterator[str]:
    advice = "more rollouts_per_round or harder prompts would show the constraint more"
    if now.get("tilt") == 0:
        return  # the share is allowed, and no label need differ
    if now.get("fit") == "kept":
        opposite = ", and, as it was fitted to the opposite share, the term is off"
        rate = " but their rate" if now.get("term_on", True) else opposite
        yield f"every label is alike, so R learnt nothing new{rate}; {advice}"
    if now.get("fit") == "none":
        yield f"every label is alike and no round before had others, so R is constant and q is the anchor; {advice}"
    if now.get("fit") == "unlabelled":
        yield (
            f"no rollout has a label to learn, since all were cut at max_new_tokens {config.max_new_tokens} or got no "
            "score, so R stays as it is; raise max_new_tokens, or set truncated: label"
        )
    if now.get("fit_corpus") == "none":
        yield (
            f"auxiliary.corpus_outputs taught R nothing: {now['corpus_outputs']} outputs of the corpus have no two "
            "labels that differ; leave it out, or regularise rows with outputs of both kinds"
        )


def _of_fit(now: Measured, config: ConstrainedConfig) -> Iterator[str]:
    if skipped := now.get("r_steps_skipped"):
        yield f"{skipped} steps of R's fit were skipped, not being finite; try a lower auxiliary.learning_rate"
    error, kept_back = now.get("r_ece", 0), now.get("r_kept_back", 0)
    if kept_back >= FEWEST_KEPT_BACK and error > config.calibration_bound:
        yield (
            f"R's calibration error is {error:.3f}, above calibration_bound {config.calibration_bound}, so q follows "
            "an R that is wrong; try more rollouts_per_round, fewer auxiliary.epochs, or auxiliary.own_network"
        )
    skill, violating = now.get("r_skill"), now.get("r_violating", 0)
    if min(violating, kept_back - violating) >= FEWEST_OF_EACH and skill is not None and skill <= 0:
        yield (
            f"R knows nothing: on the {kept_back} rollouts kept back it is no better than a constant (skill "
            f"{skill:.2f}), so q hardly differs from the policy, or follows noise; try more rollouts_per_round, "
            "auxiliary.corpus_outputs, auxiliary.seek, or prompts that violate more"
        )


def _of_silence(now: Measured, config: ConstrainedConfig) -> Iterator[str]:
    empty, drawn = now.get("rollouts_empty", 0), now.get("rollouts", 0)
    if empty > config.empty_bound * drawn:
        yield (
            f"{empty} of {drawn} rollouts say nothing, above empty_bound {config.empty_bound}. Most constraints call "
            "that compliance, and R learns little but to end: put {type: length, min_words: 3} beside the constraint, "
            "or try a smaller weight, or prompts that do not end where a text does"
        )


def _of_clipping(now: Measured, config: ConstrainedConfig) -> Iterator[str]:
    if (clipped := now.get("clipped", 0)) > config.clipped_bound:
        yield (
            f"{clipped:.0%} of the rollouts were cut at max_new_tokens {config.max_new_tokens}, above clipped_bound "
            f"{config.clipped_bound}: R speaks of texts up to that length. Evaluate with the same length, or raise it"
        )


def _of_scoring(round_index: int, now: Measured) -> Iterator[str]:
    seconds = {phase: now.get(f"seconds_{phase}", 0.0) for phase in ("sampling", "scoring", "fitting")}
    share = seconds["scoring"] / (sum(seconds.values()) or 1.0)
    if round_index == 1 and share > DOMINANT_SHARE and seconds["scoring"] > NOTICEABLE:
        texts = sum(now.get(kind, 0) for kind in ("rollouts", "rollouts_sought", "corpus_outputs"))
        rate = texts / seconds["scoring"]
        yield (
            f"scoring took {seconds['scoring']:.0f} s, {share:.0%} of the round without its updates: the constraint "
            f"reads {rate:.2g} texts a second; try a larger batch_size of it, or a smaller model"
        )


def _of_rising_violations(now: Measured, earlier: Sequence[Measured]) -> Iterator[str]:
    """Compares with the best round so far: the 95% intervals do not overlap. A share may fall.

    Under a target λ falls where the policy violates less than it may, so violations may rise up to the target.
    """
    violation, allowed = now.get("violation"), now.get("target")
    is_within = violation is not None and allowed is not None and violation <= allowed
    if "tilt" in now or is_within:
        return
    known = [one for one in earlier if one.get("compliance") is not None]
    best = max(known, key=lambda one: one["compliance_low"], default=None)
    if best is not None and now.get("compliance") is not None and now["compliance_high"] < best["compliance_low"]:
        yield (
            f"violations rose from {1 - best['compliance']:.1%} to {1 - now['compliance']:.1%} of the rollouts: the "
            "corpus pulls harder than q; try a larger weight, more rounds, or auxiliary.replay"
        )
