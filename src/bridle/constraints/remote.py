"""A constraint that asks any HTTP scorer, by a small declarative mapping from texts to requests and back to numbers."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from json import dumps
from typing import Any, Literal, TypeVar

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from bridle.constraints.base import Constraint, Score
from bridle.constraints.cache import CacheFile, Outcome, ScoreCache
from bridle.constraints.deadline import batches
from bridle.constraints.mapping import JsonMapping, Scale
from bridle.constraints.options import Text, checked
from bridle.constraints.reading import Given, Messages, Reads
from bridle.errors import UserError
from bridle.utils.http import Endpoint, Reply, same_origin
from bridle.utils.progress import Progress

T = TypeVar("T")

PRESETS: dict[str, dict[str, Any]] = {
    "openai-moderation": {
        "url": "https://api.openai.com/v1/moderations",
        "model": "omni-moderation-latest",
        "body": {"model": "{model}", "input": "{texts}"},
        "api_key_env": "OPENAI_API_KEY",
        "items": "results",
        "score": "values(category_scores)",
        "batch_size": 32,
    },
    "openai-chat": {
        "url": "https://api.openai.com/v1/chat/completions",
        "body": {"model": "{model}", "messages": [{"role": "user", "content": "{prompt}"}], "temperature": 0},
        "score": "choices[0].message.content",
        "api_key_env": "OPENAI_API_KEY",
        "answer": "yes-no",
    },
    "perspective": {
        "url": "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze",
        "body": {"comment": {"text": "{text}"}, "requestedAttributes": {"TOXICITY": {}}, "doNotStore": True},
        "score": "attributeScores.TOXICITY.summaryScore.value",
        "api_key_env": "PERSPECTIVE_API_KEY",
        "api_key_header": "X-Goog-Api-Key",
        "requests_per_minute": 60.0,
    },
}
"""What each preset sets; every key can be set otherwise beside it. The key goes to the preset's own host alone."""

DEFAULTS: dict[str, Any] = {"answer": "number", "batch_size": 1, "api_key_env": None, "api_key_header": "Authorization"}

Outputs = Mapping[str, str | Messages]
"""What is read of outputs, by a text that tells them apart."""


