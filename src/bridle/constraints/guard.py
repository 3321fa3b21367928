"""A constraint that is a generative guard: a language model whose answer begins with its verdict."""

import logging
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from transformers import AutoModelForCausalLM

from bridle.constraints.base import Score
from bridle.constraints.network import Network, without_surrogates
from bridle.constraints.options import Probability, Text, checked
from bridle.constraints.reading import Messages, Reads, as_lines, text_of
from bridle.errors import UserError

LEAST_MASS = 0.5
"""Of the next token, on the verdicts together; below it the guard would answer something else."""

MARKS = "kettle", "umbrella"
"""What a user and an assistant say in a conversation that shows how a template takes texts."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """How the guards of a family answer.

    Attributes:
        answer: what precedes the verdict in the answer.
        complies, violates: the verdicts.
        between: a third verdict, "controversial".
        has_guideline: whether the chat template needs a policy in words.
        opens_answer: whether the chat template needs `add_generation_prompt`.
    """

    answer: str
    complies: str
    violates: str
    between: str | None = None
    has_guideline: bool = False
    opens_answer: bool = True


FAMILIES = {
    "llama-guard": Family("\n\n", "safe", "unsafe"),
    "qwen3guard": Family("Safety:", " Safe", " Unsafe", between=" Controversial"),
    "shieldgemma": Family("", "No", "Yes", has_guideline=True, opens_answer=False),
}


class Guard(Network):
    """Scores a text by the probability of "unsafe" as the next token of a guard, without generating.

    The guard's own chat template writes the conversation and its policy. P is the softmax of the logits over the first
    tokens of the verdicts. A conversation of more tokens than the guard takes is missing.

    Args:
        model: a folder written by `save_pretrained`, or a name on the hub; loaded at the first use.
        family: "llama-guard", "qwen3guard" (the generative ones) or "shieldgemma": its template and verdicts.
        guideline: the policy in words, which ShieldGemma's template needs and no other takes.
        controversial: what Qwen3Guard's third verdict means: "violates" (the default) or "complies".
        answer: what the guard writes before its verdict, where it is not the family's; "" for Llama Guard 1 and 2,
            whose templates end with the line feeds.
        threshold: a text violates if P > threshold.
        batch_size: most conversations in one forward pass; halved if memory runs out.
        device: e.g. "cpu" or "cuda:1"; a GPU by default if there is one.
        name: the folder by default.
        reads: "chat" judges the completion as the assistant's answer to the prompt; turns of a system or a tool are
            left out. What is not a chat, and a completion without a prompt, is judged as a user's message.
        timeout: seconds for a batch, whose texts are missing after that.

    Raises:
        UserError: an option is not for the family; from `load` and `score`: there is no such model, it has no chat
            template or its template refuses the messages, or the verdicts begin with the same token.
    """

    type_name, takes_messages = "guard", True
    auto_class = AutoModelForCausalLM
    setting_names = ("family", "guideline", "controversial", "answer", "threshold")
    forward_options: ClassVar[dict[str, Any]] = {"logits_to_keep": 1}

    @checked
    def __init__(
        self,
        model: str | Path,
        family: Literal["llama-guard", "qwen3guard", "shieldgemma"],
        guideline: Text | None = None,
        controversial: Literal["violates", "complies"] | None = None,
        answer: str | None = None,
        threshold: Probability = 0.5,
        batch_size: PositiveInt = 16,
        device: str | None = None,
        name: str | None = None,
        reads: Reads = "chat",
        timeout: PositiveFloat = 600.0,
    ):
        own = FAMILIES[family]
        if own.has_guideline != (guideline is not None):
            what = "is missing; say what the policy forbids" if own.has_guideline else f"is not for {family}"
            raise UserError(f"constraint 'guard', key 'guideline': {what}")
        if controversial is not None and own.between is None:
            raise UserError(f"constraint 'guard', key 'controversial': {family} has no such verdict; leave it out")
        self._set_common(model, device, batch_size, timeout, name or Path(model).name, reads)
        self.family, self.guideline, self.threshold = family, guideline, threshold
        self.controversial = controversial or ("violates" if own.between else None)
        self.answer = own.answer if answer is None else answer
        self._warned = self._in_parts = False

    def _prepare(self, where: str, network: Any) -> None:
        if self._tokenizer.chat_template is None:
            raise UserError(f"{where}: has no chat template, by which a guard reads a conversation")
        self._in_parts = not self._writes_all()
        if self._in_parts and not self._writes_all():
            raise UserError(f"{where}: its chat template leaves out what is said, as text and in parts")
        own = FAMILIES[self.family]
        verdicts = [own.violates, own.complies, *filter(None, [own.between])]
        written = self._prompt("a")
        rows = [self._tokenizer(written + verdict)["input_ids"] for verdict in verdicts]
        same, first = next((n, ids) for n, ids in enumerate(zip_longest(*rows)) if len(set(ids)) > 1)
        if len(set(first)) < len(verdicts) or None in first:
            raise UserError(f"{where}: its verdicts {', '.join(verdicts)} do not begin with tokens of their own")
        self._verdict_ids = list(first)
        self._ends_with = own.violates, len(rows[0]) - same
        self._violating = [True, False, self.controversial == "violates"][: len(verdicts)]

    def _writes_all(self) -> bool:
        """Whether the template writes what both speakers say. Some write nothing of a text, and take it in parts."""
        roles = ("user", "assistant")
        written = self._prompt([{"role": role, "content": said} for role, said in zip(roles, MARKS, strict=True)])
        return all(said in written for said in MARKS)

    def _as_text(self, messages: Messages) -> str:
        return as_lines(messages)  # the template is the policy, into which they are written

    def _prompt(self, output: str | Messages) -> str:
        """Returns the conversation as the guard reads it, up to its verdict."""
        messages = [{"role": "user", "content": output}] if isinstance(output, str) else _turns(output)
        if len(messages) == 1:  # templates take a user's turn first
            messages = [{**messages[0], "role": "user"}]
        if self._in_parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        own = FAMILIES[self.family]
        options = {"add_generation_prompt": True} if own.opens_answer else {}
        guideline = {"guideline": self.guideline} if own.has_guideline else {}
        return self._written(messages, **options, **guideline) + self.answer

    def _score(self, outputs: list[str | Messages]) -> list[Score]:
        self.load()
        verdict, length = self._ends_with  # the tokens before a verdict may depend on it
        texts = [without_surrogates(self._prompt(output)) + verdict for output in outputs]
        rows = [ids[:-length] for ids in self._tokenizer(texts, padding=False, verbose=False)["input_ids"]]
        fits = [len(row) <= self._limit for row in rows]
        columns = {
            "input_ids": [row if fit else [] for row, fit in zip(rows, fits, strict=True)],
            "attention_mask": [[1] * len(row) for row in rows],
        }
        long = Score.missing(f"the conversation has more than the {self._limit:g} tokens that the guard takes")
        return [score or long for score in self._score_rows(columns)]

    def _degree(self, logits: Tensor) -> Tensor:
        last = logits[:, -1]
        verdicts = last[:, self._verdict_ids]
        mass = float((verdicts.logsumexp(-1) - last.logsumexp(-1)).exp().min())
        if mass < LEAST_MASS and not self._warned:
            self._warned = True
            logger.warning(
                "constraint '%s': the guard's verdicts have a probability of only %.2g together where one is due; "
                "check family and answer",
                *(self.name, mass),
            )
        return verdicts.softmax(-1)[:, torch.tensor(self._violating)].sum(-1)

    def _as_score(self, degree: float) -> Score:
        return Score(max(0.0, 1.0 - degree), not degree > self.threshold)


def _turns(messages: Messages) -> Messages:
    """The turns of user and assistant, which alternate in a guard's template: several in a row become one."""
    said = [message for message in messages if message.get("role") in ("user", "assistant")]
    speakers = groupby(said, key=lambda message: message["role"])
    return [
        {"role": role, "content": "\n\n".join(text_of(one.get("content")) for one in turns)} for role, turns in speakers
    ]
