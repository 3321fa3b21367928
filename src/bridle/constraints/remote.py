"""A constraint that asks an HTTP scorer, by a declarative mapping of texts to requests and of replies to numbers."""

import logging
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
from bridle.constraints.reading import Messages, Reads
from bridle.errors import UserError, prefixed
from bridle.utils.http import Endpoint, Reply, same_origin
from bridle.utils.progress import Progress

logger = logging.getLogger(__name__)

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
"""The options of each preset, which given ones replace. Its API key goes to its own host alone."""

ENDS = {
    "perspective": "Perspective's service ends on 31 December 2026; its successors here are preset: openai-moderation, "
    "and models on this machine: type: guard, classifier or nli"
}
"""What is said of presets whose service ends."""

DEFAULTS: dict[str, Any] = {"answer": "number", "batch_size": 1, "api_key_env": None, "api_key_header": "Authorization"}

Outputs = Mapping[str, str | Messages]
"""What is read of outputs, by a text that identifies it."""


class Remote(Constraint):
    """Scores texts by the answers of an HTTP endpoint.

    In `body`, placeholders are replaced: "{text}" by a text, "{texts}" by a list of `batch_size` texts, "{messages}" by
    the messages of a chat, "{prompt}" by `prompt` with the text in it, "{model}" by `model`. A placeholder is a whole
    string, and a JSON value replaces it. `items` and `score` are JMESPath expressions: `items` finds the list in the
    reply with one entry for each text, in order, and `score` the number in an entry, or a list of numbers of which the
    one nearest to a violation counts.

    Anything but a finite number in `range`, in a list as long as the batch, is missing. A batch that the endpoint
    refuses is sent again text by text. Labels are stored in a `ScoreCache` as they arrive, by text, body, `model`,
    `prompt`, `items`, `score`, `answer`, `url` and `version`.

    Args:
        preset: openai-moderation, openai-chat or perspective: sets what is not given; see `PRESETS`.
        url: where requests are posted.
        model: the endpoint's name for it.
        prompt: of a chat model, with {text} in it.
        body: the request.
        items: finds the entries; by default the reply is the only one.
        score: finds the number in an entry.
        answer: its form: a "number" or text that is one and nothing else; a "boolean"; or "yes-no", text that is one of
            these words and nothing else. True and yes are 1.
        range: the least and the greatest possible score.
        violates: whether a "high" or a "low" score means a violation.
        threshold: on the endpoint's scale; a text violates beyond it. The middle of `range` by default.
        batch_size: texts in one request, if the body holds "{texts}".
        version: any value; the cache treats each version as another scorer.
        cache: a file for `ScoreCache`; true for the default one, false for none.
        name: the preset or the URL by default.
        reads: see `Constraint`; a chat is sent as messages if the body holds "{messages}", else as text.
        api_key_env: environment variable whose key is sent to `url`. By default the preset's key is sent to the
            preset's host, and no key to any other.
        api_key_header, headers, timeout, retries, backoff, concurrency, requests_per_minute:
            as in `bridle.utils.http.Endpoint`.

    Raises:
        UserError: an option is missing or wrong, or holds a key; from `load`, the key is not set, or the cache cannot
            be used; from `score`, the endpoint refuses the key or does not know the address.
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
        with prefixed("constraint 'remote': "):
            options = _with_preset(preset, given)
            self._endpoint = _build(Endpoint, options)
            self._endpoint.refuse_secrets(options | {"version": version, "name": name})
            self._mapping, self._scale = _build(JsonMapping, options), _build(Scale, options)
            self.takes_messages = self._mapping.takes_messages
            if self.takes_messages and reads != "chat":
                raise UserError(f"reads: is {reads}, but the body holds '{{messages}}', which needs reads: chat")
        self.preset, self.version, self.reads = preset, version, reads
        self.name, self.cache = name or preset or self._endpoint.url, ScoreCache.of(cache)

    def load(self) -> None:
        """Checks the key and opens the cache.

        Raises:
            UserError: the key is not set, or the cache cannot be used.
        """
        if self._endpoint.api_key_env and not self._endpoint.has_key:
            raise UserError(
                f"constraint '{self.name}': the environment variable {self._endpoint.api_key_env} is not set; "
                "put the endpoint's key there"
            )
        if self.preset in ENDS:
            logger.warning("constraint '%s': %s", self.name, ENDS[self.preset])
        if self.cache is not None:
            self.cache.check()

    def identity(self) -> dict[str, Any]:
        return self._scorer() | self._scale.settings()

    def _scorer(self) -> dict[str, Any]:
        """Returns what decides the endpoint's numbers; range, direction and threshold only interpret them."""
        asked = super()._settings() | {"url": self._endpoint.url, "headers": self._endpoint.headers}
        return asked | self._mapping.settings() | {"version": self.version}

    def _settings(self) -> dict[str, Any]:
        own = {"batch_size": self._mapping.batch_size, "api_key_header": self._endpoint.api_key_header}
        optional = {"preset": self.preset, "api_key_env": self._endpoint.api_key_env}
        return self.identity() | own | {k: v for k, v in optional.items() if v is not None}

    def _score(self, outputs: list[str | Messages]) -> list[Score]:
        keys = [output if isinstance(output, str) else dumps(output, sort_keys=True) for output in outputs]
        distinct, outcomes = dict(zip(keys, outputs, strict=True)), {}
        ask = partial(self._ask, distinct)
        with Progress(f"scoring ({self.name})", len(distinct), unit="texts") as progress:
            found = self.cache.through(self._scorer(), distinct, ask) if self.cache else ask(list(distinct))
            for key, outcome in found:
                outcomes[key] = outcome
                progress.update()
        return [self._as_score(outcomes[key]) for key in keys]

    def _as_score(self, outcome: Outcome) -> Score:
        outcome = self._scale.checked(outcome)  # a cached label may come from a time with another range
        return Score.missing(outcome) if isinstance(outcome, str) else self._scale.score(outcome)

    def _ask(self, outputs: Outputs, keys: Sequence[str], size: int | None = None) -> Iterator[tuple[str, Outcome]]:
        parts = batches(keys, size or self._mapping.batch_size)
        alone: list[str] = []  # a text that the endpoint refuses must not cost the others of its batch
        requests = [self._mapping.request([outputs[key] for key in part]) for part in parts]
        for index, reply in self._endpoint.ask(requests):
            batch = parts[index]
            if reply.is_refused and len(batch) > 1:
                alone += batch
            else:
                yield from zip(batch, self._outcomes(reply, len(batch)), strict=True)
        if alone:
            yield from self._ask(outputs, alone, size=1)

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
