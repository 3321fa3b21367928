"""JSON over HTTP for remote scorers and judges.

A request that fails is sent again where that may help. One that still fails is a `Reply` with a reason, never a value.
Nothing of an answer's text is quoted or logged: the endpoint knows the key and may send it back in any form.
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

LONGEST_BACKOFF, LONGEST_WAIT = 60.0, 600.0  # seconds: between retries, and as a server asks
LARGEST_REPLY = 2**24  # bytes
GIVE_UP_AFTER = 20  # requests in a row that failed with all their retries

DENIED = {401: "refuses the key", 403: "refuses the key", 404: "does not know this address or model"}
"""HTTP statuses that every further request would get too."""

ERROR_CODES = {
    *("invalid_request_error", "authentication_error", "permission_error", "not_found_error", "rate_limit_error"),
    *("rate_limit_exceeded", "insufficient_quota", "billing_hard_limit_reached", "model_not_found", "content_filter"),
    *("context_length_exceeded", "string_above_max_length", "content_policy_violation", "invalid_api_key"),
    *("invalid_value", "unsupported_value", "unsupported_parameter", "unknown_parameter", "overloaded_error"),
    *("missing_required_parameter", "api_error", "server_error", "BadRequestError", "NotFoundError"),
    *("INVALID_ARGUMENT", "FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED"),
    *("NOT_FOUND", "UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL"),
}
"""The error codes and types of widespread interfaces, which alone are quoted."""

for _library in ("httpx2", "httpcore2"):  # they log the headers of every answer
    logging.getLogger(_library).setLevel(logging.WARNING)

SHORTEST_KEY = 8  # characters: local servers take any word, such as "EMPTY", which is no secret
SECRET_NAME = re.compile(
    r"(?i)(.*[-_.])?(key|apikey|secret|password|authorization|signature)|((x|api|access|auth|session)[-_.]?)*(token|auth)"
)
SECRET_VARIABLE = re.compile(r"(?i)(.*_)?(key|token|secret|password)")


@dataclass(frozen=True)
class Reply:
    """The answer to one request.

    Attributes:
        value: the decoded JSON; None if there is none.
        fault: why there is none, in one line without any of the endpoint's text; "" if there is one.
        status: of HTTP; 0 if no answer came.
    """

    value: Any = None
    fault: str = ""
    status: int = 0

    @property
    def may_pass(self) -> bool:
        """Whether the request failed in a way that a retry may fix."""
        broken = bool(self.fault) and 200 <= self.status < 300
        return broken or self.status in (0, 408, 429) or self.status >= 500

    @property
    def is_refused(self) -> bool:
        """Whether the endpoint refuses this request but may accept others."""
        return 400 <= self.status < 500 and not self.may_pass and self.status not in DENIED


class Endpoint:
    """An address that takes JSON and answers with JSON.

    Failed connections, the statuses 408, 429 and 5xx, and broken JSON are retried with exponential back-off and jitter,
    but not before the time that a `Retry-After` header names. Redirects are not followed, since they would carry the
    key elsewhere. Proxies come from the environment, except for addresses of this host.

    Args:
        url: where requests are posted.
        api_key_env: environment variable with the key; if it is None or not set, no key is sent.
        api_key_header: header of the key; "Authorization" sends "Bearer KEY".
        headers: further headers, without secrets.
        timeout: seconds to wait for a connection and for each part of an answer, which may take twice as long in all.
        retries: of a failed request.
        backoff: seconds before the first retry; they double with each, up to a minute.
        concurrency: requests at a time.
        requests_per_minute: of this object, with retries; None for no limit.
        sleep: replaces waiting, for tests.

    Raises:
        UserError: the URL or the name in `api_key_env` is malformed, the key cannot be sent or would be sent
            unencrypted to another host, or the URL or a header holds a secret.
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
        if not re.fullmatch(r"https?://[!-~]+", url) or re.search("[@#]", url) or not _host(url):
            raise UserError("url: must look like https://host/path, without a password")
        if api_key_env is not None and not re.fullmatch("[A-Z][A-Z0-9_]*", api_key_env):
            raise UserError(
                "api_key_env: must be the name of an environment variable in capitals, such as OPENAI_API_KEY; "
                "the key itself is never written down"
            )
        if api_key_env is not None and url.startswith("http:") and not is_loopback(_host(url)):
            raise UserError(
                f"url: http would send the key in {api_key_env} for all to read; use https, which only an address of "
                "this host, such as localhost, can do without"
            )
        self.url, self.api_key_env, self.api_key_header = url, api_key_env, api_key_header
        self.headers = dict(headers or {})
        self.timeout, self.retries, self.backoff, self.concurrency = timeout, retries, backoff, concurrency
        self.sleep = sleep
        self._limiter = _RateLimiter(60 / requests_per_minute if requests_per_minute else 0.0)
        named = self.headers | {api_key_header: ""}
        if not all(re.fullmatch("[!-9;-~]+: [ -~]*", f"{name}: {value}") for name, value in named.items()):
            raise UserError("headers: must be names and values in printable ASCII")
        self._key()  # raises if it cannot be sent
        self.refuse_secrets({"url": [url, dict(parse_qsl(urlsplit(url).query))], "headers": self.headers})

    @property
    def has_key(self) -> bool:
        """Whether the key's variable is set."""
        return bool(self._key())

    def refuse_secrets(self, value: Any, where: str = "") -> None:
        """Raises UserError, without quoting it, if a setting holds a secret of the environment or is named like one."""
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
            for name, secret in os.environ.items():
                is_secret = name == self.api_key_env or SECRET_VARIABLE.fullmatch(name)
                if is_secret and len(secret.strip()) >= SHORTEST_KEY and secret.strip() in value:
                    raise UserError(f"{where}: holds the secret that is in {name}; {advice}")

    def ask(self, bodies: Sequence[Any]) -> Iterator[tuple[int, Reply]]:
        """Sends every body, several at a time, and yields (its index, its reply) for each, as they come.

        Stops sending once the endpoint has refused the key, or `GIVE_UP_AFTER` requests in a row have failed.

        Raises:
            UserError: after the last reply: the endpoint refuses the key or does not know the address.
        """
        stop, failed, denied = _Stop(), 0, 0
        timeout, proxies = httpx2.Timeout(self.timeout, pool=None), not is_loopback(_host(self.url))
        try:
            client = httpx2.Client(timeout=timeout, follow_redirects=False, trust_env=proxies)
        except (ImportError, ValueError, httpx2.InvalidURL) as error:  # its message may quote the proxy's password
            raise UserError(
                f"{self.url}: the proxy that the environment names cannot be used ({type(error).__name__}); unset "
                "ALL_PROXY, HTTPS_PROXY and HTTP_PROXY, or install socksio for a SOCKS proxy"
            ) from None
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            futures = {pool.submit(self._ask, client, body, stop): index for index, body in enumerate(bodies)}
            try:
                for future in as_completed(futures):
                    reply = future.result()
                    failed = failed + 1 if reply.fault and reply.may_pass else 0
                    if failed == GIVE_UP_AFTER:
                        stop.because(f"not sent: {failed} requests in a row have failed; the last: {reply.fault}")
                    if reply.status in DENIED:
                        denied = reply.status
                    yield futures[future], reply
            finally:
                stop.because("interrupted")
                pool.shutdown(cancel_futures=True)
        if denied:
            key = f"the variable {self.api_key_env}" if self.api_key_env else "name a key's variable in api_key_env"
            raise UserError(
                f"{self.url} {DENIED[denied]} (HTTP {denied}); check the URL and the model it is asked for, and {key}"
            )

    def _ask(self, client: httpx2.Client, body: Any, stop: "_Stop") -> Reply:
        reply = None
        for attempt in range(self.retries + 1):
            if (pause := self._limiter.paused_for()) > LONGEST_WAIT:
                stop.because(f"not sent: the endpoint asks for a pause of {pause:.0f} seconds")
            if not stop.is_set() and (wait := max(self._backoff(attempt), self._limiter.reserve())) > 0:
                (self.sleep or stop.wait)(wait)
            if stop.is_set():
                return reply or Reply(fault=stop.reason)
            reply = self._post(client, body)
            if reply.status in DENIED:
                stop.because(reply.fault)
            if not reply.may_pass:
                break
        assert reply is not None
        return reply

    def _backoff(self, attempt: int) -> float:
        longest = min(self.backoff * 2 ** (attempt - 1), LONGEST_BACKOFF) if attempt else 0.0
        return longest * SystemRandom().uniform(0.5, 1.0)  # shares no state with the run or with forks

    def _post(self, client: httpx2.Client, body: Any) -> Reply:
        key = self._key().get_secret_value()
        bearer = "Bearer " if self.api_key_header.lower() == "authorization" else ""
        own = {"Content-Type": "application/json"} | ({self.api_key_header: bearer + key} if key else {})
        taken = {name.lower() for name in own}
        given = {name: value for name, value in self.headers.items() if name.lower() not in taken}
        # ASCII escapes lone surrogates, which UTF-8 cannot encode
        request = client.build_request("POST", self.url, content=json.dumps(body), headers=given | own)
        deadline, content = time.monotonic() + self.timeout, bytearray()
        try:
            with closing(client.send(request, stream=True)) as response:
                self._limiter.pause(_seconds(response.headers.get("Retry-After", "")))
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > deadline or len(content) > LARGEST_REPLY:
                        return Reply(fault="no answer: it came too slowly or was too large")
        except (httpx2.NetworkError, httpx2.TimeoutException) as error:  # the system's message
            return Reply(fault=f"no answer: {first_line(error)}")
        except httpx2.RequestError as error:  # its message may quote the answer
            return Reply(fault=f"no answer: {type(error).__name__}")
        return _read(response.status_code, bytes(content))

    def _key(self) -> SecretStr:
        """Reads the key, so that no attribute holds it; "" if there is none."""
        key = os.environ.get(self.api_key_env or "", "").strip()
        if not (key.isascii() and key.isprintable()):  # the HTTP client's error would quote it
            raise UserError(f"{self.api_key_env} holds characters that no key has; set it again")
        return SecretStr(key)


