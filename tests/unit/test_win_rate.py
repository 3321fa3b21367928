import json
import random

import pytest

from bridle.errors import RunStopped, UserError
from bridle.evaluation.judges import Verdict
from bridle.evaluation.statistics import bootstrap_interval, wilson_interval
from bridle.evaluation.win_rate import ASKED_AT_ONCE, read_completions, read_methods, win_rates
from judges import FunctionJudge


def longer(first, second):
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


PROMPTS = ["the kettle", "the river", "bread is", "so the ferryman"]
METHODS = {
    "base": ["a", "bb bb", "c", "ddd"],
    "tuned": ["aa", "bb bb", "d", "dd"],
    "held": ["aaa a", "b", "cc", "dddd"],
}


def test_the_matrix_is_the_one_by_hand():
    judge = FunctionJudge(longer)
    found = win_rates(PROMPTS, METHODS, judge)
    # base against tuned: loses, equal texts, a judged tie, wins -> 0 + 0.5 + 0.5 + 1 of 4
    # base against held: loses, wins, loses, loses;  tuned against held: loses, wins, loses, loses
    expected = {("base", "tuned"): 0.5, ("base", "held"): 0.25, ("tuned", "held"): 0.25}
    for (one, other), rate in expected.items():
        assert found.matrix[one][other].rate.value == rate
        assert found.matrix[other][one].rate.value == 1 - rate
        assert found.matrix[one][other].rate.n == 4
    counts = {
        (one, other): (match.wins, match.ties, match.losses, match.identical, match.contradictions)
        for one, row in found.matrix.items()
        for other, match in row.items()
    }
    assert counts == {
        ("base", "tuned"): (1, 2, 1, 1, 0),
        ("tuned", "base"): (1, 2, 1, 1, 0),
        ("base", "held"): (1, 0, 3, 0, 0),
        ("held", "base"): (3, 0, 1, 0, 0),
        ("tuned", "held"): (1, 0, 3, 0, 0),
        ("held", "tuned"): (3, 0, 1, 0, 0),
    }
    assert {name: length.value for name, length in found.mean_length.items()} == {
        "base": 1.25,
        "tuned": 1.25,
        "held": 1.25,
    }
    assert found.asked == len(judge.asked) == 4 * 3 * 2 - 2  # the equal texts are not asked about
    assert all(item.first != item.second for item in judge.asked)
    assert found.position_bias.value == 0.5
    assert (found.missing, found.reasons) == (0, {})


def test_every_pair_is_shown_in_both_orders():
    judge = FunctionJudge(longer)
    win_rates(["p"], {"one": ["x"], "two": ["yy"]}, judge)
    assert [(item.prompt, item.first, item.second) for item in judge.asked] == [("p", "x", "yy"), ("p", "yy", "x")]


def test_the_interval_is_a_bootstrap_over_prompts():
    texts = ["x" * (1 + number % 3) for number in range(60)]
    found = win_rates([f"p{n}" for n in range(60)], {"one": texts, "two": ["xx"] * 60}, FunctionJudge(longer), seed=3)
    scores = [{1: 0.0, 2: 0.5, 3: 1.0}[len(text)] for text in texts]
    match = found.matrix["one"]["two"]
    assert (match.rate.low, match.rate.high) == pytest.approx(bootstrap_interval(scores, seed=3))
    other = found.matrix["two"]["one"].rate
    assert (other.low, other.high) == pytest.approx((1 - match.rate.high, 1 - match.rate.low))


def test_samples_of_one_prompt_are_one_unit():
    rng = random.Random(0)
    texts = [rng.choice(["x", "xxx"]) for _ in range(12)]
    prompts, completions = [f"p{n}" for n in range(12)], {"one": texts, "two": ["xx"] * 12}
    alone = win_rates(prompts, completions, FunctionJudge(longer)).matrix["one"]["two"].rate
    tenfold = {name: texts * 10 for name, texts in completions.items()}
    repeated = win_rates(prompts * 10, tenfold, FunctionJudge(longer)).matrix["one"]["two"].rate
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert (alone.n, repeated.n) == (12, 120)


def test_winning_always_is_not_certainty():
    found = win_rates([f"p{n}" for n in range(20)], {"one": ["xx"] * 20, "two": ["x"] * 20}, FunctionJudge(longer))
    rate = found.matrix["one"]["two"].rate
    assert (rate.value, rate.low, rate.high) == (1.0, *wilson_interval(20, 20))
    assert found.matrix["two"]["one"].rate.high == pytest.approx(1 - rate.low)


