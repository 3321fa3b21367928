"""How often a certificate is wrong, and how many prompts it takes, in worlds whose violation rates are known.

    python benchmarks/coverage.py --json benchmarks/results/coverage.json

Coverage: the true rate lies just above the target (1.0001 times), so every certificate that is issued is wrong; at 95%
confidence at most 5% may be. Bounds on the true rate: how often it lies above its bound. Saving: prompts until
half, and nine of ten, certificates are issued at a target of 0.1%, in a world where R foresees nine of ten violations.
"""

from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from typing import Any

import numpy as np
from common import markdown, parsed, parser_of, write
from scipy import stats

from bridle.certification.goal import Goal
from certified_worlds import JUST_ABOVE, Mixture, first_passes, issued_by_count, wrong_in_sequence, wrong_true_bounds

RARE = 0.001
MOST_PROMPTS = 100_000
POWERS = (0.5, 0.9)


def coverage(runs: int) -> dict[str, float]:
    """The share of wrong certificates by case."""
    goal = Goal()
    above, below = goal.rate * JUST_ABOVE, goal.rate / 5

    def in_sequence(good: int) -> Callable[[np.random.Generator], float]:
        return lambda rng: wrong_in_sequence(goal, [below] * good + [above] * (20 - good), 773, runs, rng)

    def by_betting(goal: Goal, world: Mixture, n: int) -> Callable[[np.random.Generator], float]:
        return lambda rng: float((first_passes(goal, world, n, runs, rng) <= n).mean())

    def by_count(n: int) -> Callable[[np.random.Generator], float]:
        return lambda rng: float(issued_by_count(goal, np.full(runs, above), n, rng).mean())

    cases = {
        "one model, 299 prompts": by_count(299),
        "one model, 1,693 prompts": by_count(1693),
        "20 candidates, none good": in_sequence(0),
        "20 candidates, one good": in_sequence(1),
        "20 candidates, ten good": in_sequence(10),
        "anytime, looking after each of 5,000 prompts": by_betting(Goal(anytime=True), Mixture(above, seek=0), 5_000),
        "importance, looking after each of 5,000 prompts": by_betting(Goal(method="importance"), Mixture(above), 5_000),
        "importance, half seek, a poor R": by_betting(
            Goal(method="importance", seek=0.5), Mixture(above, unforeseen=0.5, r=0.9, seek=0.5), 5_000
        ),
        "true rate, one model": lambda rng: wrong_true_bounds(goal, runs, rng),
        "true rate, the best of 20 candidates": lambda rng: wrong_true_bounds(goal, runs, rng, candidates=20),
    }
    found = {}
    for name, case in cases.items():
        found[name] = case(np.random.default_rng(0))
        print(f"{name}: {found[name]:.4f}", flush=True)
    return found


def saving(runs: int) -> Iterator[dict[str, Any]]:
    """By the true rate over the target: prompts until half and nine of ten certificates are issued, by the way."""
    for share in (0.2, 0.5, 0.8):
        ways = {"count, anytime": (Goal(RARE, anytime=True), Mixture(share * RARE, seek=0))}
        for seek in (0.1, 0.5):
            goal = Goal(RARE, method="importance", anytime=True, seek=seek)
            ways[f"importance, seek {seek}"] = goal, Mixture(share * RARE, seek=seek)
        row: dict[str, Any] = {"rate over target": share}
        row["count, fixed number"] = [fixed_prompts(share * RARE, power) for power in POWERS]
        for name, (goal, world) in ways.items():
            taken = first_passes(goal, world, MOST_PROMPTS, runs, np.random.default_rng(0))
            row[name] = np.quantile(taken, POWERS, method="higher").tolist()
        print(row, flush=True)
        yield row


def fixed_prompts(rate: float, power: float) -> int:
    """The fewest prompts that suffice in this share of runs, if their number is fixed before."""
    goal = Goal(RARE)
    return next(n for k in range(10_000) if stats.binom.cdf(k, n := goal.needed(k), rate) >= power)


def in_words(numbers: Sequence[int]) -> str:
    """Prompts of a table's cell."""
    return " / ".join(f"{number:,}" if number <= MOST_PROMPTS else f"> {MOST_PROMPTS:,}" for number in numbers)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=10_000, help="of each case")
    parser.add_argument("--saving_runs", type=int, default=200)
    options = parsed(parser)
    covered, saved = coverage(options.runs), list(saving(options.saving_runs))
    error = sqrt(0.05 * 0.95 / options.runs)
    print(markdown(["case", "wrong"], [[name, f"{share:.2%}"] for name, share in covered.items()]))
    print(markdown(list(saved[0]), [[share, *map(in_words, numbers)] for share, *numbers in map(dict.values, saved)]))
    write(options, {"wrong": covered, "standard_error_at_5_percent": error, "prompts": saved})


if __name__ == "__main__":
    main()
