"""Labels on disk: asked for once, by any number of processes, and never wrong."""

import multiprocessing
import os
import re
import signal
import sqlite3
import sys
import time
from collections import Counter
from functools import partial

import pytest

from bridle.constraints import Cached, Classifier, Length, PythonFunction, ScoreCache, WordList, build_constraint
from bridle.constraints import cache as cache_module
from bridle.errors import UserError
from loopback import error, ok

TEXTS = [f"text {number}" for number in range(40)]
FORK = multiprocessing.get_context("fork")  # the packages are there already


@pytest.fixture
def remote(server, tmp_path):
    """A factory of constraints that ask the server and share one cache."""
    server.answer = lambda request: ok({"rude": 0.3})
    spec = {"type": "remote", "url": server.url, "body": {"t": "{text}"}, "score": "rude", "retries": 0}
    return lambda **options: build_constraint({**spec, "cache": str(tmp_path / "labels.sqlite"), **options})


def test_what_another_process_labelled_while_this_one_waited_is_not_asked(tmp_path, monkeypatch):
    cache, look_up = ScoreCache(tmp_path / "labels.sqlite"), cache_module._look_up
    known = dict(cache.through({}, ["a"], lambda texts: [(text, (1.0, 1.0)) for text in texts]))
    looks = iter([lambda *given: {}, look_up])
    monkeypatch.setattr(cache_module, "_look_up", lambda *given: next(looks)(*given))
    assert [*dict(cache.through({}, ["a"], lambda texts: pytest.fail("asked")))] == [*known]
    assert next(looks, None) is None


def asked(server):
    return Counter(body["t"] for body in server.bodies)


def values(constraint, texts=TEXTS):
    return [score.value for score in constraint.score(None, texts)]


def test_what_is_known_is_not_asked_again(server, remote):
    assert values(remote()) == [0.7] * 40
    assert values(remote(name="the same scorer", timeout=3, concurrency=2), [*TEXTS, "new"]) == [0.7] * 41
    assert asked(server) == Counter([*TEXTS, "new"])


def test_what_a_number_means_can_be_changed_for_nothing(server, remote):
    (strict,) = remote(threshold=0.2).score(None, ["x"])
    (mild,) = remote(threshold=0.4).score(None, ["x"])
    (reverse,) = remote(violates="low", range=[0, 3]).score(None, ["x"])
    (outside,) = remote(range=[1, 5]).score(None, ["x"])
    assert (strict.complies, mild.complies) == (False, True)
    assert reverse.value == pytest.approx(0.1)
    assert outside.is_missing
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"body": {"t": "{text}", "x": 1}}, {"score": "rude || other"}, {"headers": {"V": "2"}}]
)
def test_another_scorer_is_asked_itself(server, remote, change):
    remote().score(None, ["x"])
    remote(**change).score(None, ["x"])
    assert len(server.requests) == 2


def test_what_has_no_label_is_asked_again(server, remote):
    server.script.append(error(500))
    server.script.append(ok({"rude": 7}))
    assert values(remote(), ["x"]) == [None]
    assert values(remote(), ["x"]) == [None]
    assert values(remote(), ["x"]) == [0.7]
    assert len(server.requests) == 3


def test_any_text_has_a_key(remote, server):
    texts = ["", "\ud800", "x\0y", "é", "e\u0301", "x" * 100_000]
    assert values(remote(), texts) == [0.7] * 6
    assert values(remote(), texts) == [0.7] * 6
    assert len(server.requests) == 6


