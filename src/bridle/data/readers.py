"""Reading files, folders and hub names as `datasets.Dataset`s, with errors that name the row."""

import csv
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from glob import glob, has_magic
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Json,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from bridle.errors import UserError, first_line

ROW = "__row__"  # column: the row of the file, 1-based; in JSON lines and text the line
BATCH = 1000  # rows held as Python objects at a time
LONGEST_FIELD = 2**31 - 1  # characters in one CSV field, which may hold a whole document

# What the readers raise on a file that is not what its suffix says.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, pa.ArrowException)
_HUB_NAME = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::(\w[\w.-]*))?")
_JSON_TYPES = {
    frozenset({str}): Value("string"),
    frozenset({bool}): Value("bool"),
    frozenset({int}): Value("int64"),
    frozenset({float}): Value("float64"),
    frozenset({int, float}): Value("float64"),
}


def read_dataset(name: str, split: str, text_columns: Collection[str]) -> Dataset:
    """Reads a file, a folder written by `save_to_disk`, or a hub data set "name" or "name:config".

    Args:
        name: the path or hub name.
        split: of a folder or a hub data set.
        text_columns: CSV columns that stay text even if every value looks like a number.

    Raises:
        UserError: it cannot be read; the message names the file and, where there is one, the row.
    """
    path = Path(os.path.expanduser(name))  # Path's own raises where there is no such user
    reader = _READERS.get(_kind(path))
    try:
        if path.is_dir():
            return _read_folder(path, split)
        if reader is not None:
            return reader(path, text_columns)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file") from error
    except _UNREADABLE as error:
        raise UserError(f"cannot read {name}: {first_line(error)}") from error
    if path.exists():
        packed = f", the first four also with {' or '.join(_COMPRESSIONS)} behind it"
        raise UserError(f"{name}: not a kind of file known here; use one of {', '.join(_READERS)}{packed}")
    return _read_hub(name, split)


def read_files(names: Sequence[str], split: str, text_columns: Collection[str]) -> Dataset:
    """Reads several files, folders or hub data sets in order; `ROW` continues from one to the next.

    A pattern such as "chats/*.jsonl" stands for the files that `paths_of` finds. A column that some files lack is null
    in their rows.

    Raises:
        UserError: as `read_dataset`, or a pattern matches no file.
    """
    found = list(chain.from_iterable(map(_expanded, names)))
    if len(found) == 1:
        return read_dataset(found[0], split, text_columns)
    parts, before = [], 0
    for name in found:
        if len(part := read_dataset(name, split, text_columns)):
            numbers = before + np.array(with_row_numbers(part)[ROW], dtype=np.int64)
            rest = part.remove_columns([ROW] if ROW in part.column_names else [])
            parts.append(rest.add_column(ROW, numbers))
            before = int(numbers[-1])
    if parts and all(part.features == parts[0].features for part in parts):
        return concatenate_datasets(parts)
    types: dict[str, Any] = {}
    for column, kind in chain.from_iterable(part.features.items() for part in parts):
        types[column] = kind if types.get(column, kind) == kind else Json()
    return gather(chain.from_iterable(parts), Features(types))


def with_row_numbers(dataset: Dataset) -> Dataset:
    """The data set with the column `ROW`, which counts its rows unless a reader has set it."""
    return dataset if ROW in dataset.column_names else dataset.add_column(ROW, np.arange(1, len(dataset) + 1))


def paths_of(name: str) -> list[Path]:
    """The files that a pattern matches, sorted by name; for another name its path."""
    path = Path(os.path.expanduser(name))
    if not has_magic(name) or os.path.exists(path):
        return [path]
    return sorted(Path(file) for file in glob(str(path), recursive=True) if os.path.isfile(file))


def _expanded(name: str) -> list[str]:
    if not has_magic(name):
        return [name]  # which may be a hub name
    if not (paths := paths_of(name)):
        raise UserError(f"{name}: no file matches this pattern")
    return list(map(str, paths))


def _kind(path: Path) -> str:
    """The suffix that tells a file's format, without that of a compression; Parquet is not read compressed."""
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return inner if suffix in _COMPRESSIONS and inner != ".parquet" else suffix


def gather(rows: Iterable[dict[str, Any]], features: Features) -> Dataset:
    """Collects rows into a data set in memory, a batch at a time; missing keys become null."""
    rows = iter(rows)
    batches = iter(lambda: list(islice(rows, BATCH)), [])
    tables = [
        Dataset.from_dict({name: _column(name, features[name], batch) for name in features}, features)
        for batch in batches
    ]
    return concatenate_datasets(tables or [Dataset.from_dict({name: [] for name in features}, features)])


def _column(name: str, feature: Any, rows: Iterable[dict[str, Any]]) -> list[Any]:
    values = (row.get(name) for row in rows)
    if not isinstance(feature, Json):
        return list(values)
    # `Json` would parse a text that happens to be JSON, such as "5".
    return [None if value is None else json.dumps(value, default=str) for value in values]