class _Stop(Event):
    """Ends the requests of one call, for a reason."""

    reason = ""

    def because(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.set()


class _RateLimiter:
    """Spaces requests by an interval in seconds, and holds them back while the server asks for a pause."""

    def __init__(self, interval: float):
        self.interval, self._lock = interval, Lock()
        self._next, self._paused_until = 0.0, 0.0

    def __reduce__(self) -> tuple:
        return _RateLimiter, (self.interval,)  # another process has its own locks and clock

    def reserve(self) -> float:
        """Reserves the next request, and returns how many seconds to wait for it."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next, self._paused_until)
            self._next = start + self.interval
            return start - now

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    def paused_for(self) -> float:
        return self._paused_until - time.monotonic()


def same_origin(url: str, other: str) -> bool:
    """Whether two URLs share scheme, host and port."""
    if not (_host(url) and _host(other)):
        return False
    one, two = httpx2.URL(url), httpx2.URL(other)
    return (one.scheme, one.host, one.port) == (two.scheme, two.host, two.port)


def _host(url: str) -> str:
    """Returns a URL's host, or "" if the URL is malformed."""
    try:
        return httpx2.URL(url).host
    except httpx2.InvalidURL:
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's name or address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _seconds(retry_after: str) -> float:
    """Returns the seconds that a `Retry-After` header gives as a number or a date (RFC 9110, 10.2.3), or else 0."""
    try:
        if re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
            return float(retry_after)
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def _read(status: int, content: bytes) -> Reply:
    """Decodes an answer. NaN and numbers too large for a float are not JSON."""
    value, fault = None, ""
    try:
        value = json.loads(content, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        fault = "the answer is not JSON"
    if not 200 <= status < 300:
        # the endpoint's name for the error, if it is a known one
        named = jmespath.search("[error.code, error.type, error.status, error, code, type, status]", value) or []
        code = next((name for name in named if isinstance(name, str) and name in ERROR_CODES), "")
        return Reply(fault=f"HTTP {status} {code}".strip(), status=status)
    return Reply(value, fault, status)


def _finite(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ValueError(f"{digits} is not a JSON number")
    return number