def test_texts_are_not_stored(remote, tmp_path):
    remote().score(None, ["you grumblefish"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(b"grumblefish" in path.read_bytes() for path in files)


def test_the_default_file_is_in_the_cache_folder(remote, tmp_path, monkeypatch):
    remote(cache=True).score(None, ["x"])
    assert (tmp_path / "cache" / "scores.sqlite").is_file()
    assert remote(cache=False).cache is None
    monkeypatch.delenv("BRIDLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ScoreCache().path == tmp_path / "xdg" / "bridle" / "scores.sqlite"


def score_in_a_process(constraint, results):
    results.put([score.reason or score.value for score in constraint.score(None, TEXTS)])


def run(processes):
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_four_processes_at_once_pay_once(server, remote):
    """Two scorers, each asked by two processes: both turns and simultaneous writes."""
    results = FORK.SimpleQueue()
    constraints = [remote(version=number % 2) for number in range(4)]
    run([FORK.Process(target=score_in_a_process, args=(constraint, results)) for constraint in constraints])
    assert [results.get() for _ in constraints] == [[0.7] * 40] * 4
    assert asked(server) == Counter(dict.fromkeys(TEXTS, 2)), "once for each scorer"


def label_of(text, number):
    yield text, (float(number), float(text.split()[1]))


def write_in_a_process(path, number):
    for text in TEXTS:
        assert dict(ScoreCache(path).through({"number": number}, [text], lambda texts: label_of(texts[0], number)))


def test_simultaneous_writers_lose_nothing(tmp_path):
    path = tmp_path / "new" / "labels.sqlite"
    run([FORK.Process(target=write_in_a_process, args=(path, number)) for number in range(4)])
    for number in range(4):
        found = dict(ScoreCache(path).through({"number": number}, TEXTS, lambda texts: pytest.fail(f"lost {texts}")))
        assert found == {text: (number, float(text.split()[1])) for text in TEXTS}


def test_a_killed_process_keeps_its_labels(server, remote):
    server.answer = lambda request: time.sleep(0.02) or ok({"rude": 0.3})
    process = FORK.Process(target=values, args=(remote(concurrency=1),))
    process.start()
    while len(server.requests) < 10:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert values(remote()) == [0.7] * 40
    twice = [text for text, times in asked(server).items() if times > 1]
    assert len(twice) <= 1, "at most the one that was under way"


class TestAFileThatIsNone:
    def refused(self, constraint, path, match):
        before = path.read_bytes()
        with pytest.raises(UserError, match=f"cache {re.escape(str(path))}: cannot be used .*{match}.*move it away"):
            constraint.load()
        with pytest.raises(UserError, match="cannot be used"):
            constraint.score(None, ["x"])
        assert path.read_bytes() == before

    def test_no_database(self, remote, tmp_path):
        path = tmp_path / "labels.sqlite"
        path.write_text("notes\n" * 100)
        self.refused(remote(), path, "not a database")

    def test_another_programs_database(self, remote, tmp_path):
        path = tmp_path / "labels.sqlite"
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE labels (id)")
        database.close()
        self.refused(remote(), path, "another program's")

    def test_a_damaged_database(self, server, remote, tmp_path):
        path = tmp_path / "labels.sqlite"
        remote().score(None, TEXTS)
        whole = path.read_bytes()
        path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        with pytest.raises(UserError, match=r"labels.sqlite: cannot be used .*malformed"):
            remote().score(None, TEXTS)

    def test_no_possible_place(self, remote, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"file/labels\.sqlite: cannot be used"):
            remote(cache=str(tmp_path / "file" / "labels.sqlite")).load()

    @pytest.mark.parametrize("stored", ["[NaN]", "[]", "0.5", '["high"]', "no JSON"])
    def test_a_label_that_is_none(self, remote, tmp_path, stored):
        remote().score(None, ["x"])
        with sqlite3.connect(tmp_path / "labels.sqlite") as database:
            database.execute("UPDATE labels SET label = ?", (stored,))
        database.close()
        with pytest.raises(UserError, match=f"holds .{re.escape(stored)}. for a label"):
            remote().score(None, ["x"])


class TestAnyConstraint:
    """`cache:` beside any type."""

    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        """A function that scores by length and counts its calls in a file."""
        monkeypatch.syspath_prepend(tmp_path)
        source = "def score(texts):\n    open(__file__ + '.log', 'a').write('x' * len(texts))\n"
        (tmp_path / "lengthy.py").write_text(source + "    return [None if not t else len(t) / 10 for t in texts]\n")
        yield tmp_path / "lengthy.py"
        sys.modules.pop("lengthy", None)

    def calls(self, module):
        return len((module.parent / "lengthy.py.log").read_text())

    def test_it_is_asked_once_a_text(self, module, tmp_path):
        spec = {"type": "python", "function": "lengthy:score", "cache": str(tmp_path / "labels.sqlite")}
        constraint = build_constraint(spec, name="short")
        assert isinstance(constraint, Cached)
        scores = constraint.score(None, ["aaaaaaa", "aaa", "", "aaa"])
        assert [(score.value, score.complies) for score in scores] == [
            (0.7, True),
            (0.3, False),
            (None, None),
            (0.3, False),
        ]
        assert scores[2].reason == "constraint 'short' gave no score"
        assert build_constraint(spec, name="short").score(None, ["aaaaaaa", "aaa", "", "aaa"]) == scores
        assert self.calls(module) == 4, "three texts, and the missing one again"
        assert constraint.describe() == {"type": "python", "function": "lengthy:score", "name": "short"}
        build_constraint({**spec, "version": 2}).score(None, ["aaa"])
        assert self.calls(module) == 5

    def test_what_was_scored_before_an_interruption_is_kept(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cache_module, "AT_ONCE", 2)
        asked = []

        def score(texts):
            asked.extend(texts)
            if "stop" in texts:
                raise KeyboardInterrupt
            return [1.0] * len(texts)

        made = partial(Cached, cache=tmp_path / "labels.sqlite", version=1)
        with pytest.raises(KeyboardInterrupt):
            made(PythonFunction(score)).score(None, ["a", "b", "stop", "c"])
        made(PythonFunction(score)).score(None, ["a", "b", "c"])
        assert asked == ["a", "b", "stop", "c", "c"]

    def test_a_function_that_was_edited_is_another(self, module, tmp_path):
        spec = {"type": "python", "function": "lengthy:score", "cache": str(tmp_path / "labels.sqlite")}
        assert values(build_constraint(spec), ["aaa"]) == [0.3]
        module.write_text(module.read_text().replace("/ 10", "/ 100"))
        del sys.modules["lengthy"]
        assert values(build_constraint(spec), ["aaa"]) == [0.03]

    def test_a_list_of_words_that_was_edited_is_another(self, tmp_path):
        words = tmp_path / "mild.txt"
        spec = {"not": {"type": "words", "file": str(words)}, "cache": str(tmp_path / "labels.sqlite")}
        found = []
        for word in ("grumblefish", "muddlehead"):
            words.write_text(word)
            found += values(build_constraint(spec), ["you grumblefish"])
        assert found == [1, 0]

    def test_a_classifier_that_was_trained_anew_is_another(self, tmp_path):
        (tmp_path / "weights").write_text("a")
        classifier = build_constraint({"type": "classifier", "model": str(tmp_path), "label": "toxic", "cache": True})
        before = classifier.identity()
        assert classifier.identity() == before
        (tmp_path / "weights").write_text("ab")
        assert classifier.identity() != before
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text("{}")
        names = [name for name, _ in classifier.identity()["cached"]["files"]]
        assert names == ["1_Pooling/config.json", "weights"]

    def test_a_classifier_is_known_wherever_it_lies(self, tmp_path):
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "weights").write_text("a")
        os.utime(tmp_path / "there" / "weights", (1, 1))
        (tmp_path / "there" / ".cache").mkdir()
        (tmp_path / "there" / ".cache" / "weights.metadata").write_text("when it was fetched")
        here, there = (Classifier(tmp_path / name, "toxic", name="kind") for name in ("here", "there"))
        assert here.identity() == there.identity()

    def test_code_that_changes_during_a_run_is_not_taken_for_what_runs(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        module, spec = tmp_path / "in_use.py", {"type": "python", "function": "in_use:score"}
        module.write_text("def score(texts): return [1.0] * len(texts)")
        running = build_constraint({**spec, "cache": str(tmp_path / "labels.sqlite")})
        running.load()
        module.write_text("def score(texts): return [0.0] * len(texts)\n")
        running.load()  # as a demo does before each score
        assert values(running, ["a"]) == [1.0]
        monkeypatch.delitem(sys.modules, "in_use")
        assert values(build_constraint({**spec, "cache": str(tmp_path / "labels.sqlite")}), ["a"]) == [0.0]

    @pytest.mark.parametrize("function", [lambda texts: texts, partial(map, len), Counter().get])
    def test_a_function_without_a_name_of_its_own_needs_a_version(self, tmp_path, function):
        for constraint in (PythonFunction(function), ~PythonFunction(function) | WordList(["a"])):
            with pytest.raises(UserError, match=r"^cache: .* give a version"):
                Cached(constraint, str(tmp_path / "labels.sqlite"))
        Cached(PythonFunction(function), str(tmp_path / "labels.sqlite"), version=1)

    def test_combinations_know_their_parts(self, tmp_path):
        one, other = WordList(["grumblefish"]), WordList(["muddlehead"])
        assert (one & other).identity() != (one & one).identity()
        constraint = Cached(one | ~other, str(tmp_path / "labels.sqlite"))
        for _ in range(2):
            assert [score.complies for score in constraint.score(None, ["muddlehead", "grumblefish"])] == [True, False]

    @pytest.mark.parametrize("change", [{"threshold": 0.2}, {"violates": "low"}, {"range": [0, 3]}])
    def test_a_combination_follows_what_a_part_s_numbers_mean(self, server, remote, tmp_path, change):
        def scored(**options):
            whole = remote(**options) & Length(max_words=9)
            return whole.identity(), *Cached(whole, str(tmp_path / "wholes.sqlite")).score(None, ["x"])

        before, after = scored(), scored(**change)
        assert before[0] != after[0]
        assert after[1] == remote(**change).score(None, ["x"])[0] != before[1]
        assert len(server.requests) == 1

    def test_a_version_needs_a_cache(self):
        with pytest.raises(UserError, match="there is no key 'version'"):
            build_constraint({"type": "regex", "pattern": "x", "version": 1})
