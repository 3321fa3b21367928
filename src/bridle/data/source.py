"""References to rows: a file, folder or hub name, which of its rows, and the names of its columns."""

import math
import operator
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

from datasets import Dataset, Features, Json, concatenate_datasets

from bridle.data.conversions import ALPACA, CONVERSIONS, converted, foreign_format
from bridle.data.readers import gather, paths_of, read_files, with_row_numbers
from bridle.data.rows import FIELDS, FORMATS, absent_column, filled_rows
from bridle.errors import UserError
from bridle.utils.settings import parse_yaml

_OPTIONS = {"split", "shuffle", "rows", "format", *FIELDS}  # keys of `parse` that are not filters
_BOUNDS = {"above": operator.gt, "below": operator.lt}  # of a `where`
_BOUND = r"(-?\d{1,18}|-?\d{1,18}(?:\.\d{1,18})?%)?"
_ROWS = re.compile(f"{_BOUND}:{_BOUND}")


@dataclass
class DataSource:
    """Rows of a file, of a `datasets` folder or of a hub data set.

    Attributes:
        path: a .jsonl, .json, .csv, .txt (one text a line) or .parquet file, the first four also as .gz or .zst; a
            pattern of files, "chats/*.jsonl"; a folder written by `save_to_disk`; a hub name, "name" or "name:config";
            or a list of these, read one after the other.
        split: which split of a folder or a hub data set; files have no splits.
        shuffle: a seed that puts the rows in random order before `rows` are taken, as a file sorted by label needs
            before it is split; None keeps the order of the file.
        rows: a slice over the rows in that order, in rows or in percent: "100:200", "0:80%", "-10%:".
        where: keeps the rows whose column equals the value or one of a list of values, or lies above or below a number,
            {toxicity: {above: 0.5}}; applied after `rows`.
        text, prompt, completion, messages: what this column is called here, if not by its own name; "a.b" is the key b
            of the mappings in column a, unless a column has that name. Naming one also fixes the format, which
            otherwise follows from the columns.
        format: "sharegpt" (`conversations` of from and value) becomes `messages`, "alpaca" (`instruction`, `input`,
            `output`) becomes `prompt` and `completion`; by default recognised where no other format is.

    Raises:
        UserError: `shuffle` is not a seed, `rows` not a slice, or the columns are of two formats; the message begins
            with the field.
    """

    path: str | list[str]
    split: str = "train"
    shuffle: int | None = None
    rows: str | None = None
    where: dict[str, Any] | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    format: Literal["sharegpt", "alpaca"] | None = None

    def __post_init__(self) -> None:
        if not self._paths or not all(self._paths):
            raise UserError("path: is empty; give a file, a folder or a hub name")
        if self.format is not None and self.format not in CONVERSIONS:
            raise UserError(f"format: there is no {self.format!r}; use {' or '.join(CONVERSIONS)}, or leave it out")
        if self.format is not None and self._named:
            raise UserError(
                f"{next(iter(self._named))}: format: {self.format} has columns of its own; name one or other"
            )
        if self.shuffle is not None and not (isinstance(self.shuffle, int) and self.shuffle >= 0):
            raise UserError(f"shuffle: {self.shuffle!r} is not a seed; give a whole number, 0 or more")
        if self.rows is not None:
            row_range(self.rows, total=0)
        for column, wanted in (self.where or {}).items():
            check_condition(wanted, f"where: {column}")
        if not any(self._named.keys() <= set(fields) for fields in FORMATS):
            first, *others = self._named
            raise UserError(f"{first}: is of another format than {', '.join(others)}; name one format's columns")

    @property
    def place(self) -> str:
        """The path or paths, for errors."""
        return ", ".join(self._paths)

    @property
    def _paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def _named(self) -> dict[str, str]:
        """The columns named explicitly: standard name to the name in the file."""
        return {field: name for field in FIELDS if (name := getattr(self, field)) is not None}

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the command line's form "FILE,rows=80%:90%,label=0,text=column".

        `split`, `shuffle`, `rows`, `format` and the four column names set those fields; any other key is a `where`
        filter with a YAML scalar. A filter given twice keeps the rows with either value.

        Raises:
            UserError: a part is not key=value, or a value not YAML.
        """
        path, *parts = text.split(",")
        fields: dict[str, Any] = {}
        where: dict[str, list[Any]] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise UserError(f"{text!r}: {part!r} is not key=value, as in FILE,rows=0:80%,label=0")
            if key in _OPTIONS:
                fields[key] = parse_yaml(value, f"{text!r}: {key}") if key == "shuffle" else value
            else:
                where.setdefault(key, []).append(parse_yaml(value, f"{text!r}: {key}"))
        filters = {column: values[0] if len(values) == 1 else values for column, values in where.items()}
        return cls(path, where=filters or None, **fields)

    def files(self) -> list[Path]:
        """The files and folders to read; none for a hub data set."""
        return [path for name in self._paths for path in paths_of(name) if os.path.exists(path)]

    def read(self) -> Dataset:
        """Reads the rows and adds the column `ROW`.

        Named columns get their standard names, and the columns of other formats are then dropped. JSON lists, mappings
        and columns of mixed types keep their shape (`datasets.Json`); lone surrogates in JSON strings become "?".

        Raises:
            UserError: the path cannot be read, a row is malformed, a named column is missing, or no rows are left.
        """
        text_columns = {*FIELDS, *ALPACA, *self._named.values()}
        dataset = read_files(self._paths, self.split, text_columns)
        total = len(dataset)
        if not total:
            raise UserError(f"{self.place} holds no rows")
        dataset = with_row_numbers(dataset)
        if self.shuffle is not None:
            dataset = dataset.shuffle(self.shuffle)
        if self.rows is not None:
            dataset = dataset.select(row_range(self.rows, total))
        for column, wanted in (self.where or {}).items():
            dataset = _keep(dataset, column, wanted, self.place)
        if not len(dataset):
            kept = f"rows={self.rows} and where={self.where}"
            raise UserError(f"{self.place}: {kept} keep none of its {total} rows")
        dataset = _standard_columns(dataset, self._named, self.place)
        chosen = self.format or (None if self._named else foreign_format(dataset.column_names))
        return dataset if chosen is None else converted(dataset, chosen, self.place)


def texts_of(source: DataSource) -> list[str]:
    """The column `text` of a source's rows; blank rows are left out with a warning.

    Raises:
        UserError: as `DataSource.read`, or there is no text.
    """
    dataset = source.read()
    if "text" not in dataset.column_names:
        raise absent_column(source.place, "text", dataset.column_names)
    texts = [values["text"] for _, values in filled_rows(dataset, ["text"], source.place)]
    if not texts:
        raise UserError(f"{source.place}: none of its {len(dataset)} rows holds a text")
    return texts


def row_range(rows: str, total: int) -> range:
    """The indices of a slice such as "0:80%" or "100:200" of `total` rows, percentages rounded down.

    Raises:
        UserError: `rows` is not such a slice.
    """
    # YAML reads an unquoted 10:30 as the number 630, hence the hint.
    match = _ROWS.fullmatch(rows) if isinstance(rows, str) else None
    if match is None:
        raise UserError(f'rows: {rows!r} is not a slice such as "0:80%" or "100:200" (quoted, in a recipe)')
    start, stop = (_bound(text, total) for text in match.groups())
    return range(*slice(start, stop).indices(total))


def _bound(text: str | None, total: int) -> int | None:
    if text is None:
        return None
    return math.floor(total * Fraction(text[:-1]) / 100) if text.endswith("%") else int(text)


def _keep(dataset: Dataset, column: str, wanted: Any, path: str) -> Dataset:
    if column not in dataset.column_names:
        near = get_close_matches(column, _OPTIONS, n=1)
        hint = f"; did you mean the option {near[0]}=?" if near else ""
        raise UserError(f"{absent_column(path, column, dataset.column_names)}{hint}")
    return dataset.select([index for index, value in enumerate(dataset[column][:]) if meets(value, wanted)])


def check_condition(wanted: Any, where: str) -> None:
    """Raises a UserError that begins with `where` unless `meets` knows the condition."""
    if isinstance(wanted, dict) and not (_BOUNDS.keys() >= wanted.keys() and all(map(_is_number, wanted.values()))):
        raise UserError(f"{where}: {wanted} is not a condition; give {{above: NUMBER}} or {{below: NUMBER}}")


def meets(value: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one or one of a list, or lies {above: NUMBER} or {below: NUMBER}."""
    if isinstance(wanted, dict):
        return _is_number(value) and all(_BOUNDS[name](value, bound) for name, bound in wanted.items())
    return value in (wanted if isinstance(wanted, list) else [wanted])


