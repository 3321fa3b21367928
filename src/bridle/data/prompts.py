"""Prompts to sample from: prefixes of a domain's rows, or a file of prompts."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bridle.core.tokens import IGNORE
from bridle.data.encoding import encode_prompt
from bridle.data.rows import Messages, absent_column, filled_rows
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
) -> list[list[int]]:
    """Draws `n` prompts from the rows of a tokenised domain.

    A row that begins with masked labels (-100) gives those tokens: its prompt. Any other row gives a prefix whose
    length, beyond the beginning-of-text token, is uniform over `prompt_tokens`, both ends included, as far as a token
    of its first text is left over to predict. A longest length of None takes prefixes from any depth of the row. Rows
    that are too short for that, or whose prompt is too long, are passed over. Rows are drawn without replacement until
    all have been, then again.

    Args:
        tokenized: rows with `input_ids` and `labels`; a packed row may begin in the middle of a text.
        n: how many prompts.
        prompt_tokens: the shortest and the longest prefix.
        seed: fixes rows and lengths.
        tokenizer: for the ids of its beginning-of-text and end-of-text tokens.
        end_tokens: further tokens that end a text.
        max_prompt_tokens: the longest prompt that leaves room for the new tokens.

    Returns:
        `n` lists of token ids, none of them empty.

    Raises:
        UserError: if `prompt_tokens` is no range, or no row has such a prompt.
    """
    shortest, longest = prompt_tokens
    if shortest < 0 or (longest is not None and longest < shortest):
        raise UserError(f"prompt_tokens: {prompt_tokens} must be two lengths, the shorter first")
    rng = np.random.default_rng(seed)
    ends = {tokenizer.eos_token_id, *end_tokens}
    prompts: list[list[int]] = []
    while len(prompts) < n:
        passed = _pass_over(tokenized, prompt_tokens, rng, tokenizer.bos_token_id, ends)
        fitting = (ids for ids in passed if ids and (max_prompt_tokens is None or len(ids) <= max_prompt_tokens))
        drawn = list(islice(fitting, n - len(prompts)))
        if not drawn:
            reach = f"{shortest} or more" if longest is None else f"{shortest} to {longest}"
            limit = f", or none of at most {max_prompt_tokens}" if max_prompt_tokens is not None else ""
            raise UserError(f"prompt_tokens: no row holds a prompt of {reach} tokens{limit}")
        prompts += drawn
    return prompts


def _pass_over(
    tokenized: Dataset,
    prompt_tokens: tuple[int, int | None],
    rng: np.random.Generator,
    bos_token_id: int | None,
    end_tokens: Collection[int],
) -> Iterator[list[int]]:
    """Goes over the rows once, in random order; yields the prompt of each, empty if it has none."""
    for index in rng.permutation(len(tokenized)):
        row = tokenized[int(index)]
        masked = sum(1 for _ in takewhile(lambda label: label == IGNORE, row["labels"]))
        ids = row["input_ids"]
        yield ids[: masked or _prefix_length(ids, prompt_tokens, rng, bos_token_id, end_tokens)]


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
    """Reads prompts from the column `prompt` (text or chat messages), else `text`, or the lines of a .txt.

    Blank rows are left out and counted in a warning.

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
    field = _prompt_field(dataset.column_names, source.path)
    prompts = []
    for row, values in filled_rows(dataset, [field], source.path):
        place = f"{source.path} row {row}"
        text, ids = _cut_prompt(values[field], tokenizer, place, prefix_words, prefix_tokens)
        check_room(ids, max_prompt_tokens, place)
        prompts.append(Prompt(text, ids, row, values[field] if isinstance(values[field], list) else None))
    if not prompts:
        raise UserError(f"{source.path}: none of its {len(dataset)} rows holds a prompt")
    return prompts


def check_room(ids: Sequence[int], max_prompt_tokens: int | None, place: str) -> None:
    """Raises a UserError if a prompt leaves no room for the new tokens; None leaves any."""
    if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
        room = f"{max_prompt_tokens} leave room in the model's context for the new ones"
        raise UserError(f"{place}: the prompt has {len(ids)} tokens, but at most {room}")


def _prompt_field(columns: Sequence[str], path: str) -> str:
    for field in ("prompt", "text"):
        if field in columns:
            return field
    raise absent_column(path, "prompt", columns)


def _cut_prompt(
    value: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    words: int | None,
    tokens: int | None,
) -> tuple[str, list[int]]:
    """The text and the ids of a prompt's first `words` words and `tokens` tokens; None keeps all."""
    if isinstance(value, list) and (words or tokens):
        raise UserError(f"{place}: a chat cannot be cut to its first words or tokens")
    prompt = _first_words(value, words) if isinstance(value, str) and words else value
    ids = encode_prompt(prompt, tokenizer, place)
    if isinstance(prompt, str) and tokens is None:
        return prompt, ids
    if tokens is not None:
        ids = ids[: tokens + int(ids[0] == tokenizer.bos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True), ids


def _first_words(text: str, words: int) -> str:
    *_, last = islice(re.finditer(r"\S+", text), words)
    return text[: last.end()]
