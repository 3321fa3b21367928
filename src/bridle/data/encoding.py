"""Texts, completions and chats as token ids, exactly as TRL's `SFTTrainer` prepares them."""

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

from bridle.constraints.reading import Messages, without_nulls
from bridle.core.tokens import IGNORE
from bridle.data.readers import whole_text
from bridle.data.rows import TEMPLATE_COLUMNS
from bridle.errors import UserError, first_line

SYSTEM = ("system", "developer")  # roles of the turns that `fit_chat` never cuts

Encoded = tuple[list[int], list[int]]  # `input_ids` and `labels` of one row, of the same length


RESERVED = {
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_assistant_tokens_mask",
    "chat_template",
}
"""Options of `apply_chat_template` that a row cannot set."""


class RowEncoder:
    """Turns rows into ids and labels, as `tokenize_fn` and `build_labels` do in TRL's `SFTTrainer`.

    One difference: a text that spells out the beginning-of-text token gets it once, not twice.

    Args:
        assistant_only: learn only the assistant's turns of a chat.
        completion_only: learn a completion and not its prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool = False, completion_only: bool = True):
        self.tokenizer, self.assistant_only, self.completion_only = tokenizer, assistant_only, completion_only

    def encode(self, values: dict[str, Any], place: str) -> Encoded:
        """Encodes one row: {"text"}, {"messages"} or {"prompt", "completion"}; tokens not learnt have the label -100.

        Raises:
            UserError: beginning with `place`: the tokenizer or its chat template refuses the row.
        """
        options = template_options(values, place)
        if "completion" in values:
            return self._completion(values["prompt"], values["completion"], place, options)
        if "text" in values:
            return self._tokenize(self._ended(values["text"]), place)
        return self._tokenize(values["messages"], place, **options)

    def _completion(self, prompt: Any, completion: Any, place: str, options: dict[str, Any]) -> Encoded:
        if type(prompt) is not type(completion):
            raise UserError(f"{place}: prompt and completion must both be text or both be chat messages")
        whole = prompt + (self._ended(completion) if isinstance(completion, str) else completion)
        ids, labels = self._tokenize(whole, place, **options)
        if not self.completion_only:
            return ids, labels
        prompt_ids, _ = self._tokenize(prompt, place, add_generation_prompt=True, **options)
        # Tokens may merge across the border, so the completion starts where the two tokenisations differ.
        start = common_prefix_length(prompt_ids, ids)
        return ids, [IGNORE] * start + labels[start:]

    def _tokenize(self, value: str | Messages, place: str, **options: Any) -> Encoded:
        if isinstance(value, str):
            ids = labels = self.tokenizer(value, verbose=False)["input_ids"]  # is cut to max_length later
        else:
            ids, labels = self._chat(value, place, **options)
        start = surplus_bos(ids, self.tokenizer)
        return ids[start:], labels[start:]

    def _chat(self, messages: Messages, place: str, **options: Any) -> Encoded:
        options |= {"chat_template": self._template, "return_assistant_tokens_mask": self.assistant_only}
        output = render_chat(messages, self.tokenizer, place, **options)
        ids = output["input_ids"]
        learnt = output.get("assistant_masks", [1] * len(ids))
        return ids, [token if kept else IGNORE for token, kept in zip(ids, learnt, strict=True)]

    @cached_property
    def _template(self) -> str | None:
        """TRL's template with marked assistant turns, where needed; None for the tokenizer's own."""
        own = self.tokenizer.chat_template
        if not self.assistant_only or own is None or has_generation_markers(own):
            return None
        try:
            marked: str | None = get_training_chat_template(self.tokenizer)
        except ValueError as error:
            raise UserError("assistant_only_loss: needs a chat template with {% generation %} markers") from error
        return marked

    def _ended(self, text: str) -> str:
        end = self.tokenizer.eos_token
        if end is None:
            raise UserError("the tokenizer names no end-of-text token; set its eos_token")
        return text if text.endswith(end) else text + end


def encode_prompt(
    prompt: str | Messages, tokenizer: PreTrainedTokenizerBase, place: str = "prompt", **template: Any
) -> list[int]:
    """The tokens of a prompt: at most one beginning-of-text token, and no end-of-text token after a text.

    A chat gets the template's opening of an assistant's turn, unless it ends with such a turn, which is then continued.
    `template` holds further options of the chat template.

    Raises:
        UserError: beginning with `place`: there is nothing to encode, or no template for a chat.
    """
    if isinstance(prompt, str):
        ids = tokenizer(whole_text(prompt), verbose=False)["input_ids"]
        while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    else:
        open_turn = prompt[-1]["role"] == "assistant"
        options = {"add_generation_prompt": not open_turn, "continue_final_message": open_turn}
        ids = render_chat(prompt, tokenizer, place, **options, **template)["input_ids"]
    if not ids:
        raise UserError(f"{place}: the prompt is empty; give at least one token to continue")
    return list(ids[surplus_bos(ids, tokenizer) :])


def fit_chat(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, longest: int | None, place: str, **template: Any
) -> tuple[Messages, list[int]]:
    """The turns and the tokens of a chat cut to at most `longest` tokens, if its last exchange fits.

    Whole exchanges are cut from the beginning; system turns stay.
    """
    system = list(takewhile(lambda turn: turn["role"] in SYSTEM, messages))
    rest = messages[len(system) :]
    for start in [0, *(n for n, turn in enumerate(rest) if n and turn["role"] == "user")]:
        kept = system + rest[start:]
        ids = encode_prompt(kept, tokenizer, place, **template)
        if longest is None or len(ids) <= longest:
            break
    return kept, ids


def template_options(values: dict[str, Any], place: str) -> dict[str, Any]:
    """A row's options of the chat template, from the columns `tools` and `chat_template_kwargs`, as in TRL.

    Raises:
        UserError: beginning with `place`: they are not a list of tools or not a mapping.
    """
    tools, options = (_from_json(values.get(column)) for column in TEMPLATE_COLUMNS)
    if not isinstance(tools, list | None):
        raise UserError(f"{place}: column 'tools' holds no list of tools; see chat templates in transformers")
    if not isinstance(options, dict | None):
        raise UserError(
            f"{place}: column 'chat_template_kwargs' holds no mapping, such as {{\"enable_thinking\": false}}"
        )
    if taken := sorted(RESERVED.intersection(options or {})):
        raise UserError(f"{place}: chat_template_kwargs: Bridle sets {taken[0]} itself; leave it out")
    return ({"tools": tools} if tools else {}) | (options or {})


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def decode_parts(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    skip_special_tokens: bool = True,
) -> tuple[str, str]:
    """The texts of a prompt and its completion, which together are what a reader sees.

    A completion decoded alone can lose its leading space, as with SentencePiece. A character whose bytes are split
    between the two belongs to the completion.
    """
    before = tokenizer.decode([*prompt_ids], skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode([*prompt_ids, *completion_ids], skip_special_tokens=skip_special_tokens)
    border = common_prefix_length(before, whole)
    return whole[:border], whole[border:]


def encode_completion(text: str, prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that continues a prompt, such that `decode_parts` returns the text again.

    SentencePiece adds a space before a text's first word, so the text is also encoded after a character that merges
    with nothing. If no way returns the text, as with unknown characters, the tokenizer's own encoding is used.
    """
    alone: list[int] = _ids(text, tokenizer)
    for anchor in ("", "\n", "."):
        start, ids = _ids(anchor, tokenizer), _ids(anchor + text, tokenizer)
        if ids[: len(start)] == start and decode_parts(prompt_ids, ids[len(start) :], tokenizer)[1] == text:
            return ids[len(start) :]
    return alone


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def render_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, place: str, **options: Any) -> dict[str, Any]:
    """Applies the tokenizer's chat template; raises a UserError that begins with `place` if it refuses the chat."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{place}: chat messages need a chat template, and the tokenizer has none; a recipe names one by "
            "chat_template_path"
        )
    # Columns of Parquet and Arrow give every turn all keys, but templates ask which of them a turn has.
    turns = without_nulls(messages)
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{place}: the chat template refuses these messages: {first_line(error)}") from error
    return dict(rendered)


def surplus_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many surplus beginning-of-text tokens `ids` starts with."""
    leading = sum(1 for _ in takewhile(lambda token: token == tokenizer.bos_token_id, ids))
    return max(leading - 1, 0)
