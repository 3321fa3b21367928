"""A model behind an OpenAI-compatible server: what is deployed is what is measured."""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jmespath
from transformers import PreTrainedTokenizerBase

from bridle.constraints.reading import without_nulls
from bridle.data import Prompt, read_prompts
from bridle.errors import UserError, prefixed
from bridle.evaluation.completer import Completer
from bridle.evaluation.observations import Observations
from bridle.evaluation.prompt_sets import GenerationOptions, PromptSet
from bridle.utils.http import Endpoint, Reply
from bridle.utils.progress import Progress

FEW = 16  # prompts; a model that draws completes some of them in two ways


@dataclass
class ServedModel(Completer):
    """Completes texts by `POST {url}/completions`, and chats by `POST {url}/chat/completions`.

    Each completion is a request of its own with its own seed, temperature and top-p. What the server adds to them (a
    chat template, top-k, a system prompt, a filter) is part of what is measured. Servers that ignore seeds draw other
    texts each time.

    Attributes:
        url: of the interface, e.g. "http://localhost:8000/v1".
        name: of the model, as the server knows it.
        tokenizer: counts a set's `prompt_tokens`; without one, only whole rows can be prompts.
        api_key_env: environment variable that holds the key; by default no key is sent.
        endpoint: options of `Endpoint`.

    Raises:
        UserError: the URL is malformed, or the key cannot be sent.
    """

    url: str
    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    api_key_env: str | None = None
    seed: int = 0
    show: Callable[[str], None] = field(default=lambda line: None)
    observations: Observations = field(default_factory=Observations)
    endpoint: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._endpoint("completions")

    def read(self, prompts: PromptSet) -> list[Prompt]:
        """Reads the prompts of a set. The server checks their length.

        Raises:
            UserError: as `read_prompts`.
        """
        return read_prompts(prompts.source, self.tokenizer, prefix_tokens=prompts.generation.prompt_tokens)

    def draw(self, prompts: Sequence[Prompt], how: GenerationOptions) -> list[list[str]]:
        """[prompts, samples] completions.

        Raises:
            UserError: the server refuses the key or does not know the model, or gives no completion for some prompt:
                a rate of the others would be biased.
        """
        asked = [(row, sample) for row in range(len(prompts)) for sample in range(how.samples)]
        texts: dict[int, str] = {}
        faults: Counter[str] = Counter()
        with Progress("asking", len(asked), "texts") as progress:
            for is_chat in (False, True):
                indices = [index for index, (row, _) in enumerate(asked) if bool(prompts[row].messages) == is_chat]
                bodies = [self._body(prompts[asked[index][0]], how, asked[index]) for index in indices]
                endpoint = self._endpoint("chat/completions" if is_chat else "completions")
                for place, reply in endpoint.ask(bodies):
                    text, fault = _completion(reply, is_chat)
                    texts[indices[place]] = text
                    faults.update([fault] if fault else [])
                    progress.update()
        if faults:
            reasons = "; ".join(f"{fault} ({count})" for fault, count in faults.most_common(3))
            raise UserError(
                f"{self.url}: gave no completion for {sum(faults.values())} of {len(asked)} requests, and a rate of "
                f"the others would be biased: {reasons}"
            )
        drawn = [[texts[row * how.samples + sample] for sample in range(how.samples)] for row in range(len(prompts))]
        self._check_varied(drawn, how)
        return drawn

    def check_sampling(self, prompts: Sequence[Prompt], how: GenerationOptions) -> None:
        """Draws twice after a few prompts, where `how` draws at random.

        Raises:
            UserError: all pairs are the same, so that the server ignores the temperature; or as `draw`.
        """
        if _is_drawn(how):
            self.draw(prompts[:FEW], replace(how, samples=2))

    def _endpoint(self, path: str) -> Endpoint:
        with prefixed(f"model {self.name}: "):
            return Endpoint(f"{self.url.rstrip('/')}/{path}", self.api_key_env, **self.endpoint)

    def _body(self, prompt: Prompt, how: GenerationOptions, place: tuple[int, int]) -> dict[str, Any]:
        given = {"messages": without_nulls(prompt.messages)} if prompt.messages else {"prompt": prompt.text}
        return {
            "model": self.name,
            **given,
            "max_tokens": how.max_new_tokens,
            "temperature": 0.0 if how.greedy else how.temperature,
            "top_p": how.top_p,
            "seed": zlib.crc32(f"{self.seed}/{place}".encode()) >> 1,  # some servers take 31 bits
        }

    def _check_varied(self, drawn: Sequence[Sequence[str]], how: GenerationOptions) -> None:
        """Refuses samples that are the same for every prompt: `transformers serve` ignores a temperature of models
        whose generation_config.json does not say `do_sample`."""
        if _is_drawn(how) and min(how.samples, len(drawn)) > 1 and all(len(set(texts)) == 1 for texts in drawn):
            raise UserError(
                f"{self.url}: gave the same completion {how.samples} times for every prompt, so it decodes greedily "
                "whatever the temperature; set do_sample in the model's generation_config.json, or measure --greedy"
            )


def _is_drawn(how: GenerationOptions) -> bool:
    """Whether completions come from the whole distribution, or a flatter one."""
    return how.temperature >= 1 and how.top_p == 1 and not how.greedy


def _completion(reply: Reply, is_chat: bool) -> tuple[str, str]:
    """The text of a reply, or "" and why there is none."""
    if reply.fault:
        return "", reply.fault
    text = jmespath.search("choices[0].message.content" if is_chat else "choices[0].text", reply.value)
    return (text, "") if isinstance(text, str) else ("", "no completion in the answer")