def test_a_judge_of_the_place_alone_decides_nothing():
    found = win_rates(PROMPTS, METHODS, FunctionJudge(lambda first, second: "first"))
    match = found.matrix["base"]["held"]
    assert (match.rate.value, match.ties, match.contradictions) == (0.5, 4, 4)
    bias = found.position_bias
    assert (bias.value, bias.n) == (1.0, 22)
    assert (bias.low, bias.high) == wilson_interval(22, 22)


def test_a_planted_position_bias_is_measured():
    rng = random.Random(1)
    judge = FunctionJudge(lambda first, second: "first" if rng.random() < 0.7 else longer(first, second))
    prompts = [f"p{n}" for n in range(200)]
    found = win_rates(prompts, {"long": ["xx"] * 200, "short": ["x"] * 200}, judge)
    bias = found.position_bias
    assert bias.low < 0.85 < bias.high  # shown first: the long text always, the short one at 0.7
    assert bias.low > 0.5
    assert found.matrix["long"]["short"].rate.low > 0.55  # and what the judge prefers shows all the same


def test_missing_verdicts_are_left_out_in_both_orders_and_counted():
    def judge(first, second):
        return Verdict.missing("no answer") if (first, second) == ("odd", "x") else longer(first, second)

    texts = ["odd"] + ["x"] * 9
    prompts = [f"p{n}" for n in range(10)]
    found = win_rates(prompts, {"one": texts, "two": ["x"] + ["xx"] * 9}, FunctionJudge(judge))
    match = found.matrix["one"]["two"]
    assert (match.rate.value, match.rate.n, match.rate.missing) == (0.0, 9, 1)
    assert (match.wins, match.ties, match.losses) == (0, 0, 9)
    assert (found.missing, found.reasons, found.asked) == (1, {"no answer": 1}, 20)
    assert (found.position_bias.n, found.position_bias.missing) == (19, 1)
    assert "verdicts missing: 1 of 20 (1: no answer)" in str(found)


def test_too_many_missing_verdicts_stop_with_all_that_came(tmp_path):
    judge = FunctionJudge(lambda first, second: Verdict.missing("no answer") if first == "x" else "first")
    number, keep = 10 * ASKED_AT_ONCE, tmp_path / "new" / "verdicts.jsonl"
    completions = {"one": ["x"] * number, "two": ["xx"] * number}
    with pytest.raises(RunStopped, match=r"verdicts are missing \(\d+: no answer\).*verdicts\.jsonl") as caught:
        win_rates([f"p{n}" for n in range(number)], completions, judge, keep=keep)
    assert "\n" not in str(caught.value)
    rows = [json.loads(line) for line in keep.read_text().splitlines()]
    assert len(rows) == len(judge.asked) < 2 * number  # it is certain long before the end
    missing = sum(row["winner"] is None for row in rows)
    assert 0.1 * 2 * number < missing <= 0.1 * 2 * number + ASKED_AT_ONCE
    assert rows[:2] == [
        {"judge": "function", "row": 1, "first": "one", "second": "two", "winner": None, "reason": "no answer"},
        {"judge": "function", "row": 1, "first": "two", "second": "one", "winner": "first", "reason": ""},
    ]


@pytest.mark.parametrize(("fails", "stops"), [(2, False), (3, True)])
def test_a_tenth_is_the_most_that_may_be_missing(fails, stops):
    prompts = [f"p{n}" for n in range(10)]
    completions = {"one": ["odd"] * fails + ["x"] * (10 - fails), "two": ["xx"] * 10}
    judge = FunctionJudge(lambda first, second: Verdict.missing("no") if first == "odd" else longer(first, second))
    if stops:
        with pytest.raises(RunStopped, match=r"3 of 20 .* not kept in a file"):
            win_rates(prompts, completions, judge)
    else:
        assert win_rates(prompts, completions, judge).reasons == {"no": 2}


