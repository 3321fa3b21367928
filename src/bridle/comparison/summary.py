"""Figures of methods from those of runs: means over seeds, and tests of differences."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from statistics import fmean, stdev
from typing import Any

from bridle.evaluation.classification import compare_auc
from bridle.evaluation.observations import Observations, Row
from bridle.evaluation.statistics import Estimate, compare_methods
from bridle.evaluation.transfer import Place, transfers

Figures = dict[str, Any]
Runs = Mapping[str, Mapping[int, Observations]]  # by method, by seed
Clusters = dict[int, list[float | bool | None]]  # by prompt, text or document: what was observed with all seeds

CLASSIFICATION = ("roc_auc", "average_precision", "accuracy", "brier", "expected_calibration_error")


def figures_of(results: Mapping[str, Any], cost: Mapping[str, float]) -> Figures:
    """The figures of one run that a comparison shows: groups of estimates, as JSON."""
    groups = {
        "violation": {
            prompts: {name: found["violation_rate"] for name, found in by_constraint.items()}
            for prompts, by_constraint in results.get("generation", {}).items()
        },
        "text": results.get("text", {}),
        "perplexity": {name: found["per_token"] for name, found in results.get("perplexity", {}).items()},
        "tasks": {name: found["accuracy"] for name, found in results.get("tasks", {}).items()},
        "classification": {
            name: estimate for name, estimate in results.get("classification", {}).items() if name in CLASSIFICATION
        },
        "cost": {name: asdict(Estimate(value, None, None, n=1)) for name, value in cost.items()},
    }
    return {name: group for name, group in groups.items() if group}


def over_seeds(runs: Sequence[Figures]) -> Figures:
    """The mean of every figure over the runs of several seeds.

    The ends of the intervals are averaged too, and do not shrink with more seeds: all seeds share the prompts and
    texts, and so the uncertainty from their choice. `spread`, the standard deviation over seeds, is the uncertainty
    from training and sampling.
    """
    if any(run.keys() >= {"value", "low", "high"} for run in runs):  # a constraint may have the name of one of them
        return _figure(runs)
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: over_seeds([run[name] for run in runs if name in run]) for name in names}


def _figure(estimates: Sequence[Mapping[str, Any]]) -> Figures:
    found = [estimate for estimate in estimates if estimate["value"] is not None]
    values = [estimate["value"] for estimate in found]
    return {
        **{end: _mean([estimate[end] for estimate in found]) for end in ("value", "low", "high")},
        "n": sum(estimate["n"] for estimate in estimates),
        "missing": sum(estimate["missing"] for estimate in estimates),
        "spread": stdev(values) if len(values) > 1 else None,
        "seeds": len(found),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present and len(present) == len(values) else None


# ---------------------------------------------------------------------- tests


def comparisons(runs: Runs, figures: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """How each method differs from the best one, figure by figure, with paired tests.

    Pairs are prompts, texts or documents, each averaged over seeds first. The p-values of one figure are adjusted for
    the number of methods (Holm). Perplexities are compared by their logarithm, in nats per token.

    Args:
        runs: observations by method and seed.
        figures: by method, over seeds; they decide which method is best.
    """
    return [
        *_paired("violation", runs, figures, "completions", _violations, best=min),
        *_paired("perplexity", runs, figures, "likelihoods", _nats(runs), best=min),
        *_paired("tasks", runs, figures, "answers", _answers, best=max),
        *_by_auc(runs, figures),
    ]


Observe = Callable[[Row], Iterable[tuple[Place, float | bool | None]]]


def _violations(row: Row) -> Iterable[tuple[Place, bool | None]]:
    for constraint, score in row["scores"].items():
        complies = score["complies"]
        yield (row["prompt_set"], constraint), None if complies is None else not complies


def _nats(runs: Runs) -> Observe:
    """−log p of a text over the mean length of all texts; its mean over texts is the log of the perplexity."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in next((o.likelihoods for by_seed in runs.values() for o in by_seed.values()), []):
        if row["tokens"]:
            lengths[row["held_out"]].append(row["tokens"])

    def observe(row: Row) -> Iterable[tuple[Place, float | None]]:
        yield (row["held_out"], None), row["nll"] / fmean(lengths[row["held_out"]]) if row["tokens"] else None

    return observe


