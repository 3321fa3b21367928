"""The formats of the rows of a corpus or a prompt file, and the checks that name a bad row."""

import difflib
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from datasets import Dataset

from bridle.constraints.reading import Messages, text_of
from bridle.data.readers import ROW
from bridle.errors import UserError

log = logging.getLogger(__name__)

FORMATS = (("messages",), ("prompt", "completion"), ("text",))  # columns of each format; the first match wins

FIELDS = tuple(dict.fromkeys(field for fields in FORMATS for field in fields))

PROMPTS = ("prompt",)  # the columns of rows that are prompts alone

ASKED, ANSWERED = ("prompt", "question", "instruction", "query"), ("chosen", "answer", "response", "output")
"""Usual names of the columns of prompts and completions."""

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a row, for its chat template

MOST_NAMES = 5  # columns that a warning names

_TEXT, _CHAT = "text", "chat messages"
_HOLDS = {"text": {_TEXT}, "messages": {_CHAT}, "prompt": {_TEXT, _CHAT}, "completion": {_TEXT, _CHAT}}


def format_fields(columns: Sequence[str], name: str) -> tuple[str, ...]:
    """The columns of the rows' format, one of `FORMATS`.

    Raises:
        UserError: the columns make no format; it names them.
    """
    fields = known_format(columns)
    if fields is None:
        raise UserError(f"{absent_column(name, 'text', columns)}{unnamed_pair(columns)}")
    return fields


def known_format(columns: Collection[str]) -> tuple[str, ...] | None:
    """The columns of the rows' format, one of `FORMATS`; None if they make none."""
    return next((fields for fields in FORMATS if {*fields} <= {*columns}), None)


def unnamed_pair(columns: Sequence[str]) -> str:
    """How to name columns that hold prompts and completions, to end an error; "" if there are none."""
    asked, answer = (next((name for name in known if name in columns), None) for known in (ASKED, ANSWERED))
    if asked is None or answer is None:
        return ""
    names = [f"prompt: {asked}"] * (asked not in PROMPTS) + [f"completion: {answer}"]
    return f"; or name them: {', '.join(names)}" + ", which learns the better answers" * (answer == "chosen")


def holds_prompts(columns: Sequence[str]) -> bool:
    """Whether rows with these columns are prompts alone, without what follows them, and not tokenised."""
    if "input_ids" in columns:
        return False
    return "prompt" in columns and known_format(columns) is None


def column_of(dataset: Dataset, column: str, name: str) -> list[Any]:
    """The values of a column.

    Raises:
        UserError: there is no such column; it names those that there are.
    """
    if column not in dataset.column_names:
        raise absent_column(name, column, dataset.column_names)
    return dataset[column][:]


