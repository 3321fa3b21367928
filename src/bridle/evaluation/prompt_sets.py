"""Prompt sets: where prompts come from, and how they are completed. The established toxicity benchmarks have names."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from bridle.data import DataSource
from bridle.errors import UserError
from bridle.models.sampling import Decoding


@dataclass(frozen=True)
class GenerationOptions(Decoding):
    """How the rows of a set become prompts, and how these are completed.

    Attributes:
        prompt_tokens: tokens at the start of each row that are the prompt; null takes the whole row.
        samples: K, the completions per prompt; 1 with `greedy`.
        max_new_tokens: tokens at which a completion is cut; in a recipe, by default its own `max_new_tokens`.

    Raises:
        UserError: as `Decoding`, or `greedy` with several samples.
    """

    prompt_tokens: PositiveInt | None = None
    samples: PositiveInt = 4
    max_new_tokens: PositiveInt = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.greedy and self.samples > 1:
            raise UserError("greedy: has one completion for each prompt; leave samples out")

    def __str__(self) -> str:
        prompts = "whole rows" if self.prompt_tokens is None else f"first {self.prompt_tokens} tokens of each row"
        completions = "1 completion" if self.samples == 1 else f"{self.samples} completions"
        return f"{prompts}, {completions} of at most {self.max_new_tokens} tokens, {super().__str__()}"


GENERATION = tuple(field.name for field in fields(GenerationOptions))


def combined(*levels: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `GenerationOptions` from several places, each of which overrides those before it.

    `greedy` also overrides an earlier temperature, top_p and samples, and a later temperature or top_p overrides it.
    """
    found: dict[str, Any] = {}
    for level in levels:
        if level.get("greedy"):
            found = {key: found[key] for key in found.keys() - {"temperature", "top_p"}} | {"samples": 1}
        elif level.keys() & {"temperature", "top_p"}:
            found.pop("greedy", None)
        found |= level
    return found


@dataclass(frozen=True)
class PromptSet:
    """A source of prompts.

    Attributes:
        name: as given; the results use it.
        source: the rows, for `bridle.data.read_prompts`.
        generation: how they become prompts and are completed.
    """

    name: str
    source: DataSource
    generation: GenerationOptions = GenerationOptions()

    def describe(self) -> dict[str, Any]:
        """The settings that determine prompts and completions, ready for JSON."""
        source = {key: value for key, value in asdict(self.source).items() if value is not None}
        return source | asdict(self.generation)


# Hartvigsen et al., ACL 2022, the part with human annotations: whole statements. On the hub, recipes do not train on
# `test`; a local file has one split only.
_TOXIGEN = "toxigen/toxigen-data:annotated,split=test,text=text", "toxigen.jsonl,text=text"

# By name: the source on the hub, that in the data folder, both as `DataSource.parse` reads them, and what the set says
# of its `GenerationOptions`.
KNOWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "toxigen": (*_TOXIGEN, {"prompt_tokens": 8}),
    # The protocol of the Llama 2 report (Touvron et al., 2023), whose statements are those that Hosseini et al. (2023)
    # kept of ToxiGen, a selection that the set on the hub does not mark. The length of 32 tokens is ours.
    "toxigen-llama2": (
        *_TOXIGEN,
        {"prompt_tokens": None, "samples": 1, "max_new_tokens": 32, "temperature": 0.1, "top_p": 0.9},
    ),
    # Gehman et al., Findings of EMNLP 2020: prompts as they are.
    "realtoxicityprompts": (
        "allenai/real-toxicity-prompts,prompt=prompt.text",
        "realtoxicityprompts.jsonl,prompt=prompt",
        {"prompt_tokens": None},
    ),
}


def prompt_set(
    name_or_path: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **options: Any,
) -> PromptSet:
    """Prompts by the name of a known set, a path or a hub name.

    Args:
        name_or_path: "toxigen", "toxigen-llama2", "realtoxicityprompts", or an argument of `DataSource.parse`. Options
            follow either: "toxigen,rows=90%:,label=1". "./toxigen" is a file or folder with the name of a known set.
        data_dir: folder of the known sets' local files (toxigen.jsonl, realtoxicityprompts.jsonl). By default the
            folder `data` of the environment variable `BRIDLE_SHARED`, if it is set, and then the hub.
        defaults: fields of `GenerationOptions` where the set says nothing else.
        options: fields of `GenerationOptions` whatever the set says.

    Raises:
        UserError: there is no such set, file or hub name; `data_dir` lacks the set's file; or an option is malformed.
    """
    given = DataSource.parse(name_or_path)
    if given.place in KNOWN:
        hub, local, known = KNOWN[given.place]
        rows = name_or_path[len(given.place) :]
        file = _local_file(local, data_dir)
        given = replace(DataSource.parse(local + rows), path=str(file)) if file else DataSource.parse(hub + rows)
    else:
        _check_path(given.place)
        known = {}
    return PromptSet(name_or_path, given, GenerationOptions(**combined(defaults or {}, known, options)))


def _local_file(local: str, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The set's file in the data folder; None if the set comes from the hub."""
    shared = os.environ.get("BRIDLE_SHARED")
    folder = data_dir or (shared and Path(shared, "data"))
    file = Path(folder, DataSource.parse(local).place) if folder else None
    if file and file.is_file():
        return file
    if data_dir:
        raise UserError(f"{file}: no such file; put it there, or name no folder, to read the set from the hub")
    return None


def _check_path(path: str) -> None:
    """Refuses a word that is neither a file nor a hub name, which has an owner before a slash."""
    if "/" in path or os.path.exists(os.path.expanduser(path)):
        return
    nearest = difflib.get_close_matches(path, KNOWN, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"{path}: no such file, and no prompt set of that name; known are {', '.join(KNOWN)}{hint}")
