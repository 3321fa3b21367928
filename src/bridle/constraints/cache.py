"""Labels on disk, so that no text is scored twice: an SQLite file that processes share."""

import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import Field

from bridle.constraints.base import Constraint, Score
from bridle.constraints.deadline import batches
from bridle.constraints.function import PythonFunction
from bridle.constraints.options import checked
from bridle.constraints.reading import Given
from bridle.errors import UserError
from bridle.utils.files import cache_folder

Label = tuple[float, ...]
"""A scorer's numbers for a text."""

Outcome = Label | str
"""A label, or the reason why it is missing."""

Ask = Callable[[list[str]], Iterable[tuple[str, Outcome]]]
"""Scores texts and returns (text, outcome) for each, in any order and as they come."""

CacheFile = Annotated[bool | Path, Field(union_mode="left_to_right")]
"""An option: the file of a `ScoreCache`, true for the default one, or false for none."""

AT_ONCE = 1_024  # outputs that a constraint without a cache of its own scores before their labels are written

APPLICATION_ID = 0x42524C43  # marks our files in SQLite's header


class ScoreCache:
    """Labels by scorer and text, stored by hash in a file on a local disk; by default in `cache_folder()`.

    Each label is written as soon as it arrives. Processes that ask one scorer take turns, so that each finds the labels
    of those before it.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(cache_folder() / "scores.sqlite" if path is None else path).expanduser()

    @classmethod
    def of(cls, cache: bool | Path) -> "ScoreCache | None":
        """Returns the cache that an option names."""
        return (cls() if cache is True else cls(cache)) if cache else None

    def check(self) -> None:
        """Opens or creates the file; raises UserError if it is damaged, another program's, or cannot be written."""
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")

    def through(self, scorer: Mapping[str, Any], texts: Collection[str], ask: Ask) -> Iterator[tuple[str, Outcome]]:
        """Yields (text, outcome) for each text, in any order; asks about those without a label, and stores these.

        Args:
            scorer: what decides its numbers, as JSON values.
            texts: without repetition.
            ask: called with the unknown texts, if there are any.

        Raises:
            UserError: as `check`, or from `ask`.
        """
        scorer_hash = blake2b(json.dumps(scorer, sort_keys=True).encode("ascii"), digest_size=32)
        with self._open() as database:
            known = _look_up(database, scorer_hash, texts)
            yield from known.items()
            unknown = [text for text in texts if text not in known]
            if not unknown:
                return
            with self._locked(f".{scorer_hash.hexdigest()[:16]}"):
                known = _look_up(database, scorer_hash, unknown)  # another process may have added them meanwhile
                yield from known.items()
                missing = [text for text in unknown if text not in known]
                for text, outcome in ask(missing) if missing else ():
                    if not isinstance(outcome, str):
                        row = (_key(scorer_hash, text), json.dumps(outcome, allow_nan=False))
                        database.execute("INSERT OR IGNORE INTO labels VALUES (?, ?)", row)
                    yield text, outcome

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._locked():  # SQLite does not wait for another process that changes the journal mode
                database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
                _prepare(database)
            with closing(database):
                yield database
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    @contextmanager
    def _locked(self, part: str = "") -> Iterator[None]:
        lock = FileLock(f"{self.path}{part}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise self._unusable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"cache {self.path}: cannot be used ({error}); move it away, or name another file with the key 'cache'"
        )


