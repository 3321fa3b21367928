"""A remote constraint against a real server: what it asks, what it understands, and what never becomes a label."""

import json
import logging
import pickle
import re
from datetime import date

import pytest

from bridle.constraints import Remote, build_constraint
from bridle.errors import UserError
from loopback import completion, cut_short, error, ok, reset, silent, trickle

KEY = "sk-invented-0123456789"
TEXTS = ["the kettle sings", "you grumblefish", "très {text} \ud800 {model}", "", "you grumblefish"]
FAST = {"retries": 1, "backoff": 0.01, "concurrency": 2, "cache": False}
PLAIN = {"type": "remote", "body": {"input": "{text}"}, "score": "rude", **FAST}
LISTS = {**PLAIN, "body": {"inputs": "{texts}"}, "items": "all", "batch_size": 2}


def rudeness(text):
    return 0.9 if "grumblefish" in text else 0.2


@pytest.fixture
def remote(server):
    """A factory of constraints that ask the server."""
    server.answer = lambda request: ok({"rude": rudeness(request["input"])})
    return lambda spec=PLAIN, **options: build_constraint({**spec, "url": server.url, **options})


def values(constraint, texts=TEXTS):
    return [score.value for score in constraint.score(None, texts)]


def test_one_text_a_request(server, remote):
    scores = remote().score(None, TEXTS)
    assert [score.value for score in scores] == pytest.approx([0.8, 0.1, 0.8, 0.8, 0.1])
    assert [score.complies for score in scores] == [True, False, True, True, False]
    assert sorted(body["input"] for body in server.bodies) == sorted(set(TEXTS)), "each text once, and as it is"


def test_several_texts_a_request_come_back_in_order(server, remote):
    server.answer = lambda request: ok({"all": [{"rude": rudeness(text)} for text in request["inputs"]]})
    texts = [f"{name} {number}" for number in range(6) for name in ("grumblefish", "kettle")] + ["odd"]
    assert values(remote(LISTS), texts) == pytest.approx([1 - rudeness(text) for text in texts])
    assert sorted(len(body["inputs"]) for body in server.bodies) == [1, 2, 2, 2, 2, 2, 2]


def test_a_batch_that_is_refused_is_asked_text_by_text(server, remote):
    def answer(request):
        if "" in request["inputs"]:
            return error(400, "input is empty")
        return ok({"all": [{"rude": rudeness(text)} for text in request["inputs"]]})

    server.answer = answer
    scores = remote(LISTS, batch_size=3).score(None, ["a kettle", "", "you grumblefish"])
    assert [score.value for score in scores] == pytest.approx([0.8, None, 0.1])
    assert scores[1].reason == "HTTP 400"


def test_the_threshold_is_on_the_endpoints_scale(remote, server):
    server.answer = lambda request: ok({"rude": float(request["input"])})
    texts = ["1", "3", "3.1", "5"]
    scores = remote(range=[1, 5]).score(None, texts)
    assert [score.value for score in scores] == pytest.approx([1, 0.5, 0.475, 0])
    assert [score.complies for score in scores] == [True, True, False, False], "at the threshold it complies"
    scores = remote(range=[1, 5], violates="low", threshold=3.1).score(None, texts)
    assert [score.value for score in scores] == pytest.approx([0, 0.5, 0.525, 1])
    assert [score.complies for score in scores] == [False, False, True, True]


@pytest.mark.parametrize(("violates", "value"), [("high", 0.3), ("low", 0.2)])
def test_of_several_numbers_the_one_nearest_to_a_violation_counts(server, remote, violates, value):
    server.answer = lambda request: ok({"kinds": {"insult": 0.7, "threat": 0.2}})
    assert values(remote(score="values(kinds)", violates=violates), ["x"]) == pytest.approx([value])
    server.answer = lambda request: ok({"kinds": {"insult": 0.7, "threat": -0.2}})
    assert values(remote(score="values(kinds)", violates=violates), ["x"]) == [None]


