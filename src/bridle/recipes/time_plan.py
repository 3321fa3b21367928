"""The seconds of a run by phase, from what was measured: of another run, or of a short one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bridle.errors import UserError
from bridle.recipes.recipe import Recipe, load_recipe
from bridle.recipes.records import Run
from bridle.training.config import ConstrainedConfig

PHASES = {"sampling": "sampling", "scoring": "scoring", "fitting": "fitting R"}


@dataclass(frozen=True)
class TimePlan:
    """The expected seconds of a run.

    Attributes:
        rounds: of each round, by phase; empty where no R is fitted.
        update: of an update.
        updates: their number.
        overlapping: the rounds, counted from 0, in which R is fitted beside the updates.
    """

    rounds: Sequence[Mapping[str, float]]
    update: float
    updates: int
    overlapping: range = range(0)

    @property
    def whole(self) -> float:
        """The seconds of the run, without saving and evaluation."""
        updates = self.update * self.updates / len(self.rounds)
        fits = (sum(phases.values()) for phases in self.rounds)
        return sum(max(fit, updates) if index in self.overlapping else fit + updates for index, fit in enumerate(fits))

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        end = 0
        for phases, alike in groupby(self.rounds):
            first, end = end + 1, end + len([*alike])
            if not phases:
                continue
            whole = sum(phases.values())
            parts = (f"{phase} {short(part)} ({part / (whole or 1):.0%})" for phase, part in phases.items())
            rounds = f"round {end}" if first == end else f"rounds {first} to {end}, each"
            yield f"{rounds}: {short(whole)}: {', '.join(parts)}"
        yield f"an update: {short(self.update)}"
        beside = f", R fitted beside the updates in {len(self.overlapping)} of them" if self.overlapping else ""
        work = f"{counted(self.updates, 'update')} and {counted(end, 'round')}{beside}"
        yield f"the run takes about {duration(self.whole)}: {work}, without saving"


def in_schedule(
    config: ConstrainedConfig, rounds: Sequence[Mapping[str, float]], update: float, updates: int
) -> TimePlan:
    """The plan of a run, from the seconds that a fit takes in each round.

    The parallel schedule fits no R in the last round, and the updates of the first may wait for R.

    Args:
        config: its schedule.
        rounds, update, updates: as in `TimePlan`.
    """
    if config.schedule != "parallel":
        return TimePlan(rounds, update, updates)
    waits, last = config.parallel.first_round == "wait", len(rounds) - 1
    fitted = rounds if waits and not last else [*rounds[:-1], {}]
    return TimePlan(fitted, update, updates, range(int(waits), last))


def phases_of(record: Mapping[str, Any], rollouts: float, tokens: float = 1.0) -> dict[str, float]:
    """A round's seconds by phase, of its record in `metrics.jsonl`, summed over the regularisers.

    Args:
        record: of a round.
        rollouts: the factor of its rollouts.
        tokens: the factor of a rollout's tokens, in proportion to which it is drawn and R is fitted.
    """
    return {
        name: rollouts
        * (1.0 if phase == "scoring" else tokens)
        * sum(value for key, value in record.items() if key.endswith(f"/seconds_{phase}"))
        for phase, name in PHASES.items()
    }


def time_plan(recipe: Recipe, measured: Path) -> TimePlan:
    """The seconds of a run, from those of another one in proportion to rollouts, new tokens and rows of an update.

    Args:
        recipe: of the run to come, on the machine of the measured one.
        measured: the folder of a run with the same model and constraints.

    Raises:
        UserError: the folder holds no run that has ended a round, or one of the parallel schedule, whose phases
            overlap; or the recipe has no `max_steps`.
    """
    run = Run(measured)
    run.read()
    rounds = [record for record in run.records if "round" in record]
    if not rounds:
        raise UserError(f"{measured}: no round of a run has ended there; --measured takes the folder of bridle train")
    before, now = load_recipe(measured / "recipe.yaml").planned_config(), recipe.planned_config()
    if before.schedule == "parallel":
        raise UserError(f"{measured}: its phases overlapped (schedule: parallel); measure a sequential run")
    if now.max_steps <= 0:
        raise UserError("max_steps: name the number of updates; without it, it depends on the rows")
    rollouts, tokens = now.rollouts_per_round / before.rollouts_per_round, now.max_new_tokens / before.max_new_tokens
    first, *later = (phases_of(record, rollouts, tokens) for record in rounds)
    mean = {phase: sum(one[phase] for one in later) / len(later) for phase in first} if later else first
    update = sum(record["seconds_policy"] for record in rounds) / rounds[-1]["step"]
    update *= _rows(now) / _rows(before)
    return in_schedule(now, [first, *[mean] * (now.rounds - 1)], update, now.max_steps)


def duration(seconds: float) -> str:
    """A time in the unit that people would take."""
    minutes = seconds / 60
    return f"{seconds:.2g} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def short(seconds: float) -> str:
    """A short time, in milliseconds below a tenth of a second."""
    return f"{seconds * 1000:.2g} ms" if 0 < seconds < 0.1 else f"{seconds:.3g} s"


def counted(number: int, what: str) -> str:
    """A number with a noun."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _rows(config: ConstrainedConfig) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps
