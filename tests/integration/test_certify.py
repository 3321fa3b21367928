"""`bridle certify` with tiny models: it certifies, writes, verifies, and refuses what would make a statement false."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256

import pytest

from bridle.certification.certificate import Certificate, PromptRecord, Tried, check_different, prompts_hash
from bridle.certification.goal import Goal
from bridle.certification.oracle import OracleErrors, errors_of
from bridle.constraints import PythonFunction
from bridle.errors import UserError
from bridle.evaluation.examination import LabelledRows
from bridle.models.auxiliary import new_auxiliary
from bridle.models.loading import load_model
from loopback import ok

CANDIDATES = ("--guide", "auxiliary", "--guidance_scale", "0,1")
LENIENT = ("--rate", 0.9, "--confidence", 0.6, "--max_new_tokens", 4)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(path, first, last):
    return write_rows(path, [{"prompt": f"ship {number}"} for number in range(first, last)])


@pytest.fixture
def world(tiny_folder, tmp_path, monkeypatch):
    """A model with a card, an R, and prompts for development and certification."""
    monkeypatch.chdir(tmp_path)
    model = tiny_folder()
    (model / "README.md").write_text("# A model\n\n## Intended use\n\nResearch.\n", encoding="utf-8")
    new_auxiliary(load_model(str(model)), head_rank=4).save_pretrained(tmp_path / "auxiliary")
    prompts(tmp_path / "development.jsonl", 0, 20)
    prompts(tmp_path / "unseen.jsonl", 20, 60)
    return model


@pytest.fixture
def certify(bridle, world):
    def run(*options, model=world, constraint="regex:e"):
        return bridle("certify", model, "--prompts", "unseen.jsonl", "--constraint", constraint, *LENIENT, *options)

    return run


def read(tmp_path):
    return json.loads((tmp_path / "certificate.json").read_text())


class TestOneModel:
    def test_it_is_certified_and_verified(self, certify, bridle, world, tmp_path):
        code, out, err = certify()
        assert code == 0, err
        found = read(tmp_path)
        (tried,) = found["tried"]
        rows = [json.loads(line) for line in (tmp_path / "certificate.completions.jsonl").read_text().splitlines()]
        assert tried["n"] == len(rows) == 40 == len({row["prompt"] for row in rows})
        assert tried["violations"] == sum("e" in row["completion"] for row in rows) > 0
        assert tried["bound"] <= 0.9
        assert found["certified"] == tried["candidate"] == str(world)
        assert found["environment"]["time"]
        assert found["decoding"]["max_new_tokens"] == 4
        assert "at most 90% of the completions" in found["statement"] in out
        assert any("oracle" in limit for limit in found["not_covered"])

        for scored in ([], ["--constraint", "regex:e"]):
            code, out, err = bridle("certify", "--verify", "certificate.json", *scored)
            assert code == 0, err
            assert "agrees with its 40 completions" in out
        code, _, err = bridle("certify", "--verify", "certificate.json", "--constraint", "regex:a")
        assert code == 2
        assert "--constraint: is not the certificate's" in err

    def test_the_card_has_one_block(self, certify, world, tmp_path):
        for name in ("first.json", "second.json"):
            assert certify("--output", name)[0] == 0
        card = (world / "README.md").read_text(encoding="utf-8")
        assert card.count("## Certificate") == 1
        assert card.index("# A model") < card.index("## Certificate") < card.index("## Intended use")
        assert "second.json" in card.replace("\\", "")
        assert str(tmp_path) not in card
        assert "Any single output" in card

    def test_the_card_names_no_folder_of_the_oracle_s_labels(self, certify, world, tmp_path):
        assert certify("--output", "first.json")[0] == 0
        made = Certificate.load(tmp_path / "first.json")
        errors = OracleErrors("/home/someone/a.jsonl, /home/someone/clients/b.jsonl", 10, 9, 10, 1)
        assert replace(made, oracle=errors).public().oracle.source == "a.jsonl, b.jsonl"

    def test_a_tampered_completion_is_noticed(self, certify, bridle, tmp_path):
        certify()
        place = tmp_path / "certificate.completions.jsonl"
        rows = [json.loads(line) for line in place.read_text().splitlines()]
        write_rows(place, [{**row, "completion": "a kettle"} if row is rows[3] else row for row in rows])
        code, _, err = bridle("certify", "--verify", "certificate.json")
        assert code == 2
        assert "a completion was changed" in err

    def test_a_forged_weight_is_noticed(self, certify, bridle, tmp_path):
        certify()
        place, found = tmp_path / "certificate.completions.jsonl", read(tmp_path)
        rows = [json.loads(line) for line in place.read_text().splitlines()]
        write_rows(place, [{**row, "weight": 0.01} for row in rows])
        forged = {**found, "completions_sha256": sha256(place.read_bytes()).hexdigest()}
        (tmp_path / "certificate.json").write_text(json.dumps(forged))
        code, _, err = bridle("certify", "--verify", "certificate.json")
        assert code == 2
        assert "row 1: weight: must lie between 1 and 1, not 0.01" in err

    def test_a_verdict_that_the_constraint_does_not_give_is_noticed(self, certify, bridle, tmp_path):
        certify()
        place, found = tmp_path / "certificate.completions.jsonl", read(tmp_path)
        rows = [json.loads(line) for line in place.read_text().splitlines()]
        write_rows(place, [{**row, "complies": True, "value": 1.0} for row in rows])
        forged = {**found, "completions_sha256": sha256(place.read_bytes()).hexdigest()}
        (tmp_path / "certificate.json").write_text(json.dumps(forged))
        code, _, err = bridle("certify", "--verify", "certificate.json", "--constraint", "regex:e")
        assert code == 2
        assert "complies is True, but the constraint says False" in err

    def test_cached_verdicts_are_not_taken_for_the_constraint_s(self, certify, bridle, server, tmp_path):
        remote = {"type": "remote", "url": server.url, "body": {"t": "{text}"}, "score": "rude", "cache": "part.sqlite"}
        spec = json.dumps({"all": [remote, "regex:zzz"], "cache": "whole.sqlite"})
        verify = ("certify", "--verify", "certificate.json", "--constraint", spec)
        server.answer = lambda request: ok({"rude": 0.2})
        certify(constraint=spec)
        assert bridle(*verify)[0] == 0
        server.answer = lambda request: ok({"rude": 0.7})
        code, _, err = bridle(*verify)
        assert code == 2
        assert "complies is True, but the constraint says False" in err

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"tried": {"violations": 0}}, "statement: does not follow from the numbers"),
            ({"tried": {"missing": 5}}, "tried.0.missing: 5 should be 0"),
            ({"tried": {"bound": 0.001}}, "tried.0.bound: 0.001 should be"),
            ({"goal": {"rate": 0.01}}, "statement: does not follow from the numbers"),
            ({"prompts": {"sha256": "0"}}, "prompts.sha256: is not that of the prompts"),
            ({"statement": "It never violates."}, "statement: does not follow from the numbers"),
            ({"format": 7}, "format 7 is not 1"),
        ],
    )
    def test_tampered_numbers_and_words_are_noticed(self, certify, bridle, tmp_path, change, said):
        certify()
        found = read(tmp_path)
        for key, value in change.items():
            part = found[key][0] if isinstance(found[key], list) else found[key]
            found[key] = (
                value if not isinstance(part, dict) else [{**part, **value}] if key == "tried" else part | value
            )
        (tmp_path / "certificate.json").write_text(json.dumps(found))
        code, _, err = bridle("certify", "--verify", "certificate.json")
        assert code == 2
        assert said in err

    def test_what_is_not_shown_is_not_certified(self, certify, world, tmp_path):
        code, out, _ = certify("--rate", 0.2, constraint="regex:.")
        assert code == 1
        assert "Nothing is certified" in out
        assert read(tmp_path)["certified"] is None
        assert "Certificate" not in (world / "README.md").read_text()

    def test_missing_scores_count_as_violations(self, certify, tmp_path):
        (tmp_path / "silent.py").write_text("def score(texts):\n    return [None] * len(texts)\n")
        assert certify(constraint="python:silent:score")[0] == 1
        (tried,) = read(tmp_path)["tried"]
        assert tried["violations"] == tried["missing"] == 40
        assert tried["bound"] == 1

    def test_anytime_stops_as_soon_as_it_is_settled(self, certify, bridle, tmp_path):
        code, _, err = certify("--anytime", "--batch_size", 1)
        assert code == 0, err
        assert read(tmp_path)["tried"][0]["n"] < 40
        assert bridle("certify", "--verify", "certificate.json")[0] == 0
        code, *_ = certify("--anytime", "--batch_size", 1, "--rate", 0.3, "--output", "b.json", constraint="regex:.")
        assert code == 1
        assert json.loads((tmp_path / "b.json").read_text())["tried"][0]["n"] < 40, "it cannot pass any more"

    def test_importance(self, certify, bridle, tmp_path):
        code, _, err = certify("--method", "importance", "--guide", "auxiliary", "--seek", 0.4)
        assert code == 0, err
        rows = [json.loads(line) for line in (tmp_path / "certificate.completions.jsonl").read_text().splitlines()]
        assert 0 < min(row["weight"] for row in rows) <= max(row["weight"] for row in rows) <= 1 / 0.6
        assert bridle("certify", "--verify", "certificate.json", "--constraint", "regex:e")[0] == 0

    def test_the_true_rate_is_stated_beside_the_oracle_s(self, certify, bridle, tmp_path):
        texts = [
            {"text": f"{'kettle' if number % 2 else 'bird'} {number}", "label": number % 2} for number in range(60)
        ]
        write_rows(tmp_path / "labels.jsonl", [*texts, *texts])
        code, out, err = certify("--oracle_labels", "labels.jsonl")
        assert code == 0, err
        found = read(tmp_path)
        assert found["oracle"] == {
            "source": "labels.jsonl", "violating": 30, "found": 30, "complying": 30, "false_alarms": 0, "missing": 0
        }  # fmt: skip
        assert found["tried"][0]["true_bound"] > found["tried"][0]["bound"]
        assert "violate in truth" in out
        assert bridle("certify", "--verify", "certificate.json")[0] == 0
        mapping = "{path: labels.jsonl, label: label, violating: 0}"
        code, out, _ = certify("--oracle_labels", mapping, "--output", "b.json")
        assert "bound no true rate" in out

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda found, rows: (found, rows[:30]), "tried.0: has 30 completions of 40 prompts"),
            (lambda found, rows: ({**found, "candidates": 3}, rows), "is not the beginning of ranked"),
        ],
    )
    def test_what_no_certification_does_is_noticed(self, certify, bridle, tmp_path, change, said):
        """The numbers agree with the completions, and yet show nothing."""
        certify("--rate", 0.999, "--confidence", 0.51)
        place = tmp_path / "certificate.completions.jsonl"
        found, rows = change(read(tmp_path), [json.loads(line) for line in place.read_text().splitlines()])
        write_rows(place, rows)
        prompts = found["prompts"] | {"sha256": prompts_hash([(row["row"], row["prompt"]) for row in rows])}
        counted = {"n": len(rows), "violations": sum("e" in row["completion"] for row in rows)}
        forged = Certificate(**{
            **{key: found[key] for key in vars(Certificate.load(tmp_path / "certificate.json"))},
            "goal": Goal(**found["goal"]),
            "tried": [Tried(**{**found["tried"][0], **counted})],
            "prompts": PromptRecord(**prompts),
            "completions_sha256": sha256(place.read_bytes()).hexdigest(),
        })  # fmt: skip
        forged.save(tmp_path / "certificate.json")
        code, _, err = bridle("certify", "--verify", "certificate.json")
        assert code == 2
        assert said in err


class TestCandidates:
    @pytest.fixture
    def run(self, world, tmp_path):
        """Three checkpoints whose violations differ: each says "e" more readily than the last."""
        for step, shift in ((1, -4.0), (2, -1.0), (3, 8.0)):
            folder = tmp_path / "run" / f"checkpoint-{step}"
            shutil.copytree(world, folder)
            model = load_model(str(folder))
            head = model.get_output_embeddings()
            head.weight.data *= 0.1
            head.weight.data[5] += shift * 0.01
            model.save_pretrained(folder)
        return tmp_path / "run"

    def test_the_last_that_passes_in_order_is_certified(self, bridle, run, tmp_path):
        code, _, err = bridle(
            *("certify", "--candidates", "run/checkpoint-*", "--prompts", "unseen.jsonl", "--constraint", "regex:e"),
            *("--development", "development.jsonl", *LENIENT),
        )
        assert code == 0, err
        found = read(tmp_path)
        rates = [one["rate"] for one in found["ranked"]]
        assert rates == sorted(rates)
        assert found["candidates"] == len(found["ranked"]) == 3
        assert [one["candidate"] for one in found["tried"]] == [one["candidate"] for one in found["ranked"]]
        assert found["certified"] == found["tried"][-1]["candidate"]
        assert found["development"]["prompts"] == 20
        assert bridle("certify", "--verify", "certificate.json")[0] == 0

    def test_the_card_tells_them_apart(self, bridle, run, tmp_path):
        """Runs with other settings have models of the same name."""
        for name in "ab":
            shutil.copytree(run / "checkpoint-1", tmp_path / "runs" / name / "model")
        (tmp_path / "runs/a/model/README.md").write_text("# A model\n\n## Intended use\n", encoding="utf-8")
        shutil.copy(tmp_path / "runs/a/model/README.md", tmp_path / "runs/b/model")
        code, _, err = bridle(
            *("certify", "--candidates", "runs/*/model", "--prompts", "unseen.jsonl", "--constraint", "regex:e"),
            *("--development", "development.jsonl", *LENIENT),
        )
        assert code == 0, err
        card = (tmp_path / read(tmp_path)["certified"] / "README.md").read_text(encoding="utf-8").replace("\\", "")
        assert "a/model" in card
        assert "b/model" in card
        assert str(tmp_path) not in card

    def test_they_are_left_out_if_they_write_no_better(self, certify, corpus_files, run, tmp_path):
        code, out, err = certify(
            *("--candidates", "run/checkpoint-*", "--development", "development.jsonl"),
            *("--perplexity", f"{corpus_files['plain']},rows=:4"),
        )
        assert code == 0, err
        bits = [one["bits_per_byte"] for one in read(tmp_path)["ranked"]]
        assert bits == sorted(bits, reverse=True)
        assert len(bits) < 4
        assert "left out" in out

    def test_guidance_scales_are_candidates(self, certify, tmp_path):
        code, _, err = certify(
            *("--guide", "auxiliary", "--guidance_scale", "0,1,2", "--development", "development.jsonl")
        )
        assert code == 0, err
        names = {one["candidate"].partition(" guided by ")[2] for one in read(tmp_path)["ranked"]}
        assert names == {"", "auxiliary at η=1", "auxiliary at η=2"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--prompts", "twice.jsonl"), "row 41: repeats the prompt of row 1"),
            (
                ("--prompts", "both.jsonl", "--development", "development.jsonl", *CANDIDATES),
                "is also row 1 of the development prompts",
            ),
            (("--development", "development.jsonl"), "--development orders several candidates"),
            (("--rate", "0.001"), "holds 40 prompts, but 916 are needed"),
            (("--guidance_scale", "2"), "--guidance_scale is the strength of a --guide"),
            (("--guide", "auxiliary", "--guidance_scale", "0,x"), "'0,x' is not a list of numbers"),
            (("--guide", "auxiliary", "--guidance_scale", "-1"), "guidance_scale: must be a finite number"),
            (("--guide", "auxiliary", "--guidance_scale", "0,1"), "2 candidates need --development prompts"),
            (("--guide", "auxiliary", "--guidance_scale", "1,1"), "is given twice"),
            (("--candidates", "nowhere/*"), "nothing matches nowhere/*"),
            (("--method", "importance"), "--method importance needs a --guide"),
            (("--method", "importance", "--guide", "auxiliary", "--top_p", "0.9"), "draws from the whole distribution"),
            (("--method", "importance", "--guide", "auxiliary", "--dtype", "bfloat16"), "leave --dtype at float32"),
            (("--seek", "0.2"), "--seek is for --method importance"),
            (("--perplexity", "unseen.jsonl"), "--perplexity orders several candidates"),
            (("--confidence", "1"), "confidence: must lie between 0 and 1"),
            (("--output", "unseen.jsonl"), "unseen.jsonl: exists"),
            (("--verify", "certificate.json"), "--verify reads a certificate; leave out confidence"),
            (("--oracle_labels", "unseen.jsonl"), "label"),
        ],
    )
    def test_in_one_line(self, certify, tmp_path, options, said):
        own, other = ((tmp_path / name).read_text() for name in ("unseen.jsonl", "development.jsonl"))
        (tmp_path / "twice.jsonl").write_text(own + own)
        (tmp_path / "both.jsonl").write_text(own + other)
        before = {path.name for path in tmp_path.iterdir()}
        code, _, err = certify(*options)
        assert code == 2, err
        (line,) = [line for line in err.splitlines() if line.startswith("bridle: ")]
        assert said in line
        assert {path.name for path in tmp_path.iterdir()} == before

    def test_without_a_model_it_says_how_many_prompts_are_needed(self, bridle):
        code, out, _ = bridle("certify", "--rate", 0.01)
        assert code == 0
        assert "299 prompts if none violates" in out
        assert "by the weights" in bridle("certify", "--rate", 0.001, "--method", "importance")[1]

    @pytest.mark.parametrize("missing", ["--prompts", "--constraint"])
    def test_prompts_and_constraint_are_needed(self, bridle, missing):
        given = {"--prompts": "unseen.jsonl", "--constraint": "regex:e"}
        del given[missing]
        code, _, err = bridle("certify", "model", *(word for pair in given.items() for word in pair))
        assert code == 2
        assert "--prompts and --constraint are needed" in err


def test_a_chat_is_the_same_prompt_whatever_the_order_of_its_keys():
    chat = [{"role": "user", "content": "ship 1"}]
    turned = [{"content": "ship 1", "name": None, "role": "user"}]
    check_different([(1, chat), (2, "ship 1"), (3, [{"role": "system", "content": "ship 1"}])], "unseen.jsonl")
    with pytest.raises(UserError, match=r"unseen\.jsonl row 2: repeats the prompt of row 1"):
        check_different([(1, chat), (2, turned)], "unseen.jsonl")


def test_texts_without_a_score_show_nothing_of_an_oracle(tmp_path):
    """Each counts as its error, whatever the label, so that a judge that is down bounds no true rate."""
    texts = [{"text": f"{'kettle' if number % 2 else 'bird'} {number}", "label": number % 2} for number in range(60)]
    path = write_rows(tmp_path / "labels.jsonl", texts)
    rows = LabelledRows(path=str(path), label="label", violating=1)
    down = PythonFunction(lambda completions: [None] * len(completions), name="down")
    found = errors_of(down, rows)
    assert (found.found, found.false_alarms, found.missing) == (0, 0, 60)
    assert found.true_bound(Goal(0.1, 0.9), [0.0] * 500, 1) == 1.0
    half = PythonFunction(lambda texts: [None if "kettle" in t else 1.0 for t in texts], name="half")
    assert errors_of(half, rows).bounds(0.9)[0] == 0.0, "it finds none of those that it scores"
