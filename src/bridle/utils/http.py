"""JSON over HTTP, for whatever asks another machine: remote scorers and judges.

A request that fails is sent again where that may help. What still fails is a `Reply` that says why; a fault never
becomes a value. Nothing that the other machine wrote is quoted or logged: it has seen the key, and may send it back in
any form.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from math import isfinite
from random import SystemRandom
from threading import Event, Lock
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2
import jmespath
from pydantic import SecretStr

from bridle.errors import UserError, first_line

LONGEST_BACKOFF, LONGEST_WAIT = 60.0, 600.0  # seconds: of our own accord, and because a server asked for it
LARGEST_REPLY = 2**24  # bytes
GIVE_UP_AFTER = 20  # requests in a row that failed with all their retries: nobody is there

DENIED = {401: "refuses the key", 403: "refuses the key", 404: "does not know this address or model"}
"""Answers that no retry will change and that every other request would get too."""

ERROR_CODES = {
    *("invalid_request_error", "authentication_error", "permission_error", "not_found_error", "rate_limit_error"),
    *("rate_limit_exceeded", "insufficient_quota", "billing_hard_limit_reached", "model_not_found", "content_filter"),
    *("context_length_exceeded", "string_above_max_length", "content_policy_violation", "invalid_api_key"),
    *("invalid_value", "unsupported_value", "unsupported_parameter", "unknown_parameter", "overloaded_error"),
    *("missing_required_parameter", "api_error", "server_error", "BadRequestError", "NotFoundError"),
    *("INVALID_ARGUMENT", "FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED"),
    *("NOT_FOUND", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL"),
}
"""What an error may call itself to be quoted: codes and types of widespread interfaces."""

for _library in ("httpx2", "httpcore2"):  # which log the words and headers of every answer
    logging.getLogger(_library).setLevel(logging.WARNING)

SHORTEST_KEY = 8  # characters: local servers take any word, such as "EMPTY", that may well stand elsewhere
SECRET_NAME = re.compile(
    r"(?i)(.*[-_.])?(key|apikey|secret|password|authorization|signature)|((x|api|access|auth|session)[-_.]?)*(token|auth)"
)
SECRET_VARIABLE = re.compile(r"(?i)(.*_)?(key|token|secret|password)")


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        value: the decoded JSON; None where there is none.
        fault: why there is none, in one line without a word of the endpoint's own; "" where there is one.
        status: of HTTP; 0 where nothing came.
    """

    value: Any = None
    fault: str = ""
    status: int = 0

    @property
    def may_pass(self) -> bool:
        """Whether it is a fault that asking again may mend."""
        broken = bool(self.fault) and 200 <= self.status < 300
        return broken or self.status in (0, 408, 429) or self.status >= 500

    @property
    def is_refused(self) -> bool:
        """Whether the endpoint will not have this request, and may well have others."""
        return 400 <= self.status < 500 and not self.may_pass and self.status not in DENIED


