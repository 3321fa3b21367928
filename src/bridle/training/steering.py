"""Targets in a run: λ's step at the start of a round, and whether the trained model meets its target."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import sqrt
from statistics import fmean, pstdev
from typing import Any

from scipy.stats import binomtest

from bridle.constraints import AsyncScoring
from bridle.data import Rollout
from bridle.training.dual_ascent import DualState, TargetOptions
from bridle.training.guards import Supervisor
from bridle.training.regulariser import DomainRegulariser
from bridle.training.rollouts import score_rollouts

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
    regulariser.dual = before.measured(options, round_index, violations, acts_in)
    return {"violation": fmean(violations) if violations else None, "target": regulariser.dual.limit}


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
        violations, name, limit = options.violations(final_rollouts(regulariser)), regulariser.name, dual.limit
        if not violations or limit is None:
            supervisor.warn(f"{name}: no score says whether the target is met; fix the constraint")
            continue
        value, (low, high) = fmean(violations), _interval(violations)
        record = {f"{name}/violation_reached": value, f"{name}/target": limit}
        record |= {f"{name}/violation_reached_low": low, f"{name}/violation_reached_high": high}
        shown = value
        if options.confidence is not None:
            shown = record[f"{name}/violation_bound"] = options.bound(int(sum(violations)), len(violations))
        if shown > limit:
            found = _in_words(options, len(violations), value, low, high, limit)
            if options.confidence is not None and value <= limit:
                found += f" with {100 * options.confidence:g}% confidence: the bound is {shown:.1%}"
            causes = "; ".join(_causes(name, dual, options, log))
            supervisor.warn(f"{name}: the target is missed: {found}. {causes}", **record)
        else:
            supervisor.log(record)


def final_rollouts(regulariser: DomainRegulariser) -> list[Rollout]:
    """Scored plain rollouts of the trained model, from the prompts of a further round."""
    with AsyncScoring(regulariser.constraint) as scoring:
        rollouts, _ = regulariser.draw(regulariser.config.rounds + 1, scoring, plain=True)
        score_rollouts(rollouts, regulariser.constraint, scoring)
    return rollouts


def _interval(violations: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean: Wilson's of a rate, else the normal one."""
    count = len(violations)
    if set(violations) <= {0.0, 1.0}:
        found = binomtest(int(sum(violations)), count).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    half = 1.96 * pstdev(violations) / sqrt(count)
    return fmean(violations) - half, fmean(violations) + half


def _in_words(options: TargetOptions, count: int, value: float, low: float, high: float, limit: float) -> str:
    """The measured violation of the trained model beside the one allowed."""
    if options.mean is not None:
        return (
            f"the mean score of {count} samples is {1 - value:.3f} (95% interval {1 - high:.3f} to {1 - low:.3f}), "
            f"below {1 - limit:.3f}"
        )
    missed = "more than" if value > limit else "which does not show at most"
    return f"{value:.1%} of {count} samples violate (95% interval {low:.1%} to {high:.1%}), {missed} {limit:.1%}"


def _causes(name: str, dual: DualState, options: TargetOptions, log: Log) -> Iterator[str]:
    """What keeps a model from its target, each with what to do."""
    skills = [record[f"{name}/r_skill"] for record in log if record.get(f"{name}/r_skill") is not None]
    if dual.since is None:
        yield "The KL never acted, since every label was alike: show the constraint more, by harder prompts"
        return
    if dual.weight >= options.most:
        yield f"λ is at its bound, target.most {options.most:g}: raise it"
    elif dual.change > 0:
        yield (
            f"λ was still rising, to {dual.weight:.3g} after {dual.steps} steps: begin with a larger weight, or "
            "take more rounds and updates"
        )
    else:
        yield f"λ had fallen to {dual.weight:.3g}, as the last round met the target: raise target.margin"
    if skills and skills[-1] < LEAST_SKILL:
        yield (
            f"R predicts labels hardly better than a constant (skill {skills[-1]:.2f}), so that λ has little to act "
            "with: raise rollouts_per_round or rounds"
        )
