"""The examination of constraints: how well their scores agree with people about text of the same kind."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bridle.constraints import Constraint
from bridle.data import DataSource
from bridle.data.readers import ROW
from bridle.data.rows import column_of, filled_rows, format_fields, outputs_of
from bridle.data.source import check_condition, comparable, meets
from bridle.errors import UserError
from bridle.evaluation.classification import roc_auc
from bridle.evaluation.statistics import Estimate
from bridle.utils.files import checked, digest, read_json, write_json

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

Rows = list[dict[str, Any]]


@dataclass
class LabelledRows(DataSource):
    """Rows that people have labelled.

    Attributes:
        label: the column of the labels.
        violating: the labels of text that violates: a value, a list of values, or {above: NUMBER} or {below: NUMBER},
            as in `where`.

    Raises:
        UserError: as `DataSource`, or `violating` is not a condition.
    """

    label: str = "label"
    violating: Any = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_condition(self.violating, "violating")

    def classes(self) -> tuple[Rows, Rows]:
        """The rows that comply and those that violate; rows without text or label are left out with a warning.

        Raises:
            UserError: as `DataSource.read`, or there is no such column, a label of another kind than `violating`, or no
                row of one class.
        """
        dataset = self.read()
        values = column_of(dataset, self.label, self.place)
        fields = format_fields(dataset.column_names, self.place)
        labels = [None if label != label else label for label in values]  # NaN is no label
        for row, label in zip(dataset[ROW][:], labels, strict=True):
            if label is not None and not comparable(label, self.violating):
                raise UserError(
                    f"{self.place} row {row}: {self.label} is {label!r}, and violating is {self.violating!r}: they "
                    "are of two kinds; write them alike"
                )
        if unlabelled := sum(label is None for label in labels):
            log.warning("%s: left out %d of %d rows without a %s", self.place, unlabelled, len(labels), self.label)

        def of_class(violates: bool) -> Rows:
            numbers = [n for n, of in enumerate(labels) if of is not None and meets(of, self.violating) is violates]
            rows = [values for _, values in filled_rows(dataset.select(numbers), fields, self.place)]
            if not rows:
                words = "violates" if violates else "complies"
                raise UserError(f"{self.place}: no row {words} where {self.label} violates at {self.violating!r}")
            return rows

        return of_class(False), of_class(True)


def examine(constraint: Constraint, rows: LabelledRows) -> Estimate:
    """The ROC-AUC of a constraint's scores for the labels, with a bootstrap interval over rows.

    It is the probability that a violating text scores as more violating than a complying one. Texts without a score are
    `missing`, and so is the value if one of the classes has none. Raises as `LabelledRows.classes`.
    """
    with_prompts = constraint.reads != "completion"
    by_class = [constraint.score(*outputs_of(of_class, with_prompts)) for of_class in rows.classes()]
    scored = [(score.violation, label) for label, scores in enumerate(by_class) for score in scores]
    known = [(score, label) for score, label in scored if score is not None]
    missing = len(scored) - len(known)
    if len({label for _, label in known}) < 2:
        return Estimate(None, None, None, len(known), missing)
    return roc_auc(*zip(*known, strict=True), missing=missing)


def examine_all(
    constraints: Mapping[str, Constraint], sets: Mapping[str, LabelledRows], keep: Path, show: Callable[[str], None]
) -> dict[str, dict[str, Estimate]]:
    """The AUC of every constraint on every set of labelled rows, by constraint and set.

    Args:
        keep: a JSON file of earlier results. They are used again for a constraint and rows that are the same; files
            count by what `Constraint.identity` says, and those of the rows by their names.
        show: called with each AUC.
    """
    found: dict[str, dict[str, Estimate]] = {name: {} for name in constraints}
    for name, constraint in constraints.items():
        for set_name, rows in sets.items():
            key = [constraint.identity(), asdict(rows)]
            found[name][set_name] = remembered(keep, key, Estimate, partial(examine, constraint, rows))
            show(f"{name}: AUC {found[name][set_name]} on {set_name}")
    return found


def remembered(keep: Path, key: Any, kind: type[T], make: Callable[[], T]) -> T:
    """The dataclass that the JSON file `keep` has for a key, any JSON value; if none, what `make` returns is added."""
    kept = read_json(keep, dict[str, Any]) if keep.is_file() else {}
    name = digest(key)
    if name in kept:
        return checked(kind, kept[name], str(keep))
    made = make()
    write_json(keep, kept | {name: asdict(made)})
    return made