def absent_column(name: str, column: str, columns: Sequence[str]) -> UserError:
    """The error for a missing column; it names the columns that are there, and the nearest of them."""
    there = [known for known in columns if known != ROW]
    nearest = difflib.get_close_matches(column, there, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return UserError(f"{name} has no column {column!r}; it has {', '.join(map(repr, there)) or 'none'}{hint}")


def filled_rows(dataset: Dataset, fields: Sequence[str], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the row number and `fields` of every row in which none of them is blank.

    A warning counts the others, and names the first with the columns that it has instead.

    Blank is null, white space only, or a chat without messages. Rows that may be chats also have their
    `TEMPLATE_COLUMNS`.

    Raises:
        UserError: a column holds neither text nor, where allowed, a chat, or the row has another format; it names the
            row.
    """
    blank: list[int] = []  # indices
    others = {*FIELDS} - {*fields, "completion"} if tuple(fields) in FORMATS else set()
    others &= {*dataset.column_names}
    options = TEMPLATE_COLUMNS if "text" not in fields else ()
    read = [column for column in (*fields, *others, *options, ROW) if column in dataset.column_names]
    for index, row in enumerate(dataset.select_columns(read), start=1):
        number = row.get(ROW, index)
        values = {field: row[field] for field in fields}
        for field, value in values.items():
            _check(value, field, f"{name} row {number}")
        if all(map(is_filled, values.values())):
            yield number, values | {option: row[option] for option in options if row.get(option)}
            continue
        other = next((column for column in sorted(others) if row[column]), None)
        if other and not any(map(is_filled, values.values())):
            raise UserError(
                f"{name} row {number} has no {fields[0]!r}, but {other!r}: rows of two formats; give each a source of "
                f"its own, or name the column to read"
            )
        blank.append(index - 1)
    warn_of_blank(name, dataset, blank, fields)


def warn_of_blank(name: str, dataset: Dataset, blank: Sequence[int], fields: Sequence[str]) -> None:
    """Warns that the rows at these indices were left out, if any: they lack one of the fields."""
    if not blank:
        return
    read = [*fields, *({ROW} & {*dataset.column_names})]
    row = dataset.select_columns(read)[blank[0]]
    lacks = next((field for field in fields if not is_filled(row[field])), fields[0])  # or it holds no text
    cells = dataset.with_format("arrow")[blank[0] : blank[0] + 1]  # other columns may hold images, say
    others = [repr(column) for column in cells.column_names if column not in read and not cells[column].null_count]
    has = ", ".join([*others[:MOST_NAMES], *["..."] * (len(others) > MOST_NAMES)])
    log.warning(
        "%s: left out %d of %d rows that hold no text; row %d has no %r%s",
        *(name, len(blank), len(dataset), row.get(ROW, blank[0] + 1), lacks, f"; it has {has}" * bool(has)),
    )


def holds_chats(dataset: Dataset) -> bool:
    """Whether the rows are chats, judged by the first that is not blank; tokenised rows are not."""
    fields = PROMPTS if holds_prompts(dataset.column_names) else ("messages", "completion")
    field = next((field for field in fields if field in dataset.column_names), None)
    first = next((value for value in dataset[field] if value), None) if field is not None else None
    return isinstance(first, list)


def conversation(values: dict[str, Any]) -> tuple[Messages, list[int]]:
    """The turns of a chat, and the indices of the assistant's turns that are learnt; both are empty for other rows.

    Of a prompt alone it is the index of the turn that comes next.
    """
    begun, rest = _parts(values)
    if not (isinstance(begun, list) and isinstance(rest, list)):
        return [], []
    turns: Messages = [*begun, *rest]
    if not values.keys() & {"completion", "messages"}:
        return turns, [len(turns)]
    return turns, [n for n, turn in enumerate(turns) if n >= max(1, len(begun)) and turn["role"] == "assistant"]


def _parts(values: dict[str, Any]) -> tuple[Any, Any]:
    """The prompt and the completion; messages are a whole chat, whatever column stands beside them, as in `FORMATS`."""
    if "messages" in values:
        return [], values["messages"] or []
    return values.get("prompt") or [], values.get("completion") or []


def said(values: dict[str, Any]) -> str:
    """The part of a row that a model learns to say: the completion, the assistant's turns, or the whole text."""
    said = next(values[field] for field in ("messages", "completion", "text") if field in values)
    return said if isinstance(said, str) else _assistant_turns(said)


def outputs_of(rows: Iterable[dict[str, Any]], with_prompts: bool) -> tuple[list[str | Messages | None], list[str]]:
    """The prompts and completions of rows; without prompts, None and what `said` returns.

    With prompts, a chat's completion is the assistant's last turn, and its prompt the turns before it.
    """
    outputs = [_output(values) if with_prompts else (None, said(values)) for values in rows]
    return [prompt for prompt, _ in outputs], [completion for _, completion in outputs]


def _output(values: dict[str, Any]) -> tuple[str | Messages | None, str]:
    if "text" in values:
        return None, values["text"]
    prompt, completion = _parts(values)
    if isinstance(completion, str):
        return prompt, completion
    begun = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns: Messages = [*begun, *completion]
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    return turns[:last], _assistant_turns(turns[last:])


def _check(value: Any, field: str, place: str) -> None:
    kind = _TEXT if isinstance(value, str) else _CHAT if _is_chat(value) else type(value).__name__
    if value is not None and kind not in _HOLDS[field]:
        raise UserError(f"{place}: column {field!r} holds {kind}, not {' or '.join(sorted(_HOLDS[field]))}")


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    """A mapping of a role and text, parts or nothing, as beside a tool call."""
    said = isinstance(value, dict) and isinstance(value.get("content"), str | list | None)
    return said and isinstance(value.get("role"), str)


def is_filled(value: str | Messages | None) -> bool:
    """Whether a text or a chat is not blank."""
    return bool(value.strip() if isinstance(value, str) else value)


def _assistant_turns(messages: Messages) -> str:
    turns = [message.get("content") for message in messages if message["role"] == "assistant"]
    return "\n".join(text_of(turn) for turn in turns if turn is not None)
