"""Rows of ShareGPT and Alpaca converted to messages, and to prompt and completion."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, Features, Json, Value, concatenate_datasets

from bridle.constraints.reading import Messages
from bridle.data.readers import ROW, gather
from bridle.data.rows import FIELDS, absent_column, known_format
from bridle.errors import UserError

ALPACA = ("instruction", "input", "output")
SHAREGPT = "conversations"
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
    "system": "system",
}
"""The roles of ShareGPT files, and those of chat templates."""

_ABOUT = "Below is an instruction that describes a task"
_ALPACA = (
    f"{_ABOUT}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    f"{_ABOUT}, paired with an input that provides further context. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def foreign_format(columns: Sequence[str]) -> str | None:
    """ "sharegpt" or "alpaca" if the columns are theirs and make none of `FORMATS`; else None."""
    if known_format(columns) is not None:
        return None
    if SHAREGPT in columns:
        return "sharegpt"
    return "alpaca" if {"instruction", "output"} <= set(columns) else None


def converted(dataset: Dataset, kind: str, name: str) -> Dataset:
    """The rows with the columns `messages`, or `prompt` and `completion`, instead of those of `kind`.

    Raises:
        UserError: beginning with `name`: a column is missing, or a row is not of this kind.
    """
    convert, needed, features = CONVERSIONS[kind]
    for column in needed:
        if column not in dataset.column_names:
            raise absent_column(name, column, dataset.column_names)
    rows = (convert(row, f"{name} row {row[ROW]}") for row in dataset)
    new = gather(rows, features)
    old = {*needed, *features, "input"} if kind == "alpaca" else {*needed, *features}
    rest = dataset.remove_columns(sorted((old | {*FIELDS}).intersection(dataset.column_names)))
    return concatenate_datasets([rest, new], axis=1)


def _chat(row: dict[str, Any], place: str) -> dict[str, Any]:
    turns = row[SHAREGPT]
    if turns is None:
        return {"messages": None}
    if not isinstance(turns, list):
        raise UserError(f"{place}: column {SHAREGPT!r} holds {type(turns).__name__}, not a list of turns")
    system = row.get("system")
    begun: Messages = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return {"messages": begun + [_turn(turn, place) for turn in turns]}


def _turn(turn: Any, place: str) -> dict[str, Any]:
    if isinstance(turn, dict) and "role" in turn:
        return turn  # a chat already, under ShareGPT's name
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise UserError(f"{place}: column {SHAREGPT!r} holds a turn without 'from' and 'value'")
    speaker = turn.get("from")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{place}: a turn is from {speaker!r}; known are {', '.join(ROLES)}")
    return {"role": role, "content": turn["value"]}


def _instruction(row: dict[str, Any], place: str) -> dict[str, Any]:
    values = [row.get(column) for column in ALPACA]
    for column, value in zip(ALPACA, values, strict=True):
        if not isinstance(value, str | None):
            raise UserError(f"{place}: column {column!r} holds {type(value).__name__}, not text")
    instruction, given, output = values
    if not (instruction and instruction.strip()):
        return {"prompt": None, "completion": None}
    template = _ALPACA_WITH_INPUT if given and given.strip() else _ALPACA
    return {"prompt": template.format(instruction=instruction, input=given), "completion": output}


Conversion = tuple[Callable[[dict[str, Any], str], dict[str, Any]], tuple[str, ...], Features]

CONVERSIONS: dict[str, Conversion] = {
    "sharegpt": (_chat, (SHAREGPT,), Features({"messages": Json()})),
    "alpaca": (
        _instruction,
        ("instruction", "output"),
        Features({"prompt": Value("string"), "completion": Value("string")}),
    ),
}
"""By name: the function for a row, the columns that it needs, and the types of those that it makes."""
