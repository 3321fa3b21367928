"""Does an independent constraint confirm what a method wins under the oracle that it was trained on?

    transfer ratio = (1 − b/b₀) / (1 − a/a₀)

a and b are a method's violation rates under the training oracle and under the independent constraint, and a₀ and b₀ its
reference's: the same model without the constraint. Shares of the violations are compared, not differences of the rates,
since constraints call different numbers of the same texts violating. At 1 the independent constraint sees the same
share of the violations go; at 0 none of them; below 0 it sees more of them than before.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from bridle.evaluation.statistics import (
    LEVEL,
    Clusters,
    Estimate,
    bootstrap_interval,
    observed_mean,
    paired_bootstrap,
)

HALF = 0.5

Place = tuple[str, Any]  # prompt set and constraint
Verdicts = Mapping[int, Sequence[float | None]]  # by prompt: whether each sample violates, None where it has no score


def reference_of(method: str, measured: Collection[str]) -> str | None:
    """The method that is the same model without the constraint, if it was measured.

    `base` for `nado-decoding`, which changes no weight. For the others, which read the corpus, it is `sft`, since plain
    tuning changes both rates without asking any oracle; `base` takes its place where `sft` was not measured. None for
    these two themselves.
    """
    candidates = {"base": (), "sft": (), "nado-decoding": ("base",)}.get(method, ("sft", "base"))
    return next((name for name in candidates if name in measured), None)


def transfer_ratio(a0: Clusters, b0: Clusters, a: Clusters, b: Clusters, *, seed: int = 0) -> Estimate:
    """The ratio, from [prompts, samples] violations, None where one is missing; the interval resamples prompts.

    The samples of a prompt are averaged first. `n` counts prompts, `missing` those without an observation of either
    model under either constraint. The value is missing where the drop under the training oracle is not significant
    (`paired_bootstrap`), so that nothing is to be confirmed, and where the reference never violates the independent
    constraint.
    """
    means = [[observed_mean(samples) for samples in prompt] for prompt in zip(a0, b0, a, b, strict=True)]
    known = [row for row in means if None not in row]
    missing = len(means) - len(known)
    values = np.array(known, dtype=float).reshape(-1, 4)  # [prompts, (a0, b0, a, b)]
    drop, p_value = paired_bootstrap(values[:, :1].tolist(), values[:, 2:3].tolist(), seed=seed)
    if p_value is None or p_value >= LEVEL or not (drop.value or 0) > 0 or not values[:, 1].any():
        return Estimate(None, None, None, len(known), missing)

    def ratio(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        a0, b0, a, b = (column[rows].sum(axis=axis) for column in values.T)
        return np.asarray((b0 - b) / _above_zero(b0) * a0 / _above_zero(a0 - a))

    rows = np.arange(len(known))
    low, high = bootstrap_interval(rows, ratio, seed=seed) or (None, None)
    return Estimate(float(ratio(rows)), low, high, len(known), missing)


def transfers(
    violations: Mapping[Place, Mapping[str, Verdicts]], trained: str, independent: Collection[str]
) -> dict[str, dict[str, dict[str, Estimate]]]:
    """The transfer ratio of every method that has a reference, by method, prompt set and independent constraint.

    Args:
        violations: by prompt set and constraint, method, and prompt; of all seeds.
        trained: the training oracle.
        independent: the constraints that nothing was trained on.
    """
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for (prompt_set, constraint), judged in violations.items():
        scored = violations.get((prompt_set, trained), {})
        for method in judged if constraint in independent else ():
            reference = reference_of(method, judged.keys() & scored.keys())
            if reference is None or method not in scored:
                continue
            models = scored[reference], judged[reference], scored[method], judged[method]
            clusters = [[verdicts.get(prompt, []) for prompt in sorted(models[0])] for verdicts in models]
            found.setdefault(method, {}).setdefault(prompt_set, {})[constraint] = transfer_ratio(*clusters)
    return found


def pleases_its_oracle(transfer: Estimate) -> bool:
    """Whether less than half of the drop is confirmed, and significantly less than all: the interval ends below 1."""
    return transfer.value is not None and transfer.value < HALF and (transfer.high is None or transfer.high < 1)


def _above_zero(sums: np.ndarray) -> np.ndarray:
    """A resample without violations or without a drop to divide by counts as one with a single violation or drop."""
    return np.where(sums > 0, sums, 1.0)
