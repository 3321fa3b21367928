"""Filtration: training without the rows that violate the constraint."""

from dataclasses import dataclass

from datasets import Dataset

from bridle.constraints import Constraint
from bridle.data import ROW
from bridle.data.rows import filled_rows, format_fields, outputs_of
from bridle.errors import UserError


@dataclass(frozen=True)
class Filtered:
    """The counts of the rows that hold a text.

    Attributes:
        kept: rows that comply.
        rejected: rows that violate.
        missing: rows without a score, which are dropped too.
    """

    kept: int
    rejected: int
    missing: int


def compliant_rows(rows: Dataset, constraint: Constraint, name: str) -> tuple[Dataset, Filtered]:
    """Drops the rows that violate a constraint or have no score, and counts them.

    The constraint scores what the model would learn to write: the completion, the assistant's turns (one text, a line
    each), or the whole text. A constraint that reads prompts gets the row's `prompt`, or the turns before the last one
    of the assistant, which is then the completion. Blank rows are dropped with a warning.

    Args:
        rows: as `DataSource.read` and `Domain.read` give them.
        name: of the file or domain, for errors.

    Raises:
        UserError: naming the row, if a value is neither text nor chat; if no row is left.
    """
    filled = dict(filled_rows(rows, format_fields(rows.column_names, name), name))
    outputs = outputs_of(filled.values(), with_prompts=constraint.reads != "completion")
    scores = constraint.score(*outputs)
    verdicts = dict(zip(filled, (score.complies for score in scores), strict=True))
    kept, missing = (sum(verdict is wanted for verdict in verdicts.values()) for wanted in (True, None))
    counts = Filtered(kept, len(verdicts) - kept - missing, missing)
    if not kept:
        raise UserError(
            f"{name}: none of its {len(verdicts)} rows complies with '{constraint.name}' "
            f"({counts.rejected} violate, {missing} got no score); loosen the constraint or add rows that comply"
        )
    numbers = rows[ROW] if ROW in rows.column_names else range(1, len(rows) + 1)
    return rows.select([index for index, number in enumerate(numbers) if verdicts.get(number)]), counts
