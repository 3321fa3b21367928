"""Prompts to sample from: prefixes of a domain's rows, what comes before an assistant's turn, or a file of prompts."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bridle.core.tokens import IGNORE
from bridle.data.encoding import encode_prompt, fit_chat, template_options
from bridle.data.readers import ROW
from bridle.data.rows import Messages, absent_column, conversation, filled_rows, holds_chats
from bridle.data.source import DataSource
from bridle.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        text: what it says.
        ids: its tokens, with the beginning-of-text token where the tokenizer adds one.
        row: the row of the file that it came from, 1-based.
        messages: the turns of a chat; None for a text.
    """

    text: str
    ids: list[int]
    row: int = 1
    messages: Messages | None = None


def prompts_from_domain(
    tokenized: Dataset,
    n: int,
    *,
    prompt_tokens: tuple[int, int | None],
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Collection[int] = (),
    max_prompt_tokens: int | None = None,
) -> list[Prompt]:
    """Draws `n` prompts from the rows of a domain.

    A chat gives all turns before one of the assistant's, each of which is as likely. A tokenised row that begins with
    masked labels (-100) gives those tokens: its prompt. Any other row gives a prefix whose length, beyond
    the beginning-of-text token, is uniform over `prompt_tokens`, both ends included, as far as a token of its first
    text is left over to predict. A longest length of None takes prefixes from any depth of the row. Rows
    that are too short for that, or whose prompt is too long, are passed over. Rows are drawn without replacement until
    all have been, then again.

    Args:
        tokenized: rows with `input_ids` and `labels`, of which a packed one may begin in the middle of a text; or rows
            that are chats, as they were read.
        n: how many prompts.
        prompt_tokens: the shortest and the longest prefix.
        seed: fixes rows and lengths.
        tokenizer: for the ids of its beginning-of-text and end-of-text tokens.
        end_tokens: further tokens that end a text.
        max_prompt_tokens: the longest prompt that leaves room for the new tokens.

    Returns:
        `n` prompts, none of them empty.

    Raises:
        UserError: if `prompt_tokens` is no range, or no row has such a prompt.
    """
    shortest, longest = prompt_tokens
    if shortest < 0 or (longest is not None and longest < shortest):
        raise UserError(f"prompt_tokens: {prompt_tokens} must be two lengths, the shorter first")
    rng = np.random.default_rng(seed)
    ends = {tokenizer.eos_token_id, *end_tokens}
    chats = holds_chats(tokenized)
    prompts: list[Prompt] = []
    while len(prompts) < n:
        if chats:
            passed = _chats(tokenized, rng, tokenizer, max_prompt_tokens)
        else:
            passed = _pass_over(tokenized, prompt_tokens, rng, tokenizer, ends)
        fitting = (
            one for one in passed if one.ids and (max_prompt_tokens is None or len(one.ids) <= max_prompt_tokens)
        )
        drawn = list(islice(fitting, n - len(prompts)))
        if not drawn:
            if chats:
                raise UserError(_no_chat(max_prompt_tokens))
            reach = f"{shortest} or more" if longest is None else f"{shortest} to {longest}"
            limit = f", or none of at most {max_prompt_tokens}" if max_prompt_tokens is not None else ""
            raise UserError(f"prompt_tokens: no row holds a prompt of {reach} tokens{limit}")
        prompts += drawn
    return prompts


def _pass_over(
    tokenized: Dataset,
    prompt_tokens: tuple[int, int | None],
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Collection[int],
) -> Iterator[Prompt]:
    """Goes over the rows once, in random order; yields the prompt of each, empty if it has none."""
    for index in rng.permutation(len(tokenized)):
        row = tokenized[int(index)]
        masked = sum(1 for _ in takewhile(lambda label: label == IGNORE, row["labels"]))
        ids = row["input_ids"]
        prompt = ids[: masked or _prefix_length(ids, prompt_tokens, rng, tokenizer.bos_token_id, end_tokens)]
        yield Prompt(tokenizer.decode(prompt, skip_special_tokens=True), prompt)