def test_verdicts_are_on_disk_before_the_next_are_asked_for(tmp_path):
    keep = tmp_path / "verdicts.jsonl"
    lines = []

    class Watching(FunctionJudge):
        def compare(self, items):
            lines.append(len(keep.read_text().splitlines()) if keep.exists() else 0)
            if len(lines) == 3:
                raise KeyboardInterrupt
            return super().compare(items)

    number = 2 * ASKED_AT_ONCE
    completions = {"one": ["x"] * number, "two": ["xx"] * number}
    with pytest.raises(KeyboardInterrupt):
        win_rates([f"p{n}" for n in range(number)], completions, Watching(longer), keep=keep)
    assert lines == [0, ASKED_AT_ONCE, 2 * ASKED_AT_ONCE]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        win_rates(PROMPTS, METHODS, FunctionJudge(longer), keep=tmp_path)


def test_equal_completions_need_no_judge():
    judge = FunctionJudge(longer)
    found = win_rates(PROMPTS, {"one": METHODS["base"], "same": METHODS["base"]}, judge)
    match = found.matrix["one"]["same"]
    assert judge.asked == []
    assert (match.rate.value, match.ties, match.identical, match.contradictions) == (0.5, 4, 4, 0)
    assert found.position_bias.value is None


def test_it_reads_well_and_is_json():
    found = win_rates(PROMPTS, METHODS, FunctionJudge(longer))
    lines = str(found).splitlines()
    assert lines[0] == "Win rate of row over column in %, a tie half a win; judge function, 4 pairs each"
    assert lines[1].split() == ["base", "tuned", "held", "mean", "words"]
    assert [line.split()[0] for line in lines[2:5]] == ["base", "tuned", "held"]
    assert lines[2].split()[1] == lines[3].split()[4] == "–"
    assert lines[2].split()[2] == "50.0"
    assert lines[4].split()[1] == lines[4].split()[4] == "75.0"
    assert all(line.endswith("1.2") for line in lines[2:5])
    assert lines[5] == "base against tuned: 1 won, 2 tied (1 identical, 0 by a change of order), 1 lost, 0 left out"
    assert lines[-2].startswith("position bias: 0.5 [")
    assert lines[-1] == "verdicts missing: 0 of 22"
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored["matrix"]["held"]["base"]["rate"]["value"] == 0.75
    assert stored["position_bias"]["n"] == 20
    assert (stored["judge"], stored["pairs"], stored["asked"]) == ("function", 4, 22)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (PROMPTS, {"base": METHODS["base"]}, "two methods"),
        ([], {"one": [], "two": []}, "found 2 and 0"),
        (PROMPTS, METHODS | {"short": ["a"]}, "short has 1 completions for 4 prompts"),
    ],
)
def test_what_cannot_be_compared_is_refused(prompts, completions, message):
    with pytest.raises(UserError, match=message):
        win_rates(prompts, completions, FunctionJudge(longer))


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_generated_files_are_read_with_their_empty_texts(tmp_path):
    rows = [{"prompt": "the kettle", "completion": " sings — très fort"}, {"prompt": "", "completion": ""}]
    path = write(tmp_path / "base.jsonl", rows)
    assert read_completions(path) == (["the kettle", ""], [" sings — très fort", ""])


def test_methods_share_their_prompts(tmp_path):
    files = {
        name: write(
            tmp_path / f"{name}.jsonl",
            [{"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, texts, strict=True)],
        )
        for name, texts in METHODS.items()
    }
    assert read_methods(files) == (PROMPTS, METHODS)
    write(files["tuned"], [{"prompt": prompt, "completion": "x"} for prompt in [*PROMPTS[:2], "else", PROMPTS[3]]])
    with pytest.raises(UserError, match=r"tuned\.jsonl row 3: its prompt is not that of .*base\.jsonl"):
        read_methods(files)
    write(files["tuned"], [{"prompt": prompt, "completion": "x"} for prompt in PROMPTS[:3]])
    with pytest.raises(UserError, match=r"tuned\.jsonl row 4: "):
        read_methods(files)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "text": "x"}], r"base\.jsonl has no column 'completion'"),
        (
            [{"prompt": "p", "completion": "x"}, {"prompt": "p", "completion": None}],
            r"row 2: .*'completion' holds NoneT",
        ),
        ([{"prompt": 3, "completion": "x"}], r"row 1: column 'prompt' holds int, not text"),
    ],
)
def test_a_file_without_completions_names_its_row(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_completions(write(tmp_path / "base.jsonl", rows))


def test_no_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        read_completions(tmp_path / "none.jsonl")
