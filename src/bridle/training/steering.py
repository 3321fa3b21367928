"""Targets in a run: λ's step at the start of a round, and whether the trained model meets its target."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import nan, sqrt
from statistics import fmean, pstdev
from typing import Any

from scipy.stats import binomtest
from transformers import TrainerControl, TrainerState

from bridle.constraints import AsyncScoring
from bridle.data import Rollout
from bridle.errors import prefixed
from bridle.training.dual_ascent import DualState, TargetOptions
from bridle.training.guards import Supervisor, lost_entropy
from bridle.training.measures import measure_samples
from bridle.training.regulariser import DomainRegulariser
from bridle.training.rollouts import score_rollouts
from bridle.utils.percent import percent, percent_of, percent_up

LEAST_SKILL = 0.05  # of R; below it R knows next to nothing

Log = Sequence[Mapping[str, Any]]  # a run's records


def steer(regulariser: DomainRegulariser, round_index: int, used_in: int) -> dict[str, Any]:
    """Moves λ after a round's measurement, if the regulariser has a target.

    Args:
        regulariser: with the round's rollouts.
        round_index: the round that was measured, from 1.
        used_in: the round whose updates come next; a later one in the parallel schedule.

    Returns:
        The metrics `violation` and `target`.
    """
    options = regulariser.options.target
    if options is None:
        return {}
    violations = options.violations(regulariser.rollouts)
    before = regulariser.dual or DualState(regulariser.options.weight)
    acts_in = used_in if regulariser.active else None
    with prefixed(f"regularisers.{regulariser.name}."):
        regulariser.dual = before.measured(
            options, round_index, violations, acts_in, shown_on=regulariser.config.rollouts_per_round
        )
    return {"violation": fmean(violations) if violations else None, "target": regulariser.dual.limit}


def guard_entropy(
    regulariser: DomainRegulariser,
    record: dict[str, Any],
    state: TrainerState,
    supervisor: Supervisor,
    control: TrainerControl,
) -> None:
    """Lowers λ of a target if the policy has lost its entropy; without a target, or a smaller λ, stops the run.

    Args:
        regulariser: after its round.
        record: the round's metrics.
        state: its log has the first round's entropy.
        supervisor: logs the warning or stops.
        control: of the run.
    """
    name, options, dual = regulariser.name, regulariser.options.target, regulariser.dual
    entropy = record.get(f"{name}/entropy_sampled", nan)
    if not (lost := lost_entropy(name, entropy, state.log_history, regulariser.config.entropy_floor)):
        return
    if dual is not None and dual.ceiling_since is not None and regulariser.rollouts[0].round <= dual.ceiling_since:
        return  # in the parallel schedule the policy that was sampled may be older than the lower λ
    lost = f"round {record['round']}: {lost}"
    if options is None or dual is None or dual.last_weight <= options.least:
        supervisor.stop(f"{lost}; try a smaller regulariser weight or more rounds", control)
    else:
        regulariser.dual = lowered = dual.lowered(options, acts_in=record["round"])
        record[f"{name}/lambda"] = lowered.weight
        supervisor.warn(f"{lost}; from now on λ is at most {lowered.ceiling:.3g}")


def report_targets(regularisers: Iterable[DomainRegulariser], supervisor: Supervisor, log: Log) -> None:
    """Measures the trained model on a round of plain rollouts for each target, and warns of one that is missed.

    Args:
        regularisers: after the last update.
        supervisor: logs the results.
        log: the run's records.
    """
    for regulariser in regularisers:
        options, dual = regulariser.options.target, regulariser.dual
        if options is None or dual is None:
            continue
        name, rollouts = regulariser.name, final_rollouts(regulariser)
        violations = options.violations(rollouts)
        missing = len(rollouts) - len(violations)
        if not violations or dual.limit is None:
            supervisor.warn(f"{name}: no score says whether the target is met; fix the constraint")
            continue
        limit, value, (low, high) = options.limit(dual.base), fmean(violations), _interval(violations)
        record = {f"{name}/violation_reached": value, f"{name}/target": limit, f"{name}/violation_missing": missing}
        record |= {f"{name}/violation_reached_low": low, f"{name}/violation_reached_high": high}
        if options.mean is not None:
            record[f"{name}/mean_score_reached"] = 1 - value
        shown = value
        if options.confidence is not None:  # whatever has no score may violate
            shown = options.bound(int(sum(violations)) + missing, len(rollouts))
            record[f"{name}/violation_bound"] = shown
        entropy = measure_samples(rollouts)["entropy_sampled"]
        if lost := lost_entropy(name, entropy, log, regulariser.config.entropy_floor):
            supervisor.warn(f"at the end {lost}; try an earlier checkpoint, a smaller target.most, or more rounds")
        if missing > regulariser.config.max_missing * len(rollouts):
            supervisor.warn(
                f"{name}: {missing} of the last {len(rollouts)} samples got no score; the rate is of the others"
            )
        if shown > limit:
            found = _in_words(options, len(violations), value, low, high, limit)
            if options.confidence is not None and value <= limit:
                without = f", with {missing} samples without a score" * bool(missing)
                found += f" with {percent(options.confidence)} confidence: the bound is {percent_up(shown)}{without}"
            causes = "; ".join(_causes(name, dual, options, log))
            supervisor.warn(f"{name}: the target is missed: {found}. {causes}", **record)
        else:
            supervisor.log(record)


def final_rollouts(regulariser: DomainRegulariser) -> list[Rollout]:
    """Scored plain rollouts of the trained model, from the prompts of a further round."""
    with AsyncScoring(regulariser.constraint) as scoring:
        rollouts, _ = regulariser.draw(regulariser.config.rounds + 1, scoring, plain=True)
        score_rollouts(rollouts, scoring)
    return rollouts


def _interval(violations: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean: Wilson's of a rate, else the normal one."""
    count = len(violations)
    if set(violations) <= {0.0, 1.0}:
        found = binomtest(int(sum(violations)), count).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    half = 1.96 * pstdev(violations) / sqrt(count)
    return max(0.0, fmean(violations) - half), min(1.0, fmean(violations) + half)