def _chats(
    rows: Dataset, rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> Iterator[Prompt]:
    """Goes over chats once, in random order; yields the turns before one of the assistant's, of those that have one."""
    for index in rng.permutation(len(rows)):
        values = rows[int(index)]
        turns, answers = conversation(values)
        if answers:
            number = values.get(ROW, int(index) + 1)
            yield _chat(turns[: rng.choice(answers)], values, number, tokenizer, longest, f"row {number}")


def _chat(
    turns: Messages,
    values: dict[str, Any],
    row: int,
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None,
    place: str,
) -> Prompt:
    kept, ids = fit_chat(turns, tokenizer, longest, place, **template_options(values, place))
    return Prompt(tokenizer.decode(ids, skip_special_tokens=True), ids, row, kept)


def _no_chat(longest: int | None) -> str:
    limit = f" whose last turns take at most {longest} tokens" if longest is not None else ""
    return f"prompts: no chat has a turn of the assistant after another's{limit}"


def _prefix_length(
    ids: Sequence[int],
    prompt_tokens: tuple[int, int | None],
    rng: np.random.Generator,
    bos_token_id: int | None,
    end_tokens: Collection[int],
) -> int:
    """The length of a random prefix that leaves a token of the row's first text; 0 if there is none."""
    bos = int(ids[0] == bos_token_id)
    end = next((place for place, token in enumerate(ids) if place >= bos and token in end_tokens), len(ids))
    shortest = max(prompt_tokens[0] + bos, 1)
    longest = end - 1 if prompt_tokens[1] is None else min(prompt_tokens[1] + bos, end - 1)
    return int(rng.integers(shortest, longest + 1)) if shortest <= longest else 0


def read_prompts(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int | None = None,
    *,
    prefix_words: int | None = None,
    prefix_tokens: int | None = None,
) -> list[Prompt]:
    """Reads prompts from the column `prompt` (text or chat messages), `messages` or `text`, or the lines of a .txt.

    Of `messages` that end with an answer of the assistant the prompt is what comes before it. A chat that is too long
    is cut from the left by whole exchanges. Blank rows are left out and counted in a warning.

    Args:
        source: the rows; its `prompt` or `text` names the column.
        tokenizer: the model's tokenizer.
        max_prompt_tokens: the longest prompt that leaves room for the new tokens; None checks nothing.
        prefix_words: keep only the first so many words of each text.
        prefix_tokens: keep only the first so many tokens, the beginning-of-text token not counted.

    Raises:
        UserError: naming file and row, if a row holds no prompt of that kind or too long a one; if no row
            holds a prompt.
    """
    if any(length is not None and length < 1 for length in (prefix_words, prefix_tokens)):
        raise UserError(f"prefix_words={prefix_words} and prefix_tokens={prefix_tokens} must be at least 1")
    dataset = source.read()
    field = _prompt_field(dataset.column_names, source.place)
    prompts = []
    for row, values in filled_rows(dataset, [field], source.place):
        place = f"{source.place} row {row}"
        value = values[field]
        if isinstance(value, list):
            if prefix_words or prefix_tokens:
                raise UserError(f"{place}: a chat cannot be cut to its first words or tokens")
            answered = field == "messages" and value[-1]["role"] == "assistant"
            turns = value[:-1] if answered else value
            prompt = _chat(turns, values, row, tokenizer, max_prompt_tokens, place)
        else:
            prompt = Prompt(*_cut_prompt(value, tokenizer, place, prefix_words, prefix_tokens), row)
        check_room(prompt.ids, max_prompt_tokens, place)
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source.place}: none of its {len(dataset)} rows holds a prompt")
    return prompts


def check_room(ids: Sequence[int], max_prompt_tokens: int | None, place: str) -> None:
    """Raises a UserError if a prompt leaves no room for the new tokens; None leaves any."""
    if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
        room = f"{max_prompt_tokens} leave room in the model's context for the new ones"
        raise UserError(f"{place}: the prompt has {len(ids)} tokens, but at most {room}")


def _prompt_field(columns: Sequence[str], path: str) -> str:
    for field in ("prompt", "messages", "text"):
        if field in columns:
            return field
    raise absent_column(path, "prompt", columns)


def _cut_prompt(
    value: str,
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    words: int | None,
    tokens: int | None,
) -> tuple[str, list[int]]:
    """The text and the ids of a prompt's first `words` words and `tokens` tokens; None keeps all."""
    prompt = _first_words(value, words) if words else value
    ids = encode_prompt(prompt, tokenizer, place)
    if tokens is None:
        return prompt, ids
    ids = ids[: tokens + int(ids[0] == tokenizer.bos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True), ids


def _first_words(text: str, words: int) -> str:
    *_, last = islice(re.finditer(r"\S+", text), words)
    return text[: last.end()]
