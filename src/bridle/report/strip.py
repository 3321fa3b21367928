"""What changed between the rounds of a training run, a step for each round."""

from collections.abc import Iterator
from dataclasses import dataclass

from bridle.report.data import Curve, RegulariserRound, Report
from bridle.report.measures import PERCENT

NOTABLE = 0.05  # relative change of λ, of which a smaller one is not shown
NO_FIT = {"kept": "R learnt nothing but the rate", "none": "no R yet", "unlabelled": "no label to learn"}


@dataclass(frozen=True)
class Step:
    """A round, beside the one before it.

    Attributes:
        number: of the round.
        rate: share of its rollouts that violate, in %.
        interval: its 95% interval.
        counts: the number of scored rollouts.
        change: in points, since the round before; empty in the first.
        outcome: "fewer" or "more" violations; "alike" where the intervals overlap.
        notes: what else changed.
    """

    number: int
    rate: str
    interval: str
    counts: str
    change: str
    outcome: str
    notes: list[str]


def strips(report: Report) -> dict[str, list[Step]]:
    """The steps of each run and regulariser with at least two measured rounds, by its heading."""
    found = {}
    for curve in report.curves:
        for name in dict.fromkeys(name for one in curve.rounds for name in one.regularisers):
            run = f"{curve.method}, seed {curve.seed}, " if report.methods else ""
            steps = [*_steps(curve, name)]
            if len(steps) > 1:
                found[f"{run}regulariser {name}"] = steps
    return found


def _steps(curve: Curve, name: str) -> Iterator[Step]:
    measured = [(one.number, one.regularisers[name]) for one in curve.rounds if name in one.regularisers]
    measured = [(number, one) for number, one in measured if one.compliance is not None]
    before = None
    for number, now in measured:
        rate, low, high = _violation(now)
        yield Step(
            number,
            f"{PERCENT.write(rate)}%",
            "" if low is None or high is None else f"{PERCENT.write(low)} to {PERCENT.write(high)}",
            f"n = {now.scored:,}",
            "" if before is None else f"{100 * (rate - _violation(before)[0]):+.1f} points".replace("-", "−"),
            "alike" if before is None else _outcome(before, now),
            [*_notes(before, now)],
        )
        before = now


def _violation(one: RegulariserRound) -> tuple[float, float | None, float | None]:
    """The violation rate and its interval."""
    assert one.compliance is not None
    low, high = (None if bound is None else 1 - bound for bound in (one.compliance_high, one.compliance_low))
    return 1 - one.compliance, low, high


def _outcome(before: RegulariserRound, now: RegulariserRound) -> str:
    (_, low_before, high_before), (_, low, high) = _violation(before), _violation(now)
    if None in (low_before, high_before, low, high):
        return "alike"
    if high < low_before:  # type: ignore[operator]
        return "fewer"
    return "more" if low > high_before else "alike"  # type: ignore[operator]


def _notes(before: RegulariserRound | None, now: RegulariserRound) -> Iterator[str]:
    if now.weight is not None:
        moved = before is not None and before.weight and abs(now.weight / before.weight - 1) > NOTABLE
        yield f"λ {before.weight:.3g} → {now.weight:.3g}" if moved and before else f"λ {now.weight:.3g}"
    if no_fit := NO_FIT.get(now.fit or ""):
        yield no_fit
    elif now.r_skill is not None:
        yield f"R’s skill {now.r_skill:.2f}".replace("-", "−")
    if now.kl is not None:
        yield f"KL {now.kl:.2g}"
