"""JSON over HTTP against a real server that fails in every way."""

import base64
import logging
import pickle
import re
import socket
import threading
import time
from email.utils import formatdate

import pytest

from bridle.errors import UserError
from bridle.utils.http import GIVE_UP_AFTER, LARGEST_REPLY, Endpoint, Reply
from loopback import cut_short, error, ok, reset, serving, silent, trickle

KEY = "sk-invented-0123456789"
GOOD = {"answer": 1}


@pytest.fixture
def endpoint(server):
    """A factory of endpoints at the server; what they would have slept is in `endpoint.slept`."""
    server.answer = lambda request: ok(GOOD)

    def make(**options):
        slept = []
        made = Endpoint(server.url, sleep=slept.append, **{"timeout": 5.0, **options})
        made.slept = slept
        return made

    return make


def ask(endpoint, *bodies):
    replies = dict(endpoint.ask(bodies or [{}]))
    return [replies[index] for index in range(len(replies))]


@pytest.mark.parametrize(
    "fault",
    [error(429), error(408), error(500), error(503), ok(b'{"answer"'), ok(b"\xff\xfe"), ok(b""), reset, cut_short],
    ids=["429", "408", "500", "503", "broken", "no UTF-8", "empty", "reset", "cut short"],
)
def test_a_passing_fault_is_asked_again(server, endpoint, fault):
    server.script.extend([fault, fault])
    endpoint = endpoint(backoff=4.0)
    assert ask(endpoint) == [Reply(GOOD, status=200)]
    assert len(server.requests) == 3
    first, second = endpoint.slept
    assert 2 <= first <= 4 <= second <= 8  # doubled, with jitter


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (error(500, "out of\norder"), "HTTP 500"),
        (error(503), "HTTP 503"),
        (reset, "no answer: [Errno 104] Connection reset by peer"),
        (silent, "no answer: timed out"),
        (trickle, "no answer: it came too slowly or was too large"),
        (ok(b" " * (LARGEST_REPLY + 1)), "no answer: it came too slowly or was too large"),
        (ok(b"{"), "the answer is not JSON"),
        (ok(b'{"answer": NaN}'), "the answer is not JSON"),
        (ok(b"[Infinity]"), "the answer is not JSON"),
        (ok(b"[1e999]"), "the answer is not JSON"),
        (ok(b"[" * 100_000), "the answer is not JSON"),
    ],
)
def test_a_lasting_fault_says_why_and_has_no_value(server, endpoint, fault, said):
    server.script.extend([fault] * 2)
    timeout = 0.2 if fault in (silent, trickle) else 5
    assert [(reply.value, reply.fault) for reply in ask(endpoint(retries=1, timeout=timeout))] == [(None, said)]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (error(400, "unsupported", code="unsupported_value"), "HTTP 400 unsupported_value"),
        (({"detail": "too long"}, 422, {}), "HTTP 422"),
        ((b"<html>", 413, {}), "HTTP 413"),
        ((b"", 307, {"Location": "/elsewhere"}), "HTTP 307"),
    ],
)
def test_what_is_refused_is_not_asked_again(server, endpoint, answer, said):
    server.script.append(answer)
    (reply,) = ask(endpoint())
    assert (reply.value, reply.fault) == (None, said)
    assert reply.is_refused == (reply.status != 307)
    assert len(server.requests) == 1


def test_nobody_there_is_a_fault():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    (reply,) = ask(Endpoint(url, retries=1, sleep=lambda seconds: None))
    assert (reply.value, reply.fault) == (None, "no answer: [Errno 111] Connection refused")


def test_back_off_differs_from_request_to_request(server, endpoint):
    server.script.extend([error(500)] * 6)
    endpoint = endpoint(retries=1, concurrency=1)
    assert all(reply.fault for reply in ask(endpoint, 1, 2, 3))
    assert len(set(endpoint.slept)) == 3


@pytest.mark.parametrize(("header", "least", "most"), [("7", 6, 7), ("date", 290, 300), ("soon", 0, 1), ("-3", 0, 1)])
def test_it_obeys_retry_after(server, endpoint, header, least, most):
    header = formatdate(time.time() + 300, usegmt=True) if header == "date" else header
    server.script.append(error(429, headers={"Retry-After": header}))
    endpoint = endpoint()
    assert ask(endpoint) == [Reply(GOOD, status=200)]
    (slept,) = endpoint.slept
    assert least <= slept <= most


def test_all_requests_wait_when_one_is_asked_to(server, endpoint):
    server.script.append(error(429, headers={"Retry-After": "7"}))
    endpoint = endpoint(concurrency=1, retries=0)
    first, other = ask(endpoint, 1, 2)
    assert (first.fault, other.value) == ("HTTP 429", GOOD)
    assert endpoint.slept == [pytest.approx(7, abs=1)]


