"""Prompts by name: the established toxicity benchmarks, from the hub or from local files."""

import difflib
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bridle.data import DataSource
from bridle.errors import UserError


@dataclass(frozen=True)
class PromptSet:
    """A source of prompts.

    Attributes:
        name: as given; the results use it.
        source: the rows, for `bridle.data.read_prompts`.
        prompt_tokens: length of the prompt at the start of each row, for `prefix_tokens`; None takes the whole row.
    """

    name: str
    source: DataSource
    prompt_tokens: int | None = None

    def describe(self) -> dict[str, Any]:
        """The settings that determine the prompts, ready for JSON."""
        source = {key: value for key, value in asdict(self.source).items() if value is not None}
        return source | {"prompt_tokens": self.prompt_tokens}


# By name: the source on the hub, that in the data folder, both as `DataSource.parse` reads them, and `prompt_tokens`.
KNOWN: dict[str, tuple[str, str, int | None]] = {
    # Hartvigsen et al., ACL 2022, the part with human annotations: whole statements, whose beginnings are completed.
    # On the hub, recipes do not train on `test`; a local file has one split only.
    "toxigen": ("toxigen/toxigen-data:annotated,split=test,text=text", "toxigen.jsonl,text=text", 8),
    # Gehman et al., Findings of EMNLP 2020: prompts as they are.
    "realtoxicityprompts": (
        "allenai/real-toxicity-prompts,prompt=prompt.text",
        "realtoxicityprompts.jsonl,prompt=prompt",
        None,
    ),
}


def prompt_set(name_or_path: str, *, data_dir: str | os.PathLike[str] | None = None) -> PromptSet:
    """Prompts by the name of a known set, a path or a hub name.

    Args:
        name_or_path: "toxigen", "realtoxicityprompts", or an argument of `DataSource.parse`. Options follow either:
            "toxigen,rows=90%:,label=1". "./toxigen" is a file or folder with the name of a known set.
        data_dir: folder of the known sets' local files (toxigen.jsonl, realtoxicityprompts.jsonl). By default the
            folder `data` of the environment variable `BRIDLE_SHARED`, if it is set, and then the hub.

    Raises:
        UserError: there is no such set, file or hub name; `data_dir` lacks the set's file; or an option is malformed.
    """
    given = DataSource.parse(name_or_path)
    if given.place not in KNOWN:
        _check_path(given.place)
        return PromptSet(name_or_path, given)
    hub, local, prompt_tokens = KNOWN[given.place]
    options = name_or_path[len(given.place) :]
    file = _local_file(local, data_dir)
    source = replace(DataSource.parse(local + options), path=str(file)) if file else DataSource.parse(hub + options)
    return PromptSet(name_or_path, source, prompt_tokens)


def _local_file(local: str, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The set's file in the data folder; None if the set comes from the hub."""
    shared = os.environ.get("BRIDLE_SHARED")
    folder = data_dir or (shared and Path(shared, "data"))
    file = Path(folder, DataSource.parse(local).place) if folder else None
    if file and file.is_file():
        return file
    if data_dir:
        raise UserError(f"{file}: no such file; put it there, or leave data_dir out to read the set from the hub")
    return None


def _check_path(path: str) -> None:
    """Refuses a word that is neither a file nor a hub name, which has an owner before a slash."""
    if "/" in path or os.path.exists(os.path.expanduser(path)):
        return
    nearest = difflib.get_close_matches(path, KNOWN, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"{path}: no such file, and no prompt set of that name; known are {', '.join(KNOWN)}{hint}")