def _read_hub(name: str, split: str) -> Dataset:
    match = _HUB_NAME.fullmatch(name)
    near = [f"{name}{suffix}" for suffix in _READERS if os.path.exists(os.path.expanduser(f"{name}{suffix}"))]
    missing = f"{name}: no such file or folder" + f"; did you mean {' or '.join(near)}?" * bool(near)
    if match is None:
        raise UserError(missing)
    try:
        return load_dataset(*match.groups(), split=split)
    except Exception as error:  # the hub's clients raise errors of several libraries with no common base
        between = " It is" if near else ", and"
        raise UserError(f"{missing}{between} not read from the hub: {first_line(error)}") from error


def _read_folder(path: Path, split: str) -> Dataset:
    try:
        found = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not a folder written by datasets' save_to_disk; name a file in it") from error
    if not isinstance(found, DatasetDict):
        return found.with_format(None)
    if split not in found:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(map(repr, found))}")
    return found[split].with_format(None)


def _read_parquet(path: Path, text_columns: Collection[str]) -> Dataset:
    table = pq.read_table(path)
    table.validate(full=True)  # text may be anything but UTF-8
    return Dataset(table)


def _read_text(path: Path, text_columns: Collection[str]) -> Dataset:
    rows = ({"text": line.rstrip("\r\n")} for _, line in _lines(path))
    return gather(rows, Features({"text": Value("string")}))


def _read_json(path: Path, text_columns: Collection[str]) -> Dataset:
    # The first of two passes finds all columns and types, so that the second holds one batch at a time.
    types: dict[str, set[type]] = defaultdict(set)
    for row in _json_rows(path):
        for column, value in row.items():
            types[column] |= {type(value)} - {type(None)}
    # Columns of nested or mixed values keep their shape as `Json`.
    features = {column: _JSON_TYPES.get(frozenset(found or {str}), Json()) for column, found in types.items()}
    return gather(_json_rows(path), Features(features))


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = ((number, line) for number, line in _lines(path) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if _kind(path) == ".json" and first[1].lstrip().startswith("["):
        text = first[1] + "".join(line for _, line in lines)
        rows: Iterable[tuple[int, Any]] = enumerate(_parse_json(text, str(path)), start=1)
    else:
        rows = ((number, _parse_json(line, f"{path} row {number}")) for number, line in chain([first], lines))
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: expected a mapping of columns, found {type(row).__name__}")
        yield {**row, ROW: number}


def _parse_json(text: str, place: str) -> Any:
    try:
        value = _DECODER.decode(text)
        # An escaped lone surrogate is legal JSON but no Unicode text, which Arrow and tokenizers need.
        if "\\ud" in text or "\\uD" in text:
            value = _DECODER.decode(whole_text(json.dumps(value, ensure_ascii=False)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: malformed JSON: {first_line(error)}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(mapping := dict(pairs)) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} occurs twice in one mapping")
    return mapping


def _integer(digits: str) -> int:
    if not -(2**63) <= (number := int(digits)) < 2**63:
        raise ValueError(f"{digits} does not fit into 64 bits")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def whole_text(text: str) -> str:
    """A text with "?" for lone surrogates, which JSON and shells allow but UTF-8 and tokenizers do not."""
    return text.encode(errors="replace").decode()


def _read_csv(path: Path, text_columns: Collection[str]) -> Dataset:
    rows = _csv_rows(path)
    header = next(rows, [])
    if len(set(header)) < len(header):
        raise UserError(f"{path}: two columns share a name in the header {header}")
    features = Features({name: Value("string") for name in header})
    table = gather((dict(zip(header, row, strict=True)) for row in rows), features).with_format("arrow")[:]
    for index, name in enumerate(header):
        if name not in text_columns:
            table = table.set_column(index, name, _typed(table[name]))
    return Dataset(table.replace_schema_metadata())


def _csv_rows(path: Path) -> Iterator[list[str]]:
    """The header, then rows of its length; row numbers in errors do not count the header."""
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    number, width = -1, 0
    try:
        for row in filter(None, rows):
            number, width = number + 1, width or len(row)
            if len(row) != width:
                raise UserError(f"{path} row {number}: {len(row)} values for {width} columns")
            yield row
    except csv.Error as error:
        raise UserError(f"{path} row {number + 1}: broken CSV: {error}") from error


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of strings as integers, floats or booleans if every value is one; "" is null."""
    values = pc.if_else(pc.equal(column, ""), None, column)
    for kind in (pa.int64(), pa.float64(), pa.bool_()):
        try:
            return values.cast(kind)
        except pa.ArrowInvalid:
            continue
    return column


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; only a line feed ends one, because JSON strings may hold other breaks."""
    compression = _COMPRESSIONS.get(path.suffix.lower())
    with pa.input_stream(str(path), compression=compression) as stream, io.BufferedReader(stream) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} row {number}: not UTF-8 text; convert the file to UTF-8") from error
            yield number, text


_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_READERS: dict[str, Callable[[Path, Collection[str]], Dataset]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}