def test_a_server_that_asks_for_a_day_is_given_up(server, endpoint):
    server.script.append(error(429, "come back tomorrow", headers={"Retry-After": "86400"}))
    endpoint = endpoint(concurrency=1)
    first, other = ask(endpoint, 1, 2)
    assert first.fault == "HTTP 429"
    assert re.fullmatch(r"not sent: the endpoint asks for a pause of 86\d+ seconds", other.fault)
    assert endpoint.slept == []
    assert len(server.requests) == 1


def test_it_keeps_to_a_rate(server, endpoint):
    times = []
    server.answer = lambda request: times.append(time.monotonic()) or ok(GOOD)
    endpoint = Endpoint(server.url, requests_per_minute=60 / 0.05)
    began = time.monotonic()
    ask(endpoint, *range(4))
    assert all(time - began >= 0.05 * place for place, time in enumerate(times)), "each waits for those before it"
    assert len(times) == 4


def test_so_many_are_under_way_at_a_time(server, endpoint):
    now, most, lock = 0, 0, threading.Lock()

    def answer(request):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return ok({"answer": request})

    server.answer = answer
    assert [reply.value["answer"] for reply in ask(endpoint(concurrency=3), *range(9))] == list(range(9))
    assert most == 3


def test_a_server_that_only_fails_gets_no_further_requests(server, endpoint):
    server.answer = lambda request: error(500, "down")
    replies = ask(endpoint(retries=0, concurrency=1), *range(200))
    assert all(reply.fault for reply in replies)
    why = f"{GIVE_UP_AFTER} requests in a row have failed; the last: HTTP 500"
    assert replies[-1].fault == f"not sent: {why}"
    assert GIVE_UP_AFTER <= len(server.requests) < 100


@pytest.mark.parametrize(
    ("status", "word"), [(401, "refuses the key"), (403, "refuses the key"), (404, "does not know")]
)
def test_wrong_settings_stop_after_what_is_under_way(server, endpoint, monkeypatch, status, word):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script.extend([ok(GOOD), error(status, f"bad key {KEY}")])
    replies = []
    with pytest.raises(UserError, match=f"{word} .*HTTP {status}.*OPENAI_API_KEY") as caught:
        replies.extend(endpoint(api_key_env="OPENAI_API_KEY", concurrency=1).ask(range(9)))
    assert (0, Reply(GOOD, status=200)) in replies
    assert len(replies) == 9
    assert len(server.requests) == 2
    assert KEY not in f"{caught.value} {replies}"


def test_who_stops_listening_stops_the_asking(server, endpoint):
    server.answer = lambda request: error(500)
    asking = endpoint(retries=0, concurrency=1, backoff=60.0).ask(range(500))
    next(asking)
    asking.close()
    assert len(server.requests) < 250


