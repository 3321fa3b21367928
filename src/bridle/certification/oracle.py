"""The errors of an oracle on texts that people have labelled, and what they make of a bound on its rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps

from bridle.certification.bounds import lower_bound, true_rate_bound
from bridle.certification.goal import Goal
from bridle.constraints import Constraint, Given
from bridle.data.rows import outputs_of
from bridle.evaluation.examination import LabelledRows


@dataclass(frozen=True)
class OracleErrors:
    """How often an oracle flagged texts that people have labelled.

    A text without a score counts as not flagged, whatever its label, which bounds the true rate safely.

    Attributes:
        source: of the texts.
        violating: number of texts that violate by their labels.
        found: how many of them the oracle flagged.
        complying: number of texts that comply by their labels.
        false_alarms: how many of them the oracle flagged.
        missing: number of texts of both kinds without a score: not found, and no false alarms.
    """

    source: str
    violating: int
    found: int
    complying: int
    false_alarms: int
    missing: int = 0

    def bounds(self, confidence: float) -> tuple[float, float]:
        """Lower bounds on the sensitivity and on the false-alarm rate, each with this confidence."""
        return (
            lower_bound(self.found, self.violating, confidence),
            lower_bound(self.false_alarms, self.complying, confidence),
        )

    def true_bound(self, goal: Goal, values: Sequence[float], candidates: int) -> float:
        """The upper bound on the true rate of one of several candidates, which the data may have chosen.

        The error probability is shared equally by all parts: sensitivity, false alarms, and the rate of each candidate
        (Bonferroni).

        Args:
            values: [n] as in `Goal.bound`.
            candidates: how many could have been chosen.
        """
        part = 1 - (1 - goal.confidence) / (2 + candidates)
        return true_rate_bound(goal.bound(values, part), *self.bounds(part))


def errors_of(constraint: Constraint, rows: LabelledRows) -> OracleErrors:
    """The errors of a constraint on labelled rows, which must be independent: repeated texts count once.

    Raises:
        UserError: as `LabelledRows.classes`.
    """
    with_prompts = constraint.reads != "completion"
    complying, violating = (_different(outputs_of(of_class, with_prompts)) for of_class in rows.classes())
    verdicts = [[score.complies for score in constraint.score(*outputs)] for outputs in (complying, violating)]
    false_alarms, found = (of_class.count(False) for of_class in verdicts)
    missing = sum(of_class.count(None) for of_class in verdicts)
    return OracleErrors(rows.place, len(violating[1]), found, len(complying[1]), false_alarms, missing)


def _different(outputs: tuple[list[Given], list[str]]) -> tuple[list[Given], list[str]]:
    """Prompts and completions without repetitions."""
    by_key = {dumps(output): output for output in zip(*outputs, strict=True)}
    return [prompt for prompt, _ in by_key.values()], [text for _, text in by_key.values()]
