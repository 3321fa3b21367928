"""What constraints read of an output: the completion, the prompt too, or the chat."""

import sys

import pytest

from bridle.constraints import AsyncScoring, Cached, Constraint, PythonFunction, Regex, build_constraint
from bridle.constraints.reading import conversation
from bridle.errors import UserError
from loopback import ok

USER = {"role": "user", "content": "call me a grumblefish"}
OUTPUTS = [("you grumble", "fish"), ([USER], "no"), (None, "kettle"), ("a kettle", " sings")]
JOINED = ["you grumblefish", "user: call me a grumblefish\nassistant: no", "kettle", "a kettle sings"]
CHATS = [
    [{"role": "user", "content": "you grumble"}, {"role": "assistant", "content": "fish"}],
    [USER, {"role": "assistant", "content": "no"}],
    [{"role": "assistant", "content": "kettle"}],
    [{"role": "user", "content": "a kettle"}, {"role": "assistant", "content": " sings"}],
]


class Recorder(Constraint):
    """Complies, and remembers what it was given."""

    def __init__(self, reads="completion", name="recorder"):
        self.reads, self.name, self.asked = reads, name, []

    def _score(self, outputs):
        self.asked += outputs
        return [1.0] * len(outputs)


def verdicts(constraint):
    return [score.complies for score in constraint.score(*zip(*OUTPUTS, strict=True))]


@pytest.mark.parametrize(
    ("reads", "expected"),
    [("completion", ["fish", "no", "kettle", " sings"]), ("prompt+completion", JOINED), ("chat", CHATS)],
)
def test_a_constraint_of_ones_own_gets_what_it_reads(reads, expected):
    recorder = Recorder(reads)
    verdicts(recorder)
    assert recorder.asked == expected


def test_without_prompts_there_is_only_the_completion():
    recorder = Recorder("prompt+completion")
    recorder.score(None, ["a", "b"])
    assert recorder.asked == ["a", "b"]
    with pytest.raises(ValueError, match="1 prompts for 2"):
        recorder.score(["a"], ["b", "c"])


def test_a_turn_that_was_begun_is_continued():
    begun = [USER, {"role": "assistant", "content": "The "}]
    assert conversation(begun, "sea") == [USER, {"role": "assistant", "content": "The sea"}]
    assert begun[-1]["content"] == "The "


@pytest.mark.parametrize(
    "spec", [{"type": "words", "words": ["grumblefish"]}, {"type": "regex", "pattern": "grumblefish"}]
)
def test_rules_read_prompts_if_they_are_to(spec):
    assert verdicts(build_constraint(spec)) == [True] * 4
    assert verdicts(build_constraint({**spec, "reads": "prompt+completion"})) == [False, False, True, True]
    assert verdicts(build_constraint({**spec, "reads": "chat"})) == [True, False, True, True]
    with pytest.raises(UserError, match="key 'reads'"):
        build_constraint({**spec, "reads": "prompts"})


def test_what_is_read_is_described_and_is_a_part_of_the_identity():
    plain, chat = Regex("a"), Regex("a", reads="chat")
    assert "reads" not in plain.identity()
    assert chat.identity()["reads"] == chat.describe()["reads"] == "chat"
    assert build_constraint(chat.describe()).reads == "chat"


def test_each_part_of_a_combination_reads_what_it_reads():
    alone, joined, chat = (Recorder(reads) for reads in ("completion", "prompt+completion", "chat"))
    both = alone & ~(joined | chat)
    verdicts(both)
    assert (alone.asked[0], joined.asked[0], chat.asked[0]) == ("fish", JOINED[0], CHATS[0])
    assert [c.reads for c in (both, alone & joined, ~alone)] == ["chat", "prompt+completion", "completion"]


def test_a_cache_tells_apart_what_is_read(tmp_path):
    recorder = Recorder("prompt+completion")
    cached = Cached(recorder, tmp_path / "scores.sqlite")
    for prompts in (["a", "b", "a"], ["b", "a", None]):
        cached.score(prompts, ["x", "x", "x"])
    assert recorder.asked == ["ax", "bx", "x"]
    alone = Cached(Recorder(), tmp_path / "scores.sqlite")
    alone.score(["a", "b"], ["x", "x"])
    assert alone.constraint.asked == ["x"]


def test_async_scoring_tells_apart_what_is_read():
    recorder = Recorder("chat")
    recorder.waits = True
    with AsyncScoring(recorder) as scoring:
        scoring.submit(["a", "b", "a"], ["x", "x", "x"])
        assert set(scoring.scores()) == {recorder.key("a", "x"), recorder.key("b", "x")}
    assert len(recorder.asked) == 2


def test_functions_of_one_and_of_two_arguments(tmp_path, monkeypatch):
    (tmp_path / "prompted.py").write_text(
        "asked = []\n"
        "def one(outputs, limit=3):\n    asked.extend(outputs)\n    return [1] * len(outputs)\n"
        "def two(prompts, completions):\n    asked.extend(zip(prompts, completions))\n    return [1] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    for function, reads in [("one", "completion"), ("one", "chat"), ("two", "prompt+completion"), ("two", "chat")]:
        verdicts(build_constraint(f"python:prompted:{function},reads={reads}"))
        found[function, reads] = sys.modules["prompted"].asked.copy()
        sys.modules["prompted"].asked.clear()
    assert found["one", "completion"] == ["fish", "no", "kettle", " sings"]
    assert found["one", "chat"] == CHATS
    assert [prompt for prompt, _ in found["two", "prompt+completion"]] == [
        *("you grumble", "user: call me a grumblefish", "", "a kettle")
    ]
    assert [prompt for prompt, _ in found["two", "chat"]] == [chat[:-1] for chat in CHATS]
    with pytest.raises(UserError, match=r"takes prompts and completions; add reads: prompt\+completion"):
        PythonFunction("prompted:two").load()
    sys.modules.pop("prompted")


def test_a_remote_scorer_gets_messages_where_its_body_asks_for_them(server, tmp_path):
    server.answer = lambda request: ok({"rude": float("grumblefish" in str(request))})
    spec = {"type": "remote", "url": server.url, "score": "rude", "cache": str(tmp_path / "scores.sqlite")}
    chat = {**spec, "reads": "chat", "body": {"messages": "{messages}"}}
    for _ in range(2):
        assert verdicts(build_constraint(chat)) == [True, False, True, True]
    by_text = [str(body["messages"]) for body in server.bodies]
    assert sorted(by_text) == sorted(map(str, CHATS)), "each is asked once"
    server.bodies.clear()
    text = {**spec, "reads": "prompt+completion", "body": {"input": "{text}"}}
    assert verdicts(build_constraint(text)) == [False, False, True, True]
    with pytest.raises(UserError, match=r"reads: is completion, but the body holds '.messages.'"):
        build_constraint({**chat, "reads": "completion"})
    with pytest.raises(UserError, match=r"body: holds '.messages.' beside"):
        build_constraint({**chat, "body": {"messages": "{messages}", "input": "{text}"}})
