"""Prompts to sample from: prefixes of a domain's rows, the turns before an assistant's turn, or a file of prompts."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bridle.constraints.reading import Messages, as_lines, text_of
from bridle.core.tokens import IGNORE
from bridle.data.encoding import decode_parts, encode_prompt, fit_chat, template_options
from bridle.data.readers import ROW
from bridle.data.rows import absent_column, conversation, filled_rows, holds_chats
from bridle.data.source import DataSource
from bridle.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        text: decoded, without special tokens.
        ids: its tokens, with the beginning-of-text token where the tokenizer adds one; none where a server reads it.
        row: the row of the file that it came from, 1-based.
        messages: the turns of a chat; None for a text.
        rest: the tokens that follow in a row of the corpus: the rest of the text, or the assistant's turn.
    """

    text: str
    ids: list[int]
    row: int = 1
    messages: Messages | None = None
    rest: list[int] = field(default_factory=list)

    @property
    def given(self) -> str | Messages:
        """As a constraint reads it: a chat or a text."""
        return self.messages or self.text


def prompts_from_domain(
    tokenized: Dataset,
    n: int,
    *,
    prompt_tokens: tuple[int, int | None],
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Collection[int] = (),
    end_of_turn: int | None = None,
    max_prompt_tokens: int | None = None,
) -> list[Prompt]:
    """Draws `n` prompts from the rows of a domain, without replacement until all rows have been drawn, then again.

    The prompt of a chat is all turns before one of the assistant's, all equally likely, or all turns of a prompt alone.
    That of a tokenised row that begins with masked labels (-100) is those tokens. Any other row gives a prefix whose
    length, beyond the beginning-of-text token, is uniform over `prompt_tokens`, both ends included, as far as a token
    of its first text is left to predict. Rows that are too short, or whose prompt is too long, are skipped.

    Args:
        tokenized: rows with `input_ids` and `labels`, packed or not; or chats, as they were read.
        prompt_tokens: the shortest and the longest prefix; None for the longest takes any.
        seed: of rows and lengths.
        end_tokens: that end a text, beside the tokenizer's.
        end_of_turn: the token that ends an assistant's turn, the last of what follows a chat's prompt; None for none.
        max_prompt_tokens: the longest prompt that leaves room for the new tokens.

    Raises:
        UserError: `prompt_tokens` is not a range, or no row has such a prompt.
    """
    shortest, longest = prompt_tokens
    if shortest < 0 or (longest is not None and longest < shortest):
        raise UserError(f"prompt_tokens: {prompt_tokens} must be two lengths, the shorter first")
    rng, chats = np.random.default_rng(seed), holds_chats(tokenized)
    ends = {tokenizer.eos_token_id, *end_tokens}

    def prompt_of(index: int) -> Prompt | None:
        row = tokenized[index]
        if chats:
            return _drawn_chat(row, row.get(ROW, index + 1), rng, tokenizer, max_prompt_tokens, end_of_turn)
        masked = sum(1 for _ in takewhile(lambda label: label == IGNORE, row["labels"]))
        ids = row["input_ids"][: masked or _prefix_length(row["input_ids"], prompt_tokens, rng, tokenizer, ends)]
        rest = _until_end(row["input_ids"][len(ids) :], ends)
        return Prompt(tokenizer.decode(ids, skip_special_tokens=True), ids, rest=rest)

    prompts: list[Prompt] = []
    while len(prompts) < n:
        found = (prompt_of(int(index)) for index in rng.permutation(len(tokenized)))
        fitting = (prompt for prompt in found if prompt and prompt.ids and _fits(prompt.ids, max_prompt_tokens))
        drawn = list(islice(fitting, n - len(prompts)))
        if not drawn:
            raise UserError(_no_prompt(chats, prompt_tokens, max_prompt_tokens))
        prompts += drawn
    return prompts


def _no_prompt(chats: bool, prompt_tokens: tuple[int, int | None], most: int | None) -> str:
    if chats:
        limit = f" that fit in {most} tokens" if most is not None else ""
        return f"no chat has a turn of the assistant after other turns{limit}; add answers, or give `prompts`"
    shortest, longest = prompt_tokens
    reach = f"{shortest} or more" if longest is None else f"{shortest} to {longest}"
    limit = f", or none of at most {most}" if most is not None else ""
    return f"prompt_tokens: no row, cut at max_length, holds a prompt of {reach} tokens{limit}"


def _prefix_length(
    ids: Sequence[int],
    prompt_tokens: tuple[int, int | None],
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Collection[int],
) -> int:
    """The length of a random prefix that leaves a token of the row's first text; 0 if there is none."""
    bos = int(ids[0] == tokenizer.bos_token_id)
    end = next((place for place, token in enumerate(ids) if place >= bos and token in end_tokens), len(ids))
    shortest = max(prompt_tokens[0] + bos, 1)
    longest = end - 1 if prompt_tokens[1] is None else min(prompt_tokens[1] + bos, end - 1)
    return int(rng.integers(shortest, longest + 1)) if shortest <= longest else 0