def comparable(value: Any, wanted: Any) -> bool:
    """Whether a value is of the kind of what is wanted: both text or neither; a number, where that is a bound."""
    if isinstance(wanted, dict):
        return _is_number(value)
    kinds = {isinstance(one, str) for one in (wanted if isinstance(wanted, list) else [wanted])}
    return isinstance(value, str) in kinds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _standard_columns(dataset: Dataset, named: dict[str, str], path: str) -> Dataset:
    for column in named.values():
        dataset = _unnested(dataset, column)
        if column not in dataset.column_names:
            raise absent_column(path, column, dataset.column_names)
    own = {field for fields in FORMATS if named.keys() & set(fields) for field in fields}
    taken = {field for field in FIELDS if named and (field in named or field not in own)} - {*named.values()}
    dataset = dataset.remove_columns(sorted(taken.intersection(dataset.column_names)))
    return dataset.rename_columns({column: field for field, column in named.items()})


def _unnested(dataset: Dataset, column: str) -> Dataset:
    """Adds the column "a.b" from the mappings in column a, unless there is one or no row has that key."""
    outer, *keys = column.split(".")
    if not keys or column in dataset.column_names or outer not in dataset.column_names:
        return dataset
    values = [_value_at(value, keys) for value in dataset[outer]]
    if all(value is None for value in values):
        return dataset
    # `Json` keeps the type of a value that is not text, so that the error names its row.
    inner = gather(({column: value} for value in values), Features({column: Json()}))
    return concatenate_datasets([dataset, inner], axis=1)


def _value_at(value: Any, keys: list[str]) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