class Remote(Constraint):
    """Scores texts by what an HTTP endpoint answers.

    `body` is sent with its placeholders replaced: "{text}" by a text, "{texts}" by a list of `batch_size` texts,
    "{messages}" by the messages of a chat, "{prompt}" by `prompt` with the text in it, "{model}" by `model`. A
    placeholder is a whole string of its own, and what replaces it is a JSON value; nothing is pasted. `items` and
    `score` are JMESPath expressions: `items` finds the list in the reply that has one entry for each text, in their
    order, and `score` the number in each entry, or the list of numbers of which the one nearest to a violation counts.

    What is not a finite number in `range`, in a list as long as the batch, is missing: nothing else becomes a label.
    A batch that the endpoint refuses is asked again text by text. Labels are kept in a `ScoreCache` as they come,
    by text, body, `model`, `prompt`, `items`, `score`, `answer`, `url` and `version`.

    Args:
        preset: openai-moderation, openai-chat or perspective: sets what is not given; see `PRESETS`.
        url: where requests are posted.
        model: as the endpoint calls it.
        prompt: what a chat model is asked, with {text} in it.
        body: the request.
        items: where the entries are; the reply itself is the only one by default.
        score: where the number is in an entry.
        answer: what stands there: a JSON "number", or text that is one and nothing else; a "boolean"; or "yes-no",
            text that is one of these words and nothing else. True and yes are 1.
        range: the least and greatest possible score.
        violates: whether a "high" or a "low" score means a violation.
        threshold: on the endpoint's scale; a text violates beyond it. The middle of `range` by default.
        batch_size: texts in one request, where the body holds "{texts}".
        version: anything; another version is another scorer to the cache.
        cache: a file for `ScoreCache`; false for none, true for the default one.
        name: how errors and tables call it; the preset or the URL if not given.
        reads: see `Constraint`; a chat is sent as its messages where the body holds "{messages}", else as text.
        api_key_env: environment variable whose key is sent to `url`. Not given, the preset's own key is sent to the
            preset's own host, and none to any other.
        api_key_header, headers, timeout, retries, backoff, concurrency, requests_per_minute:
            as in `bridle.utils.http.Endpoint`.

    Raises:
        UserError: an option is missing or wrong, or holds a key; from `load`, the key that would be sent is not set, or
            the cache cannot be used; from `score`, the endpoint refuses the key or does not know the address.
    """

    type_name = "remote"
    waits = True

    @checked
    def __init__(
        self,
        preset: Literal["openai-moderation", "openai-chat", "perspective"] | None = None,
        url: Text | None = None,
        model: Text | None = None,
        prompt: Text | None = None,
        body: dict[str, Any] | None = None,
        items: Text | None = None,
        score: Text | None = None,
        answer: Literal["number", "boolean", "yes-no"] | None = None,
        range: tuple[float, float] = (0.0, 1.0),
        violates: Literal["high", "low"] = "high",
        threshold: float | None = None,
        batch_size: PositiveInt | None = None,
        version: str | int = "",
        cache: CacheFile = True,
        name: str | None = None,
        reads: Reads = "completion",
        api_key_env: Text | None = None,
        api_key_header: Text | None = None,
        headers: dict[str, str] | None = None,
        timeout: PositiveFloat = 60.0,
        retries: NonNegativeInt = 5,
        backoff: PositiveFloat = 1.0,
        concurrency: PositiveInt = 8,
        requests_per_minute: PositiveFloat | None = None,
    ):
        given = {
            **{"url": url, "model": model, "prompt": prompt, "body": body, "items": items, "score": score},
            **{"answer": answer, "range": range, "violates": violates, "threshold": threshold},
            **{"batch_size": batch_size, "api_key_env": api_key_env, "api_key_header": api_key_header},
            **{"headers": headers, "timeout": timeout, "retries": retries, "backoff": backoff},
            **{"concurrency": concurrency, "requests_per_minute": requests_per_minute},
        }
        try:
            options = _with_preset(preset, given)
            self._endpoint = _build(Endpoint, options)
            self._endpoint.refuse_secrets(options | {"version": version, "name": name})
            self._mapping, self._scale = _build(JsonMapping, options), _build(Scale, options)
            if self._mapping.takes_messages and reads != "chat":
                raise UserError(f"reads: is {reads}, but the body holds '{{messages}}', which needs reads: chat")
        except UserError as error:
            raise UserError(f"constraint 'remote': {error}") from error
        self.preset, self.version, self.reads = preset, version, reads
        self.name, self.cache = name or preset or self._endpoint.url, ScoreCache.of(cache)

    def load(self) -> None:
        """Makes sure that the key is set, where one is needed, and opens the cache.

        Raises:
            UserError: it is not, or the cache cannot be used.
        """
        if self._endpoint.api_key_env and not self._endpoint.has_key:
            raise UserError(
                f"constraint '{self.name}': the environment variable {self._endpoint.api_key_env} is not set; "
                "put the endpoint's key there"
            )
        if self.cache is not None:
            self.cache.check()

    def identity(self) -> dict[str, Any]:
        """What decides the numbers. Range, direction and threshold only say what is made of them."""
        asked = super()._settings() | {"url": self._endpoint.url, "headers": self._endpoint.headers}
        return asked | self._mapping.settings() | {"version": self.version}

    def _settings(self) -> dict[str, Any]:
        own = {"batch_size": self._mapping.batch_size, "api_key_header": self._endpoint.api_key_header}
        optional = {"preset": self.preset, "api_key_env": self._endpoint.api_key_env}
        return self.identity() | self._scale.settings() | own | {k: v for k, v in optional.items() if v is not None}

    def _read(self, prompt: Given, completion: str) -> str | Messages:
        read = super()._read(prompt, completion)
        return read if isinstance(read, str) or self._mapping.takes_messages else self._as_text(read)

    def _score(self, outputs: list[str | Messages]) -> list[Score]:
        keys = [output if isinstance(output, str) else dumps(output, sort_keys=True) for output in outputs]
        distinct, outcomes = dict(zip(keys, outputs, strict=True)), {}
        ask = partial(self._ask, distinct)
        with Progress(f"scoring ({self.name})", len(distinct), unit="texts") as progress:
            found = self.cache.through(self.identity(), distinct, ask) if self.cache else ask(list(distinct))
            for key, outcome in found:
                outcomes[key] = outcome
                progress.update()
        return [self._as_score(outcomes[key]) for key in keys]

    def _as_score(self, outcome: Outcome) -> Score:
        outcome = self._scale.checked(outcome)  # a cached label may come from a time with another range
        return Score.missing(outcome) if isinstance(outcome, str) else self._scale.score(outcome)

    def _ask(self, outputs: Outputs, keys: list[str]) -> Iterator[tuple[str, Outcome]]:
        yield from self._ask_batches(outputs, [*batches(keys, self._mapping.batch_size)])

    def _ask_batches(self, outputs: Outputs, parts: list[Sequence[str]]) -> Iterator[tuple[str, Outcome]]:
        alone: list[Sequence[str]] = []  # a text that the endpoint refuses must not cost the others of its batch
        requests = [self._mapping.request([outputs[key] for key in part]) for part in parts]
        for index, reply in self._endpoint.ask(requests):
            batch = parts[index]
            if reply.is_refused and len(batch) > 1:
                alone += [[key] for key in batch]
            else:
                yield from zip(batch, self._outcomes(reply, len(batch)), strict=True)
        if alone:
            yield from self._ask_batches(outputs, alone)

    def _outcomes(self, reply: Reply, count: int) -> list[Outcome]:
        """Returns [count] labels or reasons; a label out of range becomes a reason, so that it is not cached."""
        found = [reply.fault] * count if reply.fault else self._mapping.read(reply.value, count)
        return [self._scale.checked(outcome) for outcome in found]


def _with_preset(preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that are given, the preset's and the defaults, in this order of precedence."""
    given = {key: value for key, value in given.items() if value is not None}
    options = DEFAULTS | (PRESETS[preset] if preset else {})
    if "url" in given and "url" in options and not same_origin(given["url"], options["url"]):
        options["api_key_env"] = None  # the preset's key is for its own host
    options |= given
    for key in ("url", "body", "score"):
        if key not in options:
            raise UserError(f"{key}: is missing")
    return options


def _build(cls: type[T], options: Mapping[str, Any]) -> T:
    """Builds an object from those of the options that it takes."""
    return cls(**{name: options[name] for name in signature(cls).parameters if name in options})
