"""Filtration: drop the rows that violate, and learn from the rest."""

from dataclasses import dataclass

from datasets import Dataset

from bridle.constraints import Constraint
from bridle.data import ROW
from bridle.data.rows import filled_rows, format_fields, outputs_of
from bridle.errors import UserError


@dataclass(frozen=True)
class Filtered:
    """What became of the rows that hold a text.

    Attributes:
        kept: how many comply.
        rejected: how many violate.
        missing: how many got no score; they are dropped too, since nobody knows that they comply.
    """

    kept: int
    rejected: int
    missing: int


def compliant_rows(rows: Dataset, constraint: Constraint, name: str) -> tuple[Dataset, Filtered]:
    """Drops the rows that would teach the model to violate the constraint.

    What is scored is what the model would learn to say: the completion, the assistant's turns (one text,
    a line each), or the whole text. A constraint that reads prompts gets the row's: its `prompt`, or the turns before
    the last of the assistant's, whose completion that one is. Blank rows, which teach nothing, go uncounted but for a
    warning.

    Args:
        rows: as `DataSource.read` and `Domain.read` give them.
        constraint: a row is kept where it complies.
        name: what errors call the rows: the file or the domain.

    Returns:
        The rows that are left, in their order, and the counts.

    Raises:
        UserError: naming the row, if a value is no text or chat; if no row is left.
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