def test_the_key_shows_nowhere(server, endpoint, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OTHER_KEY", f" {KEY}\n")
    endpoint = endpoint(api_key_env="OTHER_KEY", api_key_header="X-Api-Key", headers={"X-Version": "3"})
    server.script.append(error(400, f"{KEY} has no credit"))
    (reply,) = ask(endpoint)
    sent = server.requests[0][1]
    assert (sent["X-Api-Key"], sent["X-Version"], sent["Content-Type"]) == (KEY, "3", "application/json")
    assert reply.fault == "HTTP 400"
    assert KEY not in repr(vars(endpoint)) + caplog.text


ECHOES = {
    "as it is": KEY,
    "in capitals": KEY.upper(),
    "backwards": KEY[::-1],
    "for a URL": KEY.replace("-", "%2D"),
    "in base64": base64.b64encode(KEY.encode()).decode(),
    "in hexadecimals": KEY.encode().hex(),
    "in two lines": f"{KEY[:12]}\n{KEY[12:]}",
    "spaced": " ".join(KEY),
    "as a number": int.from_bytes(KEY.encode()),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
def test_no_word_of_an_answer_is_quoted_or_logged(server, endpoint, monkeypatch, caplog, echo):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OTHER_KEY", KEY)

    def spiteful(handler):
        handler.send_response(400, str(echo).replace("\n", " "))
        handler.send_header("Connection", "close")
        handler.send_header("X-Echo", str(echo).replace("\n", " "))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def no_http(handler):
        handler.wfile.write(f"{echo} is no protocol\r\n\r\n".encode())

    codes = [error(400, echo, code=echo, type=echo), ({"detail": echo, "error": echo}, 400, {}), ([echo], 400, {})]
    server.script.extend([*codes, spiteful, no_http, ok(str(echo).encode() + b"{")])
    endpoint = endpoint(api_key_env="OTHER_KEY", retries=0, concurrency=1)
    replies = [*ask(endpoint, *range(6))]
    assert [reply.fault for reply in replies] == [
        *["HTTP 400"] * 4,
        "no answer: RemoteProtocolError",
        "the answer is not JSON",
    ]
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    server.script.append(error(401, echo))
    with pytest.raises(UserError) as caught:
        ask(endpoint)
    said = f"{caught.value} {replies} {caplog.text}"
    assert not [line for line in str(echo).splitlines() if line in said]


def test_no_key_is_sent_unless_its_variable_is_named(server, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ask(endpoint())
    ask(endpoint(api_key_env="NO_SUCH_KEY"))
    assert KEY not in str(server.requests)


def test_a_redirect_takes_the_key_nowhere(server, endpoint, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", KEY)
    with serving() as elsewhere:
        for status in (301, 302, 303, 307, 308):
            server.script.append((b"", status, {"Location": elsewhere.url}))
            assert ask(endpoint(api_key_env="OTHER_KEY")) == [Reply(fault=f"HTTP {status}", status=status)]
            assert server.requests[-1][1]["Authorization"] == f"Bearer {KEY}"
        assert elsewhere.requests == []


@pytest.mark.parametrize("proxy", ["socks5://user:secret@127.0.0.1:1", "http://user:secret@host:port"])
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(UserError, match="the proxy that the environment names cannot be used") as caught:
        list(Endpoint("https://scorer.example/v1").ask([{}]))
    assert "secret" not in str(caught.value)


def test_a_header_replaces_one_of_the_same_name_in_other_case(server, endpoint):
    ask(endpoint(headers={"CONTENT-type": "text/plain", "X-Own": "1"}))
    sent = [(name.lower(), value) for name, value in server.requests[-1][1].items()]
    assert [value for name, value in sent if name == "content-type"] == ["application/json"]
    assert ("x-own", "1") in sent


def test_no_proxy_reads_what_is_sent_to_this_machine(server, endpoint, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", KEY)
    monkeypatch.delenv("no_proxy")
    with serving() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert ask(endpoint(api_key_env="OTHER_KEY")) == [Reply(GOOD, status=200)]
        assert proxy.requests == []


@pytest.mark.parametrize(
    ("url", "may"),
    [
        ("https://scorer.example/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://scorer.example/v1", False),
        ("http://localhost.example/v1", False),
        ("http://127.0.0.1.example/v1", False),
        ("http://10.0.0.1/v1", False),
        ("http://0.0.0.0/v1", False),
        ("http://[::2]/v1", False),
    ],
)
def test_a_key_goes_unencrypted_to_this_machine_alone(url, may, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", KEY)
    if may:
        assert Endpoint(url, "OTHER_KEY").has_key
    else:
        with pytest.raises(UserError, match="url: http would send the key in OTHER_KEY"):
            Endpoint(url, "OTHER_KEY")
    assert not Endpoint(url).has_key


@pytest.mark.parametrize(
    "url", ["file:///etc/hosts", "localhost:80", "https://me:word@host", "http://a b", "http://a:b"]
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="url: must look like https://host/path") as caught:
        Endpoint(url)
    assert "word@" not in str(caught.value)


def test_a_key_that_is_written_down_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for options in (
        {"url": f"https://host/v1?key={KEY}"},
        {"url": f"https://host/{KEY}"},
        {"headers": {"X-Auth-Token": KEY[::-1]}},
        {"headers": {"X-Other": KEY}},
        {"api_key_env": KEY},
        {"api_key_env": "AIzaInvented"},
    ):
        with pytest.raises(UserError, match="environment variable") as caught:
            Endpoint(**{"url": "https://host", **options})
        assert KEY not in str(caught.value)
        assert KEY[::-1] not in str(caught.value)
    allowed = Endpoint("https://host/openai?api-version=2024-02-01", headers={"X-Tokens": "3"})
    allowed.refuse_secrets({"body": {"eos_token": "</s>", "max_tokens": 3, "key": "{text}", "keyword": "x"}})


def test_a_word_for_a_server_that_needs_no_key_is_no_secret(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert Endpoint("https://example/x", "OPENAI_API_KEY").has_key


def test_it_travels_to_other_processes(server, endpoint):
    made = Endpoint(server.url, requests_per_minute=600)
    endpoint()
    assert ask(pickle.loads(pickle.dumps(made))) == [Reply(GOOD, status=200)]  # noqa: S301