def _until_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens up to the first that ends an output, which is the last of them."""
    end = next((place for place, token in enumerate(ids, 1) if token in ends), len(ids))
    return list(ids[:end])


def _drawn_chat(
    values: dict[str, Any],
    number: int,
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None,
    end_of_turn: int | None,
) -> Prompt | None:
    """The turns before a random one of the assistant's; None if the chat has none."""
    turns, answers = conversation(values)
    if not answers:
        return None
    chosen = rng.choice(answers)
    prompt = chat_prompt(turns[:chosen], values, number, tokenizer, longest, f"row {number}")
    said = text_of(turns[chosen].get("content")) if chosen < len(turns) else ""
    answer = tokenizer(said, add_special_tokens=False)["input_ids"]
    end = [end_of_turn] if answer and end_of_turn is not None else []
    return replace(prompt, rest=answer + end)


def chat_prompt(
    turns: Messages,
    values: dict[str, Any],
    row: int,
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None,
    place: str,
) -> Prompt:
    """The prompt that the turns of a chat make, by the tokenizer's template and the options of its row.

    A chat of more than `longest` tokens loses whole exchanges from its beginning. Errors begin with `place`.
    """
    kept, ids = fit_chat(turns, tokenizer, longest, place, **template_options(values, place))
    return Prompt(tokenizer.decode(ids, skip_special_tokens=True), ids, row, kept)


def _unread_chat(turns: Messages, values: dict[str, Any], row: int, place: str) -> Prompt:
    """A chat that its model puts into a template itself."""
    if options := template_options(values, place):
        raise UserError(f"{place}: {', '.join(options)}: a server sets the options of its chat template itself")
    return Prompt(as_lines(turns), [], row, turns)


def read_prompts(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase | None,
    max_prompt_tokens: int | None = None,
    *,
    prefix_tokens: int | None = None,
) -> list[Prompt]:
    """Reads prompts from the column `prompt` (text or chat), `messages` or `text`, or the lines of a .txt.

    The prompt of `messages` that end with an assistant's turn is what precedes that turn. A chat that is too long loses
    whole exchanges from its beginning. Blank rows are left out with a warning.

    Args:
        source: its `prompt` or `text` names the column.
        tokenizer: None for a model that reads texts and chats itself; the prompts then have no `ids`.
        max_prompt_tokens: the longest prompt that leaves room for the new tokens; None checks nothing.
        prefix_tokens: keep only the first tokens of each text, the beginning-of-text token not counted.

    Raises:
        UserError: a row holds no such prompt or one that is too long, named by file and row; or no row holds a prompt.
    """
    if prefix_tokens is not None and prefix_tokens < 1:
        raise UserError(f"prefix_tokens={prefix_tokens} must be at least 1")
    dataset = source.read()
    field = next((field for field in ("prompt", "messages", "text") if field in dataset.column_names), None)
    if field is None:
        raise absent_column(source.place, "prompt", dataset.column_names)
    prompts = []
    for row, values in filled_rows(dataset, [field], source.place):
        place, value = f"{source.place} row {row}", values[field]
        if isinstance(value, str):
            prompt = Prompt(*_cut_prompt(value, tokenizer, place, prefix_tokens), row)
        elif prefix_tokens is not None:
            raise UserError(f"{place}: a chat cannot be cut to its first tokens")
        else:
            answered = field == "messages" and value[-1]["role"] == "assistant"
            turns = value[:-1] if answered else value
            if not turns:
                raise UserError(f"{place}: the chat has no turn before the assistant's; leave the row out")
            prompt = (
                chat_prompt(turns, values, row, tokenizer, max_prompt_tokens, place)
                if tokenizer is not None
                else _unread_chat(turns, values, row, place)
            )
        check_room(prompt.ids, max_prompt_tokens, place)
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source.place}: none of its {len(dataset)} rows holds a prompt")
    return prompts


def check_room(ids: Sequence[int], max_prompt_tokens: int | None, place: str) -> None:
    """Raises a UserError if a prompt leaves no room for the new tokens."""
    if not _fits(ids, max_prompt_tokens):
        room = f"{max_prompt_tokens} leave room in the model's context for the new ones"
        raise UserError(f"{place}: the prompt has {len(ids)} tokens, but at most {room}")


def _fits(ids: Sequence[int], most: int | None) -> bool:
    return most is None or len(ids) <= most


def _cut_prompt(
    value: str, tokenizer: PreTrainedTokenizerBase | None, place: str, tokens: int | None
) -> tuple[str, list[int]]:
    """The text and the ids of a prompt's first `tokens` tokens; None keeps all."""
    if tokenizer is None:
        if tokens is not None:
            raise UserError(
                f"{place}: its first {tokens} tokens are the prompt, which needs a tokenizer; name one with --tokenizer"
            )
        return value, []
    ids = encode_prompt(value, tokenizer, place)
    if tokens is None:
        return value, ids
    end = tokens + int(ids[0] == tokenizer.bos_token_id)
    text, _ = decode_parts(ids[:end], ids[end:], tokenizer)  # a character that is cut belongs to what follows
    return text, ids[:end]