class Cached(Constraint):
    """Another constraint, with its scores, unless missing, in a `ScoreCache`.

    Args:
        constraint: scores texts that the cache does not hold.
        cache: a file for `ScoreCache`; true for the default one, false for none.
        version: any value; the cache treats each version as another scorer.

    Raises:
        UserError: the constraint is a function that name and module do not tell from others, and has no version.
    """

    type_name = "cached"

    @checked
    def __init__(self, constraint: Constraint, cache: CacheFile = True, version: str | int = ""):
        self.constraint, self.parts = constraint, [constraint]
        self.cache, self.version = ScoreCache.of(cache), version
        self.waits, self.reads = constraint.waits, constraint.reads
        self._scorer: dict[str, Any] | None = None
        if unknown := _unknown(constraint) if self.cache is not None and version == "" else None:
            raise UserError(
                f"cache: name and module do not tell {unknown.function} from others like it; give a version"
            )

    @property
    def name(self) -> str:
        """The constraint's own name."""
        return self.constraint.name

    @name.setter
    def name(self, name: str) -> None:
        self.constraint.name = name

    def load(self) -> None:
        super().load()
        if self.cache is not None:
            self.cache.check()
            self._scorer = self._scorer or self.identity()  # of what was loaded: its files may change while it runs

    def describe(self) -> dict[str, Any]:
        """Returns the constraint's own description."""
        return self.variables.hidden(self.constraint.describe())

    def identity(self) -> dict[str, Any]:
        return {self.type_name: self.constraint.identity(), "version": self.version}

    def _judge(self, prompts: list[Given], completions: list[str]) -> list[Score]:
        if self.cache is None:
            return self.constraint.score(prompts, completions)
        keys = [self.key(*output) for output in zip(prompts, completions, strict=True)]
        outputs = dict(zip(keys, zip(prompts, completions, strict=True), strict=True))

        def ask(unknown: list[str]) -> Iterator[tuple[str, Outcome]]:
            for some in batches(unknown, AT_ONCE):  # what is interrupted keeps the labels of the batches before
                asked = zip(*(outputs[key] for key in some), strict=True)
                for key, score in zip(some, self.constraint.score(*asked), strict=True):
                    yield key, score.reason if score.value is None else (score.value, float(score.complies or False))

        self._scorer = self._scorer or self.identity()
        outcomes = dict(self.cache.through(self._scorer, outputs, ask))
        found = [outcomes[key] for key in keys]
        return [Score.missing(one) if isinstance(one, str) else Score(one[0], one[1] == 1.0) for one in found]


def remove_caches(constraint: Constraint) -> None:
    """Takes the label caches off a constraint and its parts, so that every text is scored."""
    if hasattr(constraint, "cache"):
        constraint.cache = None
    for part in constraint.parts:
        remove_caches(part)


def _unknown(constraint: Constraint) -> PythonFunction | None:
    """The first of a constraint's functions that name and module do not tell from others; None if there is none."""
    if isinstance(constraint, PythonFunction):
        return None if constraint.is_known else constraint
    return next(filter(None, map(_unknown, constraint.parts)), None)


def _prepare(database: sqlite3.Connection) -> None:
    """Creates the table in a new file, and refuses another program's file."""
    database.execute("PRAGMA synchronous = NORMAL")  # labels survive a crash of this process, not a loss of power
    (found,) = database.execute("PRAGMA application_id").fetchone()
    if found == APPLICATION_ID:
        return
    if found or database.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise sqlite3.DatabaseError("it is another program's")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("BEGIN IMMEDIATE")  # a table without the mark, after a kill, would be another program's
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute("CREATE TABLE labels (key BLOB PRIMARY KEY, label TEXT NOT NULL) WITHOUT ROWID")
    database.execute("COMMIT")


def _look_up(database: sqlite3.Connection, scorer_hash: "blake2b", texts: Iterable[str]) -> dict[str, Label]:
    known = {}
    for text in texts:
        row = database.execute("SELECT label FROM labels WHERE key = ?", (_key(scorer_hash, text),)).fetchone()
        if row is not None:
            known[text] = _label(row[0])
    return known


def _label(stored: str) -> Label:
    try:
        label = tuple(float(number) for number in json.loads(stored))
    except (ValueError, TypeError):
        label = ()
    if not label or not all(map(isfinite, label)):
        raise sqlite3.DatabaseError(f"it holds {stored!r:.40} for a label")
    return label


def _key(scorer_hash: "blake2b", text: str) -> bytes:
    key = scorer_hash.copy()
    key.update(text.encode("utf-8", "surrogatepass"))
    return key.digest()