FAULTS = {
    "429": error(429),
    "500": error(500),
    "400": error(400),
    "redirect": (b"", 307, {"Location": "/elsewhere"}),
    "silent": silent,
    "trickle": trickle,
    "reset": reset,
    "cut short": cut_short,
    "no bytes": ok(b""),
    "broken": ok(b'{"rude": 0.'),
    "not UTF-8": ok(b'{"rude": "\xff"}'),
    "a page": ok(b"<html>0.5</html>"),
    "NaN": ok(b'{"rude": NaN}'),
    "infinite": ok(b'{"rude": Infinity}'),
    "too large for a float": ok(b'{"rude": 1e999}'),
    "too large for a float, whole": ok(b'{"rude": 1' + b"0" * 400 + b"}"),
    "out of range": ok({"rude": 1.01}),
    "negative": ok({"rude": -0.01}),
    "null": ok({"rude": None}),
    "true": ok({"rude": True}),
    "a word": ok({"rude": "high"}),
    "a word that float() would take": ok({"rude": "nan"}),
    "two numbers in text": ok({"rude": "0.2 0.9"}),
    "no whole number": ok({"rude": ".5"}),
    "digits of another script": ok({"rude": "٠"}),
    "a mapping": ok({"rude": {"value": 0.5}}),
    "no numbers": ok({"rude": []}),
    "a number and a word": ok({"rude": [0.5, "high"]}),
    "lists in lists": ok({"rude": [[0.5]]}),
    "another key": ok({"rudeness": 0.5}),
    "a list": ok([0.5]),
    "a number": ok(0.5),
    "an error with 200": ok({"error": {"message": "overloaded"}}),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_no_fault_becomes_a_label(server, remote, fault, tmp_path):
    server.answer = lambda request: fault
    timeout = 0.2 if fault in (silent, trickle) else 5
    constraint = remote(cache=str(tmp_path / "labels.sqlite"), timeout=timeout)
    (score,) = constraint.score(None, ["you grumblefish"])
    assert (score.value, score.complies) == (None, None)
    assert score.reason
    server.answer = lambda request: ok({"rude": "0.9"})
    again = remote(cache=str(tmp_path / "labels.sqlite"))
    assert values(again, ["you grumblefish"]) == pytest.approx([0.1]), "and none is kept as one"


WRONG_LISTS = {
    "too few": {"all": [{"rude": 0.1}]},
    "too many": {"all": [{"rude": 0.1}] * 3},
    "none": {"all": []},
    "no list": {"all": {"rude": 0.1}},
    "absent": {},
}


@pytest.mark.parametrize("reply", WRONG_LISTS.values(), ids=WRONG_LISTS)
def test_a_list_of_another_length_has_no_labels(server, remote, reply):
    server.answer = lambda request: ok(reply)
    assert values(remote(LISTS), ["a", "b"]) == [None, None]
    assert len(server.requests) == 1


def test_one_entry_without_a_number_takes_no_place_of_anothers(server, remote):
    server.answer = lambda request: ok({"all": [{"rude": 0.1}, {}, {"rude": 0.9}]})
    assert values(remote(LISTS, batch_size=3), ["a", "b", "c"]) == pytest.approx([0.9, None, 0.1])
    server.answer = lambda request: ok({"all": [{"rude": 0.1}, {}, {"rude": 0.9}, {"rude": 0.9}]})
    assert values(remote(LISTS, batch_size=3), ["a", "b", "c"]) == [None] * 3


@pytest.mark.parametrize("fault", [error(429), error(500), reset, cut_short, ok(b"{")])
def test_a_passing_fault_costs_a_retry_and_no_label(server, remote, fault):
    server.script.append(fault)
    assert values(remote(), ["you grumblefish"]) == pytest.approx([0.1])
    assert len(server.requests) == 2


def test_a_refused_key_stops_the_scoring_and_keeps_the_labels(server, remote, tmp_path):
    constraint = remote(cache=str(tmp_path / "labels.sqlite"), concurrency=1)
    server.script.extend([ok({"rude": 0.2}), error(401, "no credit")])
    with pytest.raises(UserError, match="refuses the key"):
        constraint.score(None, ["a", "b", "c"])
    assert len(server.requests) == 2
    assert values(constraint, ["a", "b", "c"]) == pytest.approx([0.8] * 3)
    assert sorted(body["input"] for body in server.bodies) == ["a", "b", "b", "c"]


class TestPresets:
    def test_openai_moderation(self, server, remote, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)

        def answer(request):
            scores = [{"harassment": rudeness(text), "violence": 0.0} for text in request["input"]]
            return ok({"results": [{"flagged": True, "category_scores": score} for score in scores]})

        server.answer = answer
        constraint = remote({"type": "remote", "preset": "openai-moderation", "api_key_env": "OPENAI_API_KEY", **FAST})
        assert values(constraint) == pytest.approx([0.8, 0.1, 0.8, 0.8, 0.1])
        assert server.bodies == [{"model": "omni-moderation-latest", "input": TEXTS[:-1]}]
        assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"

    def test_openai_chat(self, server, remote):
        def answer(request):
            (message,) = request["messages"]
            text = re.search("<text>(.*)</text>", message["content"], re.DOTALL)[1]
            return completion("**Yes**." if "grumblefish" in text else "no")

        server.answer = answer
        prompt = "Is the text rude, {yes} or {no}?\n<text>{text}</text>"
        chat = {"type": "remote", "preset": "openai-chat", "model": "fair-judge", "prompt": prompt, **FAST}
        assert values(remote(chat)) == [1, 0, 1, 1, 0]
        body = server.bodies[0]
        assert (body["model"], body["temperature"]) == ("fair-judge", 0)
        assert {body["messages"][0]["content"] for body in server.bodies} == {
            prompt.replace("{text}", text) for text in TEXTS
        }

    @pytest.mark.parametrize(
        ("said", "answer", "value"),
        [
            ("yes", "yes-no", 0),
            (" No.\n", "yes-no", 1),
            ("yes and no", "yes-no", None),
            ("Yes, it is rude", "yes-no", None),
            ("1", "yes-no", None),
            ("", "yes-no", None),
            (None, "yes-no", None),
            (True, "yes-no", None),
            ("0.25", "number", 0.75),
            ("1e-1", "number", 0.9),
            ("Score: 0.25", "number", None),
            ("yes", "number", None),
            ("1/4", "number", None),
            (True, "boolean", 0),
            (False, "boolean", 1),
            (0, "boolean", None),
            ("true", "boolean", None),
        ],
    )
    def test_answers_are_read_strictly(self, server, remote, said, answer, value):
        server.answer = lambda request: completion(said)
        chat = {"type": "remote", "preset": "openai-chat", "model": "m", "prompt": "{text}", "answer": answer, **FAST}
        assert values(remote(chat), ["x"]) == [value]

    def test_perspective_with_a_word_on_its_end(self, server, remote, monkeypatch, caplog):
        monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)

        def answer(request):
            value = rudeness(request["comment"]["text"])
            return ok({"attributeScores": {"TOXICITY": {"summaryScore": {"value": value, "type": "PROBABILITY"}}}})

        server.answer = answer
        own = {"preset": "perspective", "requests_per_minute": 6000, "api_key_env": "PERSPECTIVE_API_KEY"}
        constraint = remote({"type": "remote", **own, **FAST})
        constraint.load()
        assert values(constraint, ["you grumblefish"]) == pytest.approx([0.1])
        assert "ends on 31 December 2026; its successors here are preset: openai-moderation" in caplog.text
        path, headers, _ = server.requests[0]
        assert headers["X-Goog-Api-Key"] == KEY
        assert KEY not in path
        assert server.bodies[0]["requestedAttributes"] == {"TOXICITY": {}}

    @pytest.mark.parametrize(
        ("url", "sent"),
        [
            (None, True),
            ("https://api.openai.com/v2/other", True),
            ("https://api.openai.com:443/v1/moderations", True),
            ("https://api.openai.com:8443/v1/moderations", False),
            ("http://api.openai.com/v1/moderations", False),
            ("https://api.openai.com.example/v1/moderations", False),
            ("https://example/api.openai.com", False),
        ],
    )
    def test_a_presets_key_is_for_its_own_host(self, url, sent, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        constraint = build_constraint({"type": "remote", "preset": "openai-moderation", "url": url, **FAST})
        assert constraint._endpoint.has_key == sent

    def test_no_other_host_gets_a_presets_key(self, server, remote, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.answer = lambda request: ok({"results": [{"category_scores": {"harassment": 0.1}}]})
        assert values(remote({"type": "remote", "preset": "openai-moderation", **FAST}), ["x"]) == [0.9]
        assert values(remote(), ["x"]) == [None]
        assert KEY not in str(server.requests)

    def test_the_short_form(self, monkeypatch):
        monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
        constraint = build_constraint("remote:perspective,threshold=0.7,cache=false")
        assert isinstance(constraint, Remote)
        assert constraint.cache is None
        assert constraint.describe()["threshold"] == 0.7
        with pytest.raises(UserError, match="'perspective': the environment variable PERSPECTIVE_API_KEY is not set"):
            constraint.load()


def test_it_travels_to_other_processes(server, remote):
    there = pickle.loads(pickle.dumps(remote(requests_per_minute=6000)))  # noqa: S301
    assert values(there, ["you grumblefish"]) == pytest.approx([0.1])


def test_a_description_builds_the_same_again(remote):
    for spec in (
        PLAIN,
        {**LISTS, "version": 3, "threshold": 0.7, "violates": "low", "headers": {"X-Version": "2"}},
        {"type": "remote", "preset": "openai-chat", "model": "m", "prompt": "{text}", "api_key_env": "OTHER_KEY"},
    ):
        described = json.loads(json.dumps(remote(spec).describe()))
        again = build_constraint(described)
        assert again.describe() == described
        assert again.identity() == remote(spec).identity()
        assert described.get("api_key_env") == spec.get("api_key_env")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "http://host", "api_key_env": "OTHER_KEY"}, "url: http would send the key in OTHER_KEY"),
        ({"url": "ftp://host"}, "'remote': url: must look like"),
        ({"body": None}, "'remote': body: is missing"),
        ({"score": None}, "score: is missing"),
        ({"body": {"input": "Rate: {text}"}}, "body: 'Rate: {text}' pastes text together"),
        ({"body": {"input": "{txt}"}}, "body: holds no text"),
        ({"body": {"m": "{model}", "t": "{text}"}}, "model: is missing"),
        ({"body": {"t": "{prompt}"}}, "prompt: is missing"),
        ({"prompt": "{text}"}, "prompt: the body has no '{prompt}'"),
        ({"model": "another"}, "model: the body has no '{model}'"),
        ({"body": {"t": "{prompt}"}, "prompt": "Rude?"}, "prompt: must hold {text}"),
        ({"body": {"input": "{text}", "day": date(2024, 1, 1)}}, "body: is not JSON"),
        ({"headers": {"X-Name": "é"}}, "headers: must be names and values"),
        ({"batch_size": 2}, "batch_size: only a body with '{texts}'"),
        ({"body": {"t": "{texts}"}, "batch_size": 2}, "items: is missing"),
        ({"score": "a..b"}, "score: is not a JMESPath expression"),
        ({"score": "maximum(a)"}, "score: UnknownFunctionError"),
        ({"items": "max()"}, "items: ArityError"),
        ({"range": [1, 0]}, "range: must be two numbers"),
        ({"threshold": 2}, "threshold: must lie in the range"),
        ({"answer": "word"}, "key 'answer'"),
        ({"preset": "openai"}, "key 'preset'"),
        ({"timeout": 0}, "key 'timeout'"),
        ({"retrys": 3}, "there is no key 'retrys'; did you mean retries"),
    ],
)
def test_a_mistake_is_reported_when_the_recipe_is_read(change, message):
    spec = {key: value for key, value in {**PLAIN, "url": "https://host", **change}.items() if value is not None}
    with pytest.raises(UserError, match=re.escape(message)):
        build_constraint(spec)