def _answers(row: Row) -> Iterable[tuple[Place, float | bool | None]]:
    correct, weight = row["correct"], row["weight"]
    yield (row["task"], None), correct if correct is None or weight == 1 else weight * correct


def _paired(
    figure: str, runs: Runs, figures: Mapping[str, Figures], kind: str, observe: Observe, best: Callable[..., str]
) -> list[dict[str, Any]]:
    tests = []
    for (on, constraint), clusters_of in _by_place(runs, kind, observe).items():
        values = {method: _value(figures[method], figure, on, constraint) for method in clusters_of}
        known = {method: value for method, value in values.items() if value is not None}
        if len(known) > 1:
            rows = {method: [clusters_of[method][index] for index in sorted(clusters_of[method])] for method in known}
            where = {"figure": figure, "on": on, "constraint": constraint}
            tests += [where | asdict(test) for test in compare_methods(rows, best(known, key=known.__getitem__))]
    return tests


def _by_place(runs: Runs, kind: str, observe: Observe) -> dict[Place, dict[str, Clusters]]:
    """Observations of all seeds, by place, method, and index of the prompt, text or document."""
    found: dict[Place, dict[str, Clusters]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for method, by_seed in runs.items():
        for observations in by_seed.values():
            for row in getattr(observations, kind):
                for place, value in observe(row):
                    found[place][method][row["index"]].append(value)
    return found


def _value(figures: Figures, group: str, on: str, within: str | None) -> float | None:
    figure = figures.get(group, {}).get(on, {})
    value: float | None = (figure if within is None else figure.get(within, {})).get("value")
    return value


def _by_auc(runs: Runs, figures: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """Differences of the mean AUC over seeds, with bootstrap intervals over rows and no p-value."""
    values = {method: _value(found, "classification", "roc_auc", None) for method, found in figures.items()}
    aucs = {method: value for method, value in values.items() if value is not None}
    if len(aucs) < 2:
        return []
    rows = {method: [observed.classified for observed in runs[method].values()] for method in aucs}
    scores = {method: [[row["score"] for row in run] for run in found] for method, found in rows.items()}
    reference = max(aucs, key=aucs.__getitem__)
    labels = [row["label"] for row in rows[reference][0]]
    where = {"figure": "classification", "on": "roc_auc", "constraint": None, "reference": reference}
    untested = {"p_value": None, "adjusted_p_value": None, "test": "bootstrap"}
    return [
        {"method": method, "difference": asdict(compare_auc(found, scores[reference], labels))} | where | untested
        for method, found in scores.items()
        if method != reference
    ]


def transfers_of(runs: Runs, trained: str | None, dependent: Collection[str]) -> dict[str, Figures]:
    """The group `transfer` of each method: how far each independent constraint confirms the training oracle.

    Args:
        trained: the training oracle; None if it was not measured.
        dependent: the constraints that are not independent.
    """
    found = _by_place(runs, "completions", _violations)
    independent = {str(constraint) for _, constraint in found if constraint not in dependent}
    ratios = transfers(found, trained, independent) if trained else {}  # type: ignore[arg-type]
    return {
        method: {
            "transfer": {
                prompt_set: {
                    name: asdict(one) | {"spread": None, "seeds": len(runs[method])} for name, one in by_name.items()
                }
                for prompt_set, by_name in by_set.items()
            }
        }
        for method, by_set in ratios.items()
    }


def first_completions(runs: Runs, prompt_set: str, prompts: int) -> tuple[list[str], dict[str, list[str]]]:
    """The judge's input: the first prompts, and each method's first completions with its lowest seed."""
    asked: list[str] = []
    completions = {}
    for method, by_seed in runs.items():
        if by_seed:
            rows = by_seed[min(by_seed)].completions
            first = [row for row in rows if row["prompt_set"] == prompt_set and row["sample"] == 0]
            asked = [row["prompt"] for row in islice(first, prompts)]
            completions[method] = [row["completion"] for row in islice(first, prompts)]
    return asked, completions
