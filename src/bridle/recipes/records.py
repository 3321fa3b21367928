"""A run's records in `metrics.jsonl`, read while the run goes on, and what they say of where it is."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import median_low
from typing import Any

from bridle.errors import UserError
from bridle.recipes.metrics import Stamp
from bridle.utils.files import checked, parse

Record = dict[str, Any]


@dataclass
class Run:
    """A run's records, read from its folder as they come.

    Attributes:
        folder: of `bridle train`, or one seed of a method of `bridle compare`.
        records: those read so far.
    """

    folder: Path
    records: list[Record] = field(default_factory=list)
    _file: tuple[int, int, float] = (0, 0, 0.0)  # its inode, the bytes that were read, and when it was written to

    @property
    def path(self) -> Path:
        """The file that the run appends to."""
        return self.folder / "metrics.jsonl"

    def read(self) -> list[Record]:
        """Reads what was added, and returns it; of a file that a resumed run has rewritten, what differs.

        Raises:
            UserError: a row is not a record of a run.
        """
        inode, start, _ = self._file
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != inode or found.st_size < start:
                    start = 0
                file.seek(start)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        self._file = found.st_ino, start + len(whole) + bool(whole), found.st_mtime
        before = self.records if start == 0 else []
        kept = [] if start == 0 else self.records
        rows = whole.decode("utf-8", errors="replace").split("\n") if whole else []
        new = [_record(row, f"{self.path} row {number}") for number, row in enumerate(rows, len(kept) + 1)]
        self.records = kept + new
        return new[len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before, new, strict=False)))) :]

    # ------------------------------------------------------------------ where the run is

    @property
    def last(self) -> Record:
        """The last training record; empty before the first."""
        return next((record for record in reversed(self.records) if "loss" in record), {})

    @property
    def step(self) -> int:
        """The policy's last update that is recorded."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def steps(self) -> int:
        """How many updates the run makes; 0 before the first record."""
        return self.records[-1]["max_steps"] if self.records else 0

    @property
    def rounds(self) -> int:
        """How many rounds the run has; 0 before the first record."""
        return self.records[-1]["rounds"] if self.records else 0

    @property
    def seconds(self) -> float:
        """The time since training began, up to the last record."""
        return self.records[-1]["seconds"] if self.records else 0.0

    @property
    def age(self) -> float | None:
        """Seconds since the file was written to; None before it is there."""
        return max(0.0, time.time() - self._file[2]) if self._file[2] else None

    @property
    def has_ended(self) -> bool:
        """Whether the records of the last update have one that ends a run."""
        keys = {key for record in self._of_last_update() for key in record}
        return bool(keys & {"train_runtime", "best_step"}) or any(key.endswith("/violation_reached") for key in keys)

    @property
    def best_step(self) -> int | None:
        """The update whose weights were kept at the end by `eval.best`; None without one."""
        return next((record["best_step"] for record in self._of_last_update() if "best_step" in record), None)

    def _of_last_update(self) -> Iterator[Record]:
        return takewhile(lambda record: record["step"] == self.step, reversed(self.records))

    @property
    def seconds_left(self) -> float | None:
        """An estimate: the updates to come at the low median time of one, and the rounds to come at the mean of one."""
        timed = self._timed()
        if not timed or not self.steps or not self.rounds:
            return None
        step, seconds = timed[-1]
        paces = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(timed) if b[0] > a[0]]
        pace = median_low(paces) if paces else seconds / step
        begun = min(self.rounds, (step - 1) * self.rounds // self.steps + 1)
        between = max(0.0, seconds - pace * step) / begun
        return pace * (self.steps - step) + between * (self.rounds - begun)

    def _timed(self) -> list[tuple[int, float]]:
        """Step and seconds of each training record."""
        return [(record["step"], record["seconds"]) for record in self.records if "loss" in record and record["step"]]


def _record(row: str, place: str) -> Record:
    record = checked(dict[str, Any], parse(row, place), place)
    checked(Stamp, record, place)
    return record
