"""A cache of sparse targets, one row for each row of the corpus, computed once to be read in every epoch or shipped.

A cache is one Arrow IPC file. A file on disk is memory-mapped, so opening it reads only the keys of its rows; in memory
it is bytes for an object store. A row is found by its tokens, whatever its order, batch or padding.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from torch import Tensor

from bridle.core.sparse import SparseTarget
from bridle.errors import UserError, first_line
from bridle.utils.files import atomic_file, writing

FORMAT = b"bridle.targets.1"  # key of the schema's metadata that marks an Arrow file as a cache


def row_keys(input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> list[int]:
    """The keys of rows padded on the right: a 64-bit hash of each row's tokens and counted prefixes.

    `input_ids` and `attention_mask` are [batch, time], `mask` [batch, time - 1] is true at the prefixes that count.
    """
    lengths = attention_mask.sum(-1).tolist()
    rows = zip(input_ids.cpu().to(torch.int32).numpy(), mask.cpu().numpy(), lengths, strict=True)
    contents = (ids[:length].tobytes() + counted[: length - 1].tobytes() for ids, counted, length in rows)
    return [int.from_bytes(blake2b(content, digest_size=8).digest(), "little") for content in contents]


def bytes_per_token(k: int, vocabulary: int) -> int:
    """Bytes of a prefix in a cache. A row takes about 20 more, and every `add` about 500."""
    return k * (_index_type(vocabulary).bit_width // 8 + 2) + 2


class TargetWriter:
    """Writes a cache; in a `with` block the file appears when the block ends, or not at all if it fails.

    Log-probabilities are stored in float16, which changes the gradient with respect to the logits by 0.04%, and by 1%
    where q and the policy almost agree.

    Args:
        path: the file; None keeps the cache in memory.
        k: tokens of a target, as in `sparse_target`.
        vocabulary: its size; up to 65,536 tokens an index takes two bytes, beyond that four.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | Path | None, k: int, vocabulary: int):
        self.path = None if path is None else Path(path)
        about = {"k": min(k, vocabulary), "vocabulary": vocabulary}
        self.schema = _schema(vocabulary).with_metadata({FORMAT: json.dumps(about)})
        self._file, self._sink = ExitStack(), pa.BufferOutputStream()
        if self.path is not None:
            with writing(self.path):
                self._sink = self._file.enter_context(atomic_file(self.path)).open("wb")
        self._writer = pa.ipc.new_file(self._sink, self.schema)

    def add(self, keys: Sequence[int], target: SparseTarget, mask: Tensor) -> None:
        """Adds the targets of a batch of rows.

        Args:
            keys: [batch] of `row_keys`. Of equal keys, either row is read.
            target: over [prefixes, k] tokens, row after row.
            mask: [batch, time], true at these prefixes, as in `TargetCache.gather`.
        """
        prefixes = mask.sum(-1).cpu().numpy()
        kept, k = target.to("cpu"), target.indices.shape[-1]
        columns = {
            "indices": _lists(kept.indices, prefixes * k),
            "log_probs": _lists(kept.log_probs.half(), prefixes * k),
            "log_rest": _lists(kept.log_rest.half(), prefixes),
        }
        types = {name: self.schema.field(name).type for name in columns}
        arrays = [array.cast(types[name]) for name, array in columns.items()]
        self._writer.write_batch(pa.record_batch([pa.array(keys, pa.uint64()), *arrays], schema=self.schema))

    def close(self) -> "TargetCache":
        """Completes the cache, and opens it."""
        self._writer.close()
        if self.path is None:
            return TargetCache(self._sink.getvalue())
        self._sink.close()
        self._file.close()
        return TargetCache.open(self.path)

    def __enter__(self) -> "TargetWriter":
        return self

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is None and not self._sink.closed:
            self.close()
        self._sink.close()
        self._file.__exit__(*exc)


