"""Which method to take for a corpus and a policy, by a rule that the sentence states, and what it costs."""

from collections import defaultdict
from math import exp, log

from bridle.report.data import FigureComparison, Report
from bridle.report.findings import listed
from bridle.report.measures import PERCENT, Measure, display_name, main_violation, significant, to_cell
from bridle.report.pareto import Tradeoff, tradeoffs
from bridle.report.style import family_of

MOST_PERPLEXITY = 0.05  # a higher one, by this share, is a loss
MOST_ACCURACY = 0.02  # the same for an accuracy, as a difference of shares
PLAIN = ("sft", "base")  # what costs are counted against: the first that was measured
UPON_SFT = ("rl", "rl-converged", "nado-decoding-sft", "dpo", "interleave@gap")
"""Methods that need the model of `sft`, whose time is not part of theirs."""


def recommendation(report: Report) -> str | None:
    """One sentence with the method to take; None where no method differs from the others.

    The rule: of the methods that reached every target with every seed, the one of least loss of utility; where none
    has a target, or none reached it, the lowest violation rate among the methods whose loss of utility, against plain
    tuning, is not shown to exceed a bound.
    """
    panel = next((one for one in tradeoffs(report) if len(one.points) > 1), None)
    if panel is None or report.main is None:
        return None
    violation = main_violation(report.main)
    if not any(significant(one) for one in report.comparisons if violation.is_of(one)):
        return None
    plain = next((name for name in PLAIN if name in panel.methods), None)
    if plain is None:
        return None
    reached = _that_reached(report, panel)
    if reached:
        chosen = min(reached, key=lambda name: _loss(panel, name, plain))
        rule = "of the methods that reached their target, it loses least"
    else:
        whole = [name for name in panel.points if name == plain or report.methods[name].status != "partial"]
        spared = [name for name in whole if not _is_shown_to_lose(report, panel, name, plain)]
        chosen = min(spared, key=lambda name: panel.points[name][0])
        rule = f"the lowest rate of the methods that are not shown to {_bound(panel)} against {plain}"
    rate = to_cell(panel.methods[chosen][0], PERCENT)
    interval = f" (95% interval {rate.interval}%)" if rate.interval else ""
    return (
        f"Take {chosen}: {rate.text}% of its completions of {violation.on} violate {violation.within}{interval}, "
        f"{rule}. {_cost(report, panel, chosen, plain)}"
    )


def _that_reached(report: Report, panel: Tradeoff) -> list[str]:
    """The measured methods that reached every target with every seed."""
    met: dict[str, list[bool]] = defaultdict(list)
    for curve in report.curves:
        asked = {
            name
            for one in curve.rounds
            for name, regulariser in one.regularisers.items()
            if regulariser.target is not None
        }
        met[curve.method] += [name in curve.targets and curve.targets[name].is_met for name in asked | {*curve.targets}]
    met = {
        name: each for name, each in met.items() if name in panel.methods and report.methods[name].status != "partial"
    }
    return [name for name, each in met.items() if each and all(each)]


def _loss(panel: Tradeoff, name: str, plain: str) -> float:
    """Loss of utility against plain tuning: a difference of accuracies, or of log perplexities."""
    ours, theirs = panel.points[name][1], panel.points[plain][1]
    return theirs - ours if panel.more_is_better else log(ours / theirs)


def _is_shown_to_lose(report: Report, panel: Tradeoff, name: str, plain: str) -> bool:
    """Whether even the least loss within the intervals exceeds the bound."""
    if name == plain:
        return False
    sign = -1 if panel.more_is_better else 1
    compared = {one.method: one for one in report.comparisons if panel.utility.is_of(one)}
    best = next((one.reference for one in compared.values()), None)
    if {name, plain} <= compared.keys() | {best}:
        # Paired with the best method, which cancels what makes one text harder than another.
        ends = [_ends(compared.get(one)) for one in (name, plain)]
        (low, high), (low_plain, high_plain) = ends
        least = low - high_plain if sign > 0 else low_plain - high
    else:
        ours, theirs = panel.methods[name][1], panel.methods[plain][1]
        low, high = (ours.known if end is None else end for end in (ours.low, ours.high))
        low_plain, high_plain = (theirs.known if end is None else end for end in (theirs.low, theirs.high))
        least = low_plain - high if sign < 0 else log(low / high_plain)
    return least > (MOST_ACCURACY if panel.more_is_better else log(1 + MOST_PERPLEXITY))


def _ends(compared: FigureComparison | None) -> tuple[float, float]:
    """The interval of a difference from the best; 0 of the best itself."""
    if compared is None:
        return 0.0, 0.0
    found = compared.difference
    value = found.value or 0.0
    return (value if found.low is None else found.low), (value if found.high is None else found.high)


def _bound(panel: Tradeoff) -> str:
    on = display_name(panel.utility.on)
    if panel.more_is_better:
        return f"lower accuracy on {on} by more than {100 * MOST_ACCURACY:g} points"
    return f"raise perplexity on {on} by more than {MOST_PERPLEXITY:.0%}"


def _cost(report: Report, panel: Tradeoff, chosen: str, plain: str) -> str:
    """What the method costs against plain tuning, or base: utility, and the time of training."""
    if chosen == plain:
        return f"It is what the others’ costs are counted against; {listed(list(panel.points))} were compared."
    unit = panel.utility.unit
    ours, theirs = (to_cell(panel.methods[name][1], unit).text + unit.symbol for name in (chosen, plain))
    change = exp(_loss(panel, chosen, plain)) - 1
    relative = "" if panel.more_is_better else f" ({change:+.1%})".replace("-", "−")
    parts = [f"{panel.utility.title.split(',')[0].lower()} on {display_name(panel.utility.on)} is {ours}{relative}"]
    seconds = [Measure("cost", "seconds").of(report.methods[name]) for name in (chosen, plain)]
    spent = [one.value for one in seconds if one is not None and one.value is not None]
    against = [f"{theirs} for {plain}"]
    if len(spent) == 2:
        besides = " besides that of sft" if family_of(chosen) in UPON_SFT else ""
        parts.append(f"training takes {spent[0]:,.0f} s{besides}")
        against.append(f"{spent[1]:,.0f} s")
    return f"The cost: {' and '.join(parts)}, against {' and '.join(against)}."
