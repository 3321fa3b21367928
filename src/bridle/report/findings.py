"""The summary of a comparison or a training run, in sentences made from its figures."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from bridle.evaluation.transfer import pleases_its_oracle
from bridle.report.data import Curve, FigureComparison, Main, Reached, Report
from bridle.report.measures import (
    PERCENT,
    Measure,
    best,
    display_name,
    in_words,
    main_violation,
    main_violations,
    measures,
    significant,
    to_cell,
)
from bridle.report.pareto import tradeoffs
from bridle.utils.percent import percent, percent_of, percent_up

LEAST_DECIDED = 0.1  # share of pairs; the summary warns of a judge that decides fewer


def findings(report: Report) -> list[str]:
    """Sentences on the main figures and their reliability, if measured."""
    if report.main is None:
        return [*_of_targets(report), *_of_runs(report.curves), *_of_warnings(report)]
    violation = main_violation(report.main)
    return [
        *_of_targets(report),
        *_of_best(report, violation),
        *_of_significance([one for one in report.comparisons if violation.is_of(one)]),
        *_of_oracle(report, report.main),
        *_of_front(report),
        *_of_failures(report),
        *_of_judge(report),
        *_of_warnings(report),
    ]


def failures(report: Report) -> list[dict[str, Any]]:
    """Method, seed, status and reason of each run that is not complete."""
    return [
        {"method": name, "seed": seed, "status": run.status, "reason": run.reason or "no reason was recorded"}
        for name, method in report.methods.items()
        for seed, run in method.seeds.items()
        if run.status != "complete"
    ]


def warnings(report: Report) -> list[dict[str, str]]:
    """Method, seed and text of each warning in training."""
    return [
        {"method": curve.method, "seed": curve.seed, "warning": warning}
        for curve in report.curves
        for warning in curve.warnings
    ]


def _of_targets(report: Report) -> Iterator[str]:
    """Whether each method met its targets, with each seed, and at what cost."""
    found: dict[tuple[str, str], list[Reached]] = defaultdict(list)
    for curve in report.curves:
        for domain, reached in curve.targets.items():
            found[curve.method, domain].append(reached)
    for (method, domain), seeds in found.items():
        met = sum(one.is_met for one in seeds)
        verdict = (
            "is met" if met == len(seeds) else "is missed" if not met else f"is met by {met} of {len(seeds)} seeds"
        )
        whose = "the trained model" if report.main is None else method
        asked = listed(list(dict.fromkeys(map(_asked, seeds))))
        cost = "".join(_cost(report, method))
        rates = listed([*map(_reached, seeds)])
        yield f"The target of {domain}, {asked}, {verdict}: {rates} of {whose}’s rollouts{cost}."


def _asked(found: Reached) -> str:
    """A target in words."""
    if found.mean_score_reached is not None:
        return f"a mean score of at least {1 - found.target:.4g}"
    return f"at most {percent(found.target)} violations"


def _reached(found: Reached) -> str:
    """What a trained model's rollouts show of its target."""
    low, high = found.violation_reached_low, found.violation_reached_high
    if found.mean_score_reached is not None:
        return f"{found.mean_score_reached:.3f} (95% interval {1 - high:.3f} to {1 - low:.3f})"
    bound = found.violation_bound
    shown = "" if bound is None else f", with the asked confidence at most {percent_up(bound)}"
    return f"{percent_of(found.violation_reached)} (95% interval {percent_of(low)} to {percent_of(high)}{shown})"


def _cost(report: Report, method: str) -> Iterator[str]:
    """What the control costs: perplexity of the main held-out text, against plain tuning or the base."""
    held_out = report.main and report.main.held_out
    rival = next((name for name in ("sft", "base") if name in report.methods and name != method), None)
    if not held_out or rival is None or method not in report.methods:
        return
    perplexity = Measure("perplexity", held_out)
    values = [perplexity.of(report.methods[name]) for name in (method, rival)]
    if all(value is not None and value.value is not None for value in values):
        ours, theirs = (to_cell(value, perplexity.unit).text for value in values)
        yield f", at perplexity {ours} on {display_name(held_out)}, against {theirs} for {rival}"


def _of_best(report: Report, violation: Measure) -> Iterator[str]:
    top = best(report, violation)
    if top is None or top not in report.methods:
        return
    values = {name: figure for name, method in report.methods.items() if (figure := violation.of(method))}
    said = {name: to_cell(figure, violation.unit) for name, figure in values.items() if figure.value is not None}
    interval = f" (95% interval {said[top].interval}%, n\u00a0=\u00a0{said[top].n:,})" if said[top].interval else ""
    rate = f"{said[top].text}%{interval}"
    tested = [one for one in report.comparisons if violation.is_of(one)]
    if len(said) > 1 and not tested:
        yield (
            f"Differences in violation rate were not tested. The lowest rate is that of {top}: {rate} of its "
            f"completions of {violation.on} violate {violation.within}."
        )
        return
    if not any(map(significant, tested)):
        found = f"{rate} of {top}’s completions of {violation.on} violate {violation.within}"
        if len(said) == 1:
            yield f"{found}; there is no other method to compare it with."
        else:
            yield f"No difference in violation rate is shown among {listed(list(said))}: {found}."
        return
    lowest = [name for name, cell in said.items() if cell.text == said[top].text]
    compared = f", against {said['base'].text}% for base" if "base" not in lowest and "base" in said else ""
    if len(lowest) > 1:
        yield (
            f"{listed(lowest)} have the lowest violation rate: {said[top].text}% of their completions of "
            f"{violation.on} violate {violation.within}{compared}."
        )
        return
    yield (
        f"{top} has the lowest violation rate: {rate} of its completions of {violation.on} "
        f"violate {violation.within}{compared}."
    )


