"""Worlds whose violation rates are known, in which certificates are issued many times over: how often one is wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import log

import numpy as np

from bridle.certification.bounds import fixed_sequence, log_wealth
from bridle.certification.certificate import Ranked
from bridle.certification.certify import safest_first
from bridle.certification.goal import Goal
from bridle.certification.oracle import OracleErrors

JUST_ABOVE = 1.0001  # times the target
NUMBERS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Outcome:
    """A candidate that was tested, and its true rate."""

    rate: float
    passed: bool


@dataclass(frozen=True)
class Mixture:
    """A world of three outputs: one complies; of those that violate, R foresees one and not the other.

    Attributes:
        rate: of violations.
        unforeseen: share of the violations that R does not foresee.
        r: R of those that it foresees; of all others it is 0.999.
        seek: share of q⁻ in the mixture; 0 draws from p.
    """

    rate: float
    unforeseen: float = 0.1
    r: float = 0.3
    seek: float = 0.1

    def values(self, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Weighted violations of outputs that are drawn from the mixture, of this shape."""
        p = np.array([1 - self.rate, self.rate * (1 - self.unforeseen), self.rate * self.unforeseen])
        q = p * (1 - np.array([0.999, self.r, 0.999]))
        mixture = (1 - self.seek) * p + self.seek * q / q.sum()
        weights = np.array([0.0, 1.0, 1.0]) * p / mixture
        return weights[np.searchsorted(mixture.cumsum()[:-1], rng.random(shape), side="right")]


def issued_by_count(goal: Goal, rates: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Whether a certificate is issued, for every true rate of an array of any shape, from n prompts each."""

    @cache
    def passes(violations: int) -> bool:
        return goal.bound([1.0] * violations + [0.0] * (n - violations)) <= goal.rate

    return np.vectorize(passes, otypes=[bool])(rng.binomial(n, rates))


def wrong_in_sequence(
    goal: Goal, rates: Sequence[float], n: int, runs: int, rng: np.random.Generator, development: int = 300
) -> float:
    """How often the certified one of several candidates, ordered on development prompts, violates too often."""
    seen = rng.binomial(development, rates, size=(runs, len(rates))) / development
    passed = issued_by_count(goal, np.broadcast_to(rates, (runs, len(rates))), n, rng)
    wrong = 0
    for run in range(runs):
        order = safest_first([Ranked(str(index), rate, rate) for index, rate in enumerate(seen[run])])
        outcomes = (Outcome(rates[int(one.candidate)], bool(passed[run, int(one.candidate)])) for one in order)
        wrong += any(one.passed and one.rate > goal.rate for one in fixed_sequence(outcomes))
    return wrong / runs


def first_passes(goal: Goal, world: Mixture, n: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """[runs] after how many prompts the betting bound is first low enough; n + 1 where it never is."""
    return np.concatenate([*_first_passes(goal, world, n, runs, rng)])


def _first_passes(goal: Goal, world: Mixture, n: int, runs: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    size = max(1, NUMBERS_AT_ONCE // n)
    for start in range(0, runs, size):
        values = world.values((min(size, runs - start), n), rng)
        passed = log_wealth(values, goal.rate, goal.largest) >= -log(1 - goal.confidence)
        yield np.where(passed.any(axis=-1), passed.argmax(axis=-1), n) + 1


def wrong_true_bounds(
    goal: Goal, runs: int, rng: np.random.Generator, *, candidates: int = 1, n: int = 1_000, labelled: int = 400
) -> float:
    """How often the bound on the true rate of the candidate with the lowest one is wrong."""
    true, sensitivity, false_alarms = 0.03, 0.8, 0.004
    flagged = rng.binomial(n, true * sensitivity + (1 - true) * false_alarms, size=(runs, candidates)).min(axis=-1)
    found, alarms = rng.binomial(labelled, sensitivity, size=runs), rng.binomial(labelled, false_alarms, size=runs)
    wrong = 0
    for k, s, f in zip(flagged.tolist(), found.tolist(), alarms.tolist(), strict=True):
        errors = OracleErrors("labelled", labelled, s, labelled, f)
        wrong += errors.true_bound(goal, [1.0] * k + [0.0] * (n - k), candidates) < true
    return wrong / runs