class Endpoint:
    """An address that takes JSON and answers with JSON.

    Failures of the connection, answers 408, 429 and 5xx, and broken JSON are asked again with exponential back-off
    and jitter; no request is begun before the time that a `Retry-After` has named. Redirects are not followed, since
    they would carry the key elsewhere. Proxies are taken from the environment, but for addresses of this machine.

    Args:
        url: where requests are posted.
        api_key_env: environment variable that holds the key; no key is sent where none is named, or it is not set.
        api_key_header: header that carries the key; for "Authorization" as "Bearer KEY".
        headers: further headers; none may hold a secret.
        timeout: seconds to wait for a connection and for each part of an answer; an answer that trickles in is
            given up after twice as long, at the latest.
        retries: how often a failed request is sent again.
        backoff: seconds before the first retry; they double with each, up to a minute.
        concurrency: requests under way at a time.
        requests_per_minute: sent through this object, retries included; None for no limit.
        sleep: how to wait; tests need not.

    Raises:
        UserError: the URL is none, `api_key_env` cannot be a variable's name, its key cannot be sent or would be sent
            unencrypted to another machine, or the URL or a header holds a secret.
    """

    def __init__(
        self,
        url: str,
        api_key_env: str | None = None,
        *,
        api_key_header: str = "Authorization",
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        sleep: Callable[[float], object] | None = None,
    ):
        # Errors show the URL, so nothing in it may be a secret.
        if not re.fullmatch(r"https?://[!-~]+", url) or re.search("[@#]", url) or not _is_url(url):
            raise UserError("url: must look like https://host/path, without a password")
        if api_key_env is not None and not re.fullmatch("[A-Z][A-Z0-9_]*", api_key_env):
            raise UserError(
                "api_key_env: must be the name of an environment variable in capitals, such as OPENAI_API_KEY; "
                "the key itself is never written down"
            )
        if api_key_env is not None and url.startswith("http:") and not _is_this_machine(url):
            raise UserError(
                f"url: http would send the key in {api_key_env} for all to read; use https, which only an address of "
                "this machine, such as localhost, can do without"
            )
        self.url, self.api_key_env, self.api_key_header = url, api_key_env, api_key_header
        self.headers = dict(headers or {})
        self.timeout, self.retries, self.backoff, self.concurrency = timeout, retries, backoff, concurrency
        self.sleep = sleep
        self._gate = _Gate(60 / requests_per_minute if requests_per_minute else 0.0)
        named = self.headers | {api_key_header: ""}
        if not all(re.fullmatch("[!-9;-~]+: [ -~]*", f"{name}: {value}") for name, value in named.items()):
            raise UserError("headers: must be names and values in printable ASCII")
        self._key()  # which may be none
        self.refuse_secrets({"url": [url, dict(parse_qsl(urlsplit(url).query))], "headers": self.headers})

    @property
    def has_key(self) -> bool:
        """Whether the variable with the key is set."""
        return bool(self._key())

    def refuse_secrets(self, value: Any, where: str = "") -> None:
        """Makes sure that nothing in the settings of a recipe is a key.

        Raises:
            UserError: a string holds the key, or stands under the name of a secret; it does not quote it.
        """
        advice = "put it into an environment variable, and name that in api_key_env"
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if SECRET_NAME.fullmatch(str(name)) and isinstance(inner, str) and not re.fullmatch(r"\{\w+\}", inner):
                    raise UserError(f"{where}: '{name}' looks like a secret; {advice}")
                self.refuse_secrets(inner, where or str(name))
        elif isinstance(value, list):
            for inner in value:
                self.refuse_secrets(inner, where)
        elif isinstance(value, str):
            for name in os.environ:
                if (name == self.api_key_env or SECRET_VARIABLE.fullmatch(name)) and _holds(value, name):
                    raise UserError(f"{where}: holds the secret that is in {name}; {advice}")

    def ask(self, bodies: Sequence[Any]) -> Iterator[tuple[int, Reply]]:
        """Sends every body, several at a time.

        Once the endpoint has refused the key, or `GIVE_UP_AFTER` requests in a row have failed, the rest is not sent.

        Yields:
            (the body's index, its reply), one for each body, as they come.

        Raises:
            UserError: after the last reply: the endpoint refuses the key or does not know the address.
        """
        asking, failed, denied = _Asking(), 0, 0
        with self._client() as client, ThreadPoolExecutor(self.concurrency) as pool:
            futures = {pool.submit(self._ask, client, body, asking): index for index, body in enumerate(bodies)}
            try:
                for future in as_completed(futures):
                    reply = future.result()
                    failed = failed + 1 if reply.fault and reply.may_pass else 0
                    if failed == GIVE_UP_AFTER:
                        asking.stop(f"not asked, since {failed} requests in a row had failed; the last: {reply.fault}")
                    if reply.status in DENIED:
                        denied = reply.status
                    yield futures[future], reply
            finally:
                asking.stop("interrupted")
                pool.shutdown(cancel_futures=True)
        if denied:
            key = f"the variable {self.api_key_env}" if self.api_key_env else "name a key's variable in api_key_env"
            raise UserError(
                f"{self.url} {DENIED[denied]} (HTTP {denied}); check the URL and the model it is asked for, and {key}"
            )

    def _client(self) -> httpx2.Client:
        timeout = httpx2.Timeout(self.timeout, pool=None)
        return httpx2.Client(timeout=timeout, follow_redirects=False, trust_env=not _is_this_machine(self.url))

    def _ask(self, client: httpx2.Client, body: Any, asking: "_Asking") -> Reply:
        reply = None
        for attempt in range(self.retries + 1):
            if (closed := self._gate.closed_for()) > LONGEST_WAIT:
                asking.stop(f"not asked, since the endpoint wants to be left alone for {closed:.0f} seconds")
            if not asking.stopped.is_set() and (wait := max(self._backoff(attempt), self._gate.wait())) > 0:
                (self.sleep or asking.stopped.wait)(wait)
            if asking.stopped.is_set():
                return reply or Reply(fault=asking.why)
            reply = self._post(client, body)
            if reply.status in DENIED:
                asking.stop(reply.fault)
            if not reply.may_pass:
                break
        assert reply is not None
        return reply

    def _backoff(self, attempt: int) -> float:
        longest = min(self.backoff * 2 ** (attempt - 1), LONGEST_BACKOFF) if attempt else 0.0
        return longest * SystemRandom().uniform(0.5, 1.0)  # no state that runs or forks share

    def _post(self, client: httpx2.Client, body: Any) -> Reply:
        key = self._key().get_secret_value()
        bearer = "Bearer " if self.api_key_header.lower() == "authorization" else ""
        own = {"Content-Type": "application/json"} | ({self.api_key_header: bearer + key} if key else {})
        # ASCII, in which lone surrogates are escaped: UTF-8 could not hold them
        request = client.build_request("POST", self.url, content=json.dumps(body), headers=self.headers | own)
        deadline, content = time.monotonic() + self.timeout, bytearray()
        try:
            with closing(client.send(request, stream=True)) as response:
                self._gate.close(_seconds(response.headers.get("Retry-After")))
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > deadline or len(content) > LARGEST_REPLY:
                        return Reply(fault="no answer: it came too slowly or was too large")
        except (httpx2.NetworkError, httpx2.TimeoutException) as error:  # in the system's words
            return Reply(fault=f"no answer: {first_line(error)}")
        except httpx2.RequestError as error:  # it may quote the answer
            return Reply(fault=f"no answer: {type(error).__name__}")
        return self._read(response.status_code, bytes(content))

    def _read(self, status: int, content: bytes) -> Reply:
        value, broken = _decoded(content)
        if not 200 <= status < 300:
            return Reply(fault=f"HTTP {status} {_error_code(value)}".strip(), status=status)
        return Reply(fault="the answer is not JSON", status=status) if broken else Reply(value, status=status)

    def _key(self) -> SecretStr:
        """Read anew each time, so that no attribute holds it; empty where there is none."""
        key = os.environ.get(self.api_key_env or "", "").strip()
        if not (key.isascii() and key.isprintable()):  # the HTTP client's own error would quote it
            raise UserError(f"{self.api_key_env} holds characters that no key has; set it again")
        return SecretStr(key)