def _of_significance(comparisons: list[FigureComparison]) -> Iterator[str]:
    differ = [one.method for one in comparisons if significant(one)]
    alike = [one.method for one in comparisons if significant(one) is False]
    if differ:
        best = comparisons[0].reference
        yield f"Significantly different from {best}, after Holm’s correction: {listed(differ)}."
        if alike:
            yield f"No significant difference from {best} was found for {listed(alike)}."


def _of_oracle(report: Report, main: Main) -> Iterator[str]:
    """The best method's rate under the training oracle, and a warning of each method that learns its errors."""
    top = best(report, main_violation(main))
    for beside in main_violations(main)[1:]:
        figures = {name: figure for name, method in report.methods.items() if (figure := beside.of(method))}
        rates = {name: to_cell(one, PERCENT).text for name, one in figures.items() if one.value is not None}
        compared = f", and base’s {rates['base']}%" if "base" in rates and top != "base" else ""
        if top in rates:
            yield f"Under {main.trained_on}, the training oracle, {top}’s rate is {rates[top]}%{compared}."
    for measure in measures(report, "transfer"):
        for name, method in report.methods.items():
            ratio = measure.of(method)
            if ratio is not None and pleases_its_oracle(ratio):
                yield (
                    f"Warning: {name} is learning to please its oracle: of its drop under {main.trained_on} on "
                    f"{measure.on}, {measure.within} confirms {in_words(ratio)}."
                )


def _of_front(report: Report) -> Iterator[str]:
    for first in [one for one in tradeoffs(report) if len(one.points) > 1][:1]:
        names = list(first.front)
        title = "accuracy" if first.more_is_better else "perplexity"
        verb = "is" if len(names) == 1 else "are"
        on = display_name(first.utility.on)
        yield f"{listed(names)} {verb} on the Pareto front of violation rate and {title} on {on}."


def _of_failures(report: Report) -> Iterator[str]:
    lacking = [name for name, method in report.methods.items() if method.status != "complete"]
    if lacking:
        yield f"Figures are missing for {listed(lacking)}: not every run is complete."


def _of_judge(report: Report) -> Iterator[str]:
    """Warns if the judge failed, prefers a position, or calls nearly all pairs ties: win rates are then near 50%.

    Of a judge that failed its examination nothing else is said.
    """
    if report.judge_failed:
        yield f"There are no win rates, because the judge failed: {report.judge_failed}."
    found, examined = report.win_rate, report.judge_examined
    if found is None:
        return
    if examined is not None and not examined.passed:
        yield (
            f"The judge {found.judge} failed its examination: it is right about {in_words(examined.accuracy)} of the "
            "pairs whose better text is known. The win rates are not meaningful and are left out here."
        )
        return
    names = list(found.matrix)
    matches = [found.matrix[one][other] for one, other in combinations(names, 2)]
    pairs = sum(match.wins + match.ties + match.losses - match.identical for match in matches)
    decided = sum(match.wins + match.losses for match in matches)
    by_place = sum(match.contradictions for match in matches)
    if 2 * by_place > pairs:
        yield (
            f"The judge {found.judge} has position bias: in {by_place:,} of {pairs:,} pairs it prefers the same place, "
            "first or second, in both orders. The win rates are not reliable."
        )
    elif pairs and decided < LEAST_DECIDED * pairs:
        ties = f"{pairs - decided:,} of {pairs:,} pairs"
        yield f"The judge {found.judge} calls {ties} a tie. The win rates are not reliable."


def _of_warnings(report: Report) -> Iterator[str]:
    found = warnings(report)
    if found:
        methods = f" ({listed(list(dict.fromkeys(one['method'] for one in found)))})" if report.methods else ""
        count, first = ("1 warning", "") if len(found) == 1 else (f"{len(found)} warnings", "; the first")
        yield f"Training gave {count}{methods}{first}: {found[0]['warning']}."


def _of_runs(curves: Iterable[Curve]) -> Iterator[str]:
    for curve in curves:
        for domain in curve.rounds[0].regularisers if curve.rounds else ():
            measured = [(one.number, one.regularisers[domain]) for one in curve.rounds if domain in one.regularisers]
            said = [
                f"{found.compliance:.1%} of rollouts complied in round {number}"
                for number, found in measured
                if found.compliance is not None
            ]
            if len(said) > 1:
                yield f"{domain}: {said[0]}, {said[-1]}."


def listed(names: list[str]) -> str:
    """Joins names with commas and "and"."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