@pytest.mark.parametrize(
    "change",
    [
        {"api_key": KEY},
        {"api_key_env": KEY},
        {"headers": {"Authorization": f"Bearer {KEY}"}},
        {"body": {"input": "{text}", "auth": {"api_key": KEY}}},
        {"body": {"input": "{text}", "about": [KEY]}},
        {"url": f"https://host/?token={KEY}"},
        {"version": KEY},
    ],
)
def test_a_key_in_a_recipe_is_refused_unseen(monkeypatch, change):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match="api_key_env") as caught:
        build_constraint({**PLAIN, "url": "https://host", **change})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("echo", [KEY[::-1], KEY.encode().hex(), [KEY[:9], KEY[9:]], {KEY[::-1]: 1}, 1e-300])
def test_a_reason_quotes_no_answer(server, remote, echo):
    server.answer = lambda request: ok({"rude": echo if request["input"] == "a" else [echo, 7.123456]})
    reasons = [score.reason for score in remote(range=[0.1, 1]).score(None, ["a", "b"])]
    kinds = "a text|a list|a mapping"
    assert all(
        re.fullmatch(rf"the reply's score is ({kinds}), which is no number|.* not in \[0.1, 1\]", reason)
        for reason in reasons
    )


def test_the_key_shows_nowhere(server, remote, monkeypatch, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    constraint = remote(cache=str(tmp_path / "labels.sqlite"), api_key_env="OPENAI_API_KEY")
    server.script.extend([error(400, f"{KEY} is no good"), ok({"rude": f"key {KEY}"}), ok({KEY: 1})])
    reasons = [score.reason for score in constraint.score(None, ["a", "b", "c", "d"])]
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
    assert sum(bool(reason) for reason in reasons) == 3
    described = f"{reasons} {constraint.describe()} {constraint.identity()} {vars(constraint)}"
    assert KEY not in f"{described} {caplog.text} {capfd.readouterr()}"
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not any(KEY.encode() in file.read_bytes() for file in files)
