"""Hashes of a run's inputs, with which a resumed run detects changed files and variables.

`inputs.json` has a hash of every local file that the recipe reads, and of every value from an environment variable.
Sizes and times do not suffice: an edit may keep both.
"""

import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridle.errors import UserError
from bridle.recipes.recipe import PATHS, Recipe
from bridle.utils.files import read_json, write_json
from bridle.utils.variables import expanded

INPUTS_FILE = "inputs.json"
MADE_BY_READING = ("cache-*", "*.pyc")  # files that `datasets` and Python write beside those they read


@dataclass
class _Inputs:
    """The hash of each file by its path, and of each variable by the key that it stands in, with its salt."""

    files: dict[str, str]
    salt: str
    variables: dict[str, str]


def write_inputs(recipe: Recipe, folder: Path, more: Iterable[Path] = ()) -> None:
    """Writes `inputs.json` in a run's folder, for the files of the recipe and `more` files and folders."""
    salt = secrets.token_hex(16)
    write_json(folder / INPUTS_FILE, asdict(_Inputs(_hashes(recipe, more), salt, _digests(recipe.resolved, salt))))


def check_inputs(
    recipe: Recipe,
    folder: Path,
    advice: str,
    ignored: tuple[str, ...] = (),
    more: Iterable[Path] = (),
    reads_the_same: bool = True,
) -> None:
    """Checks that a resumed run reads the inputs that it started with.

    Args:
        recipe: of the run.
        folder: the run's; without an `inputs.json` nothing is checked.
        advice: for the error: the alternative to restoring the inputs.
        ignored: prefixes of keys whose variables may change.
        more: as in `write_inputs`.
        reads_the_same: whether all keys that name files are as they were, so that no file may be new or gone.

    Raises:
        UserError: a file or the value of a variable has changed; it names the first ones.
    """
    if not (folder / INPUTS_FILE).is_file():
        return
    known, files = read_json(folder / INPUTS_FILE, _Inputs), _hashes(recipe, more)
    variables = _digests(recipe.resolved, known.salt)
    changed = _changed(known.files, files) + (_came_or_went(known.files, files) if reads_the_same else [])
    changed += [f"the variable in {key}" for key in _changed(known.variables, variables) if not key.startswith(ignored)]
    if changed:
        rest = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(f"{', '.join(changed[:3])}{rest}: changed since {folder} was started; restore it, {advice}")


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What both have, with another hash."""
    return sorted(name for name in before.keys() & now.keys() if before[name] != now[name])


def _came_or_went(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What only one has, unless the other has as many of the same content under other names, as after a move."""
    gone = {name: before[name] for name in before.keys() - now.keys()}
    new = {name: now[name] for name in now.keys() - before.keys()}
    counts, others = Counter(gone.values()), Counter(new.values())
    return sorted(name for name, content in (gone | new).items() if counts[content] != others[content])


def _hashes(recipe: Recipe, more: Iterable[Path]) -> dict[str, str]:
    """The hash of every file that a recipe reads, by its path with variables by name."""
    files = sorted({file for path in [*_read(recipe), *more] for file in _files_of(path)})
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        found = zip(files, pool.map(_hash, files), strict=True)
    return {recipe.variables.hidden(str(file)): content for file, content in found}


def _read(recipe: Recipe) -> Iterator[Path]:
    yield Path(recipe.model)
    options = (recipe.training.get(key) for key in PATHS if key != "target_cache")  # which the run writes
    yield from (Path(path) for path in options if isinstance(path, str | Path))
    read: list[Any] = [*recipe.corpus.values()]
    for regulariser in recipe.regularisers.values():
        read += [regulariser.constraint, regulariser.prompts]
    if recipe.eval is not None:
        read += [*recipe.eval.corpus.values(), *recipe.eval.constraints, recipe.eval.prompts]
    for part in filter(None, read):
        yield from part.files()


def _files_of(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
        yield from (file for file in inside if not any(file.match(pattern) for pattern in MADE_BY_READING))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _hash(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _digests(recipe: Mapping[str, Any], salt: str) -> dict[str, str]:
    """By dotted key, a hash of each value from a variable; slow by design, since it may be a secret."""
    values = dict(_differing(recipe, expanded(recipe)[0], ""))
    return {
        key: hashlib.scrypt(value.encode(), salt=salt.encode(), n=2**12, r=8, p=1).hex()[:32]
        for key, value in values.items()
        if not os.path.exists(os.path.expanduser(value))  # a file counts by its content, not its path
    }


def _differing(written: Any, read: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(read, Mapping):
        for name, value in read.items():
            yield from _differing(written[name], value, f"{key}.{name}" if key else str(name))
    elif isinstance(read, list):
        for index, (mine, value) in enumerate(zip(written, read, strict=True)):
            yield from _differing(mine, value, f"{key}.{index}")
    elif isinstance(read, str) and "${" in written:
        yield key, read