class TargetCache:
    """Targets of corpus rows, found by the rows' keys. Pickled, a mapped cache is its path, any other its bytes.

    Args:
        buffer: the bytes of an Arrow file written by `TargetWriter`, or an object with the buffer protocol; not copied.
        name: for errors.

    Attributes:
        path: the file that is mapped, if any.
        buffer: the bytes, to ship: `TargetCache(cache.buffer)` is the same cache.
        k, vocabulary: as in `TargetWriter`.

    Raises:
        UserError: the bytes are not a whole cache.
    """

    def __init__(self, buffer: Any, name: str = "targets"):
        self.name = name
        self.path: Path | None = None
        self.buffer = pa.py_buffer(buffer)
        try:
            self.table, about = _table(self.buffer)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{name}: not a whole cache of targets ({first_line(error)}); delete it") from error
        self.k, self.vocabulary = about["k"], about["vocabulary"]
        self._rows = {key: row for row, key in enumerate(self.table["key"].to_pylist())}

    @classmethod
    def open(cls, path: str | Path) -> "TargetCache":
        """Memory-maps a cache on disk.

        Raises:
            UserError: there is no whole cache.
        """
        try:
            cache = cls(pa.memory_map(str(path)).read_buffer(), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
        cache.path = Path(path).resolve()
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        return (TargetCache, (self.buffer,)) if self.path is None else (TargetCache.open, (self.path,))

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, key: int) -> bool:
        return key in self._rows

    def gather(self, keys: Sequence[int], mask: Tensor) -> SparseTarget:
        """The targets of a batch over [prefixes, k] tokens, row after row, on the mask's device.

        Args:
            keys: [batch] of `row_keys`.
            mask: [batch, time], true at the prefixes of each row.

        Raises:
            UserError: a row is not in the cache, or has another number of prefixes there.
        """
        rows = [self._row(key, prefixes) for key, prefixes in zip(keys, mask.sum(-1).tolist(), strict=True)]
        indices = self._read("indices", rows).reshape(-1, self.k)
        log_buckets = torch.cat(
            [self._read("log_probs", rows).reshape(-1, self.k), self._read("log_rest", rows)[:, None]], dim=-1
        )
        log_buckets = F.log_softmax(log_buckets.float(), dim=-1)  # float16 rounds their sum off 1
        return SparseTarget(indices.long(), log_buckets[:, :-1], log_buckets[:, -1]).to(mask.device)

    def _row(self, key: int, prefixes: int) -> int:
        """The row of a key; it must have this many prefixes."""
        if (row := self._rows.get(key)) is None:
            raise UserError(f"{self.name}: holds no target for a row of the batch; it was made for other rows")
        if (found := len(self.table["log_rest"][row])) != prefixes:
            raise UserError(f"{self.name}: a row has {found} prefixes here and {prefixes} in the batch; rebuild it")
        return row

    def _read(self, column: str, rows: Sequence[int]) -> Tensor:
        """The values of a column in some rows, concatenated."""
        parts = [self.table[column][row].values.to_numpy() for row in rows]
        return torch.from_numpy(np.concatenate(parts))


class TargetShelf:
    """Several caches as one."""

    path: Path | None = None

    def __init__(self, caches: Sequence[TargetCache]):
        self.caches = caches

    def __contains__(self, key: int) -> bool:
        return any(key in cache for cache in self.caches)

    def gather(self, keys: Sequence[int], mask: Tensor) -> SparseTarget:
        """As `TargetCache.gather`, of rows that are in one of the caches; mask is [batch, time]."""
        caches = (next(cache for cache in self.caches if key in cache) for key in keys)
        rows = zip(caches, keys, mask.split(1), strict=True)
        return SparseTarget.cat([cache.gather([key], row) for cache, key, row in rows])


def _table(buffer: pa.Buffer) -> tuple[pa.Table, dict[str, Any]]:
    """The rows and the metadata of a cache; raises a ValueError if it is none."""
    table = pa.ipc.open_file(buffer).read_all()
    table.validate(full=True)
    about = json.loads((table.schema.metadata or {}).get(FORMAT, "{}"))
    if not about or not table.schema.equals(_schema(about["vocabulary"])):
        raise ValueError("an Arrow file of something else")
    return table, about


def _schema(vocabulary: int) -> pa.Schema:
    return pa.schema(
        {
            "key": pa.uint64(),
            "indices": pa.list_(_index_type(vocabulary)),  # k for each prefix, prefix after prefix
            "log_probs": pa.list_(pa.float16()),
            "log_rest": pa.list_(pa.float16()),
        }
    )


def _index_type(vocabulary: int) -> pa.DataType:
    return pa.uint16() if vocabulary <= 2**16 else pa.int32()


def _lists(values: Tensor, lengths: np.ndarray) -> pa.ListArray:
    """Concatenated values as one list of `lengths[i]` values for each row i."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values.flatten().numpy()))
