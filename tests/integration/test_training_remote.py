"""A run whose scorer fails stops with everything kept, and goes on without paying for a label twice."""

import json
import re
from collections import Counter

import pytest
import yaml

from loopback import error, ok

KEY = "sk-invented-0123456789"


class Scorer:
    """Says how rude a text is, until it has said so `patience` times."""

    def __init__(self, server, patience=10**6):
        self.labelled, self.patience = Counter(), patience
        server.answer = self.answer

    def answer(self, request):
        if self.labelled.total() >= self.patience:
            return error(503, "out of order")
        self.labelled[request["input"]] += 1
        return ok({"rude": 0.9 if "e" in request["input"] else 0.2})


@pytest.fixture
def train(bridle, recipe, server, tmp_path, monkeypatch):
    """Runs `bridle train` with a remote constraint into a folder; labels are kept in a file beside it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(folder, *options):
        scorer = {"type": "remote", "url": server.url, "body": {"input": "{text}"}, "score": "rude"}
        scorer |= {"retries": 1, "backoff": 0.01, "concurrency": 1, "cache": str(tmp_path / f"{folder}.sqlite")}
        return bridle("train", recipe(constraints={"no e": scorer}), "--output_dir", tmp_path / folder, *options)

    return run


def rollouts(folder, index):
    lines = (folder / "rollouts" / f"round-{index}.rude.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stopped_in", [1, 2])
def test_it_stops_and_goes_on(train, server, tmp_path, stopped_in):
    whole = Scorer(server)
    code, _, err = train("whole")
    assert code == 0, err
    first_round = {rollout["completion"] for rollout in rollouts(tmp_path / "whole", 1)}

    failing = Scorer(server, patience=10 if stopped_in == 1 else len(first_round) + 3)
    code, _, err = train("stopped")
    assert code == 3
    reason = r"(not sent: \d+ requests in a row have failed; the last: )?HTTP 503"
    assert re.search(rf"rollouts got no score \(first reason: {reason}\); fix the constraint and resume", err)
    kept = rollouts(tmp_path / "stopped", stopped_in)
    assert len(kept) == 32
    assert {type(rollout["complies"]) for rollout in kept} == {bool, type(None)}
    assert all(rollout["reason"] for rollout in kept if rollout["complies"] is None)

    failing.patience = 10**6
    code, _, err = train("stopped", "--resume")
    assert code == 0, err
    assert failing.labelled == whole.labelled, "each text once, as if nothing had happened"
    assert set(whole.labelled.values()) == {1}
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert rollouts(tmp_path / "stopped", stopped_in) == rollouts(tmp_path / "whole", stopped_in)


def test_a_few_missing_scores_are_masked_and_counted(train, server, tmp_path):
    scorer = Scorer(server)
    score = scorer.answer
    refused = []

    def answer(request):
        if not refused:
            refused.append(request["input"])
        return error(400, "not this one") if request["input"] in refused else score(request)

    server.answer = answer
    code, _, err = train("run", "--rounds", "1")
    assert code == 0, err
    missing = [rollout for rollout in rollouts(tmp_path / "run", 1) if rollout["value"] is None]
    assert missing
    assert {rollout["reason"] for rollout in missing} == {"HTTP 400"}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["rude/rollouts_missing"] for record in records if "round" in record] == [len(missing)]


def test_a_refused_key_stops_before_any_label_is_wrong(train, server, tmp_path):
    server.answer = lambda request: error(401, f"wrong key {KEY}")
    code, _, err = train("run")
    assert code == 2
    assert "refuses the key (HTTP 401)" in err.splitlines()[-1]
    assert KEY not in err
    assert all(rollout["value"] is None for rollout in rollouts(tmp_path / "run", 1))
    assert len(server.requests) == 1


def test_the_key_is_in_no_file_of_the_run(train, server, tmp_path):
    Scorer(server)
    assert train("run")[0] == 0
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["constraints"]["no e"]["url"] == server.url
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
