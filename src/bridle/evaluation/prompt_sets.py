"""Prompts by name: the sets that the field measures toxicity on, from the hub or from local files."""

import difflib
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bridle.data import DataSource
from bridle.errors import UserError


@dataclass(frozen=True)
class PromptSet:
    """Where prompts come from.

    Attributes:
        name: as it was asked for; what the results call it.
        source: the rows, for `bridle.data.read_prompts`.
        prompt_tokens: how many tokens of each row make the prompt, for `prefix_tokens`; None takes all.
    """

    name: str
    source: DataSource
    prompt_tokens: int | None = None

    def describe(self) -> dict[str, Any]:
        """What decides the prompts, ready for JSON."""
        source = {key: value for key, value in asdict(self.source).items() if value is not None}
        return source | {"prompt_tokens": self.prompt_tokens}


@dataclass(frozen=True)
class _Known:
    hub: str  # as `DataSource.parse` reads it
    local: str  # the same, the path within the data folder
    prompt_tokens: int | None = None


KNOWN = {
    # Hartvigsen et al., ACL 2022, the part with human annotations: whole statements, so their beginnings are
    # completed. On the hub `test` is what recipes do not train on; a local file has one split only.
    "toxigen": _Known(
        hub="toxigen/toxigen-data:annotated,split=test,text=text",
        local="toxigen.jsonl,text=text",
        prompt_tokens=8,
    ),
    # Gehman et al., Findings of EMNLP 2020: prompts as they are.
    "realtoxicityprompts": _Known(
        hub="allenai/real-toxicity-prompts,prompt=prompt.text",
        local="realtoxicityprompts.jsonl,prompt=prompt",
    ),
}


def prompt_set(name_or_path: str, *, data_dir: str | os.PathLike[str] | None = None) -> PromptSet:
    """Finds prompts by the name of a known set, or else by a path or hub name.

    Args:
        name_or_path: "toxigen", "realtoxicityprompts", or what `DataSource.parse` takes. Options follow either:
            "toxigen,rows=90%:,label=1". A file or folder called like a known set is reached by "./toxigen".
        data_dir: folder of the known sets' local files (toxigen.jsonl, realtoxicityprompts.jsonl). Without it
            they are looked for in the folder `data` of `BRIDLE_SHARED`, if that environment variable is set,
            and then on the hub.

    Raises:
        UserError: there is no such set, file or hub name; `data_dir` lacks the set's file; or an option is malformed.
    """
    asked = DataSource.parse(name_or_path)
    known = KNOWN.get(asked.place)
    if known is None:
        _check_path(asked.place)
        return PromptSet(name_or_path, asked)
    options = name_or_path[len(asked.place) :]
    file = _local_file(known, data_dir)
    if file is None:
        return PromptSet(name_or_path, DataSource.parse(known.hub + options), known.prompt_tokens)
    source = replace(DataSource.parse(known.local + options), path=str(file))
    return PromptSet(name_or_path, source, known.prompt_tokens)


def _local_file(known: _Known, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The set's file in the data folder; None where it is to come from the hub."""
    folder = _shared_data() if data_dir is None else Path(data_dir)
    if folder is None:
        return None
    file = folder / DataSource.parse(known.local).place
    if file.is_file():
        return file
    if data_dir is not None:
        raise UserError(f"{file}: no such file; put it there, or leave data_dir out to read the set from the hub")
    return None


def _shared_data() -> Path | None:
    shared = os.environ.get("BRIDLE_SHARED")
    return Path(shared) / "data" if shared else None


def _check_path(path: str) -> None:
    """A word that names no file and has no owner before a slash, as hub names do, is a misspelt set or file."""
    if "/" in path or os.path.exists(os.path.expanduser(path)):
        return
    nearest = difflib.get_close_matches(path, KNOWN, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"{path}: no such file, and no prompt set of that name; known are {', '.join(KNOWN)}{hint}")