class _Asking:
    """Whether the requests of one call go on, and why not."""

    def __init__(self) -> None:
        self.stopped, self.why = Event(), ""

    def stop(self, why: str) -> None:
        self.why = self.why or why
        self.stopped.set()


class _Gate:
    """When the next request may go: an interval after the last, and not before the time that the server named."""

    def __init__(self, interval: float):
        self.interval, self._lock = interval, Lock()
        self._next, self._closed_until = 0.0, 0.0

    def __reduce__(self) -> tuple:
        return _Gate, (self.interval,)  # neither locks nor this clock mean anything in another process

    def wait(self) -> float:
        """Seconds until the caller's own place in the line."""
        with self._lock:
            now = time.monotonic()
            place = max(now, self._next, self._closed_until)
            self._next = place + self.interval
            return place - now

    def close(self, seconds: float) -> None:
        with self._lock:
            self._closed_until = max(self._closed_until, time.monotonic() + seconds)

    def closed_for(self) -> float:
        return self._closed_until - time.monotonic()


def same_origin(url: str, other: str) -> bool:
    """Whether two URLs have scheme, host and port in common, so that what one may have the other has."""
    if not (_is_url(url) and _is_url(other)):
        return False
    one, two = httpx2.URL(url), httpx2.URL(other)
    return (one.scheme, one.host, one.port) == (two.scheme, two.host, two.port)


def _is_this_machine(url: str) -> bool:
    host = httpx2.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _holds(text: str, variable: str) -> bool:
    secret = os.environ[variable].strip()
    return len(secret) >= SHORTEST_KEY and secret in text


def _is_url(url: str) -> bool:
    try:
        return bool(httpx2.URL(url).host)
    except httpx2.InvalidURL:
        return False


def _seconds(retry_after: str | None) -> float:
    """How long a `Retry-After` header asks to wait: a number of seconds or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return 0.0
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
        return float(retry_after)
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def _decoded(content: bytes) -> tuple[Any, bool]:
    """The JSON value and whether it is none: NaN and numbers too large for a float are no JSON."""
    try:
        return json.loads(content, parse_constant=_finite, parse_float=_finite), False
    except (ValueError, RecursionError):
        return None, True


def _finite(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ValueError(f"{digits} is no JSON number")
    return number


def _error_code(value: Any) -> str:
    """What the endpoint calls what went wrong, where it is a known name."""
    named = jmespath.search("[error.code, error.type, error.status, error, code, type, status]", value) or []
    return next((name for name in named if isinstance(name, str) and name in ERROR_CODES), "")