def _in_words(options: TargetOptions, count: int, value: float, low: float, high: float, limit: float) -> str:
    """The measured violation of the trained model beside the one allowed."""
    if options.mean is not None:
        return (
            f"the mean score of {count} samples is {1 - value:.3f} (95% interval {1 - high:.3f} to {1 - low:.3f}), "
            f"below {1 - limit:.3f}"
        )
    missed = "more than" if value > limit else "which does not show at most"
    interval = f"{percent_of(low)} to {percent_of(high)}"
    return f"{percent_of(value)} of {count} samples violate (95% interval {interval}), {missed} {percent(limit)}"


def _causes(name: str, dual: DualState, options: TargetOptions, log: Log) -> Iterator[str]:
    """What keeps a model from its target, each with what to do."""
    skills = [record[f"{name}/r_skill"] for record in log if record.get(f"{name}/r_skill") is not None]
    if dual.since is None:
        yield "The KL never acted, since every label was alike: show the constraint more, by harder prompts"
        return
    if dual.ceiling is not None and (dual.weight >= dual.ceiling or not dual.change):
        yield (
            f"λ is held at {dual.weight:.3g}, since under a larger one the policy's samples lost their entropy: take "
            "more rounds, or anchor: previous"
        )
    elif dual.weight >= options.most:
        yield f"λ is at its bound, target.most {options.most:g}: raise it"
    elif not dual.steps:
        yield f"λ took no step, as the KL first acted in round {dual.since}: take more rounds, or harder prompts"
    elif dual.change > 0:
        yield (
            f"λ was still rising, to {dual.weight:.3g} after {dual.steps} steps: begin with a larger weight, or "
            "take more rounds and updates"
        )
    elif dual.change < 0:
        yield f"λ had fallen to {dual.weight:.3g}, as the last round met the target: raise target.margin"
    else:
        yield f"λ stayed at {dual.weight:.3g} in the last round: take more rounds, or a larger target.step"
    if skills and skills[-1] < LEAST_SKILL:
        yield (
            f"R predicts labels hardly better than a constant (skill {skills[-1]:.2f}), so that λ has little to act "
            "with: raise rollouts_per_round or rounds"
        )
