import json
import logging
import re
import time

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from bridle.errors import UserError
from bridle.evaluation.judges import ChatJudge, Comparison, LikelihoodJudge, LocalJudge, Verdict, read_verdict
from loopback import completion, error, reset

KEY = "sk-invented-0123456789"
ITEM = Comparison("the kettle", "sings while it rains", "sings")
ITEMS = [
    ITEM,
    Comparison("bread is", "baked before dawn in the lower town", "a door twice"),
    Comparison("you grumblefish,", "", "bring the ladder back"),
    Comparison("the river {bends}", "north below the mill \ud800", "and slows — très lentement"),
    Comparison("muddlehead or not,", "he carried the lantern home", "he laughed"),
]


# The chat judge, against a real server on the loopback interface


def longer_wins(request):
    """A judge that prefers the longer text, and takes longer over shorter ones."""
    first, second = re.findall(r"<text_.>\n(.*)\n</text_.>", request["messages"][0]["content"])
    time.sleep(0.02 / (1 + len(first)))
    winner = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return completion(json.dumps({"winner": winner}))


@pytest.fixture
def chat_judge(server):
    """A factory of judges of the server."""
    server.answer = longer_wins

    def make(**options):
        return ChatJudge(f"{server.url}/v1/", "fair-judge", sleep=lambda seconds: None, **{"timeout": 5.0, **options})

    return make


def test_it_speaks_the_protocol(server, chat_judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert chat_judge(api_key_env="OPENAI_API_KEY").compare([ITEM]) == [Verdict("first")]
    ((path, headers, body),) = server.requests
    body = json.loads(body)
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("fair-judge", 0)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert all(text in message["content"] for text in (ITEM.prompt, ITEM.first, ITEM.second))


def test_examples_are_earlier_turns_of_the_chat(server, chat_judge):
    chat_judge(examples=[(ITEMS[1], "second")]).compare([ITEM])
    question, answer, last = json.loads(server.requests[0][2])["messages"]
    assert (question["role"], answer, last["role"]) == (
        "user", {"role": "assistant", "content": '{"winner": "B"}'}, "user"
    )  # fmt: skip
    assert ITEMS[1].first in question["content"]
    assert ITEM.first in last["content"]


def test_no_key_is_sent_unless_its_variable_is_named(server, chat_judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    chat_judge().compare([ITEM])
    assert KEY not in str(server.requests)


def test_the_command_line_sends_no_key_unasked(server, bridle, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.answer = longer_wins
    for name, text in {"short": "a", "long": "a b c"}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "p", "completion": text}) + "\n")
    methods = [f"{name}={tmp_path / name}.jsonl" for name in ("short", "long")]
    asked = ["judge", *methods, "--judge", "m", "--url", server.url, "--keep", tmp_path / "verdicts.jsonl"]
    code, _, err = bridle(*asked)
    assert code == 0, err
    assert server.requests
    assert KEY not in str(server.requests)
    for option, value in (("batch_size", 4), ("device", "cpu"), ("dtype", "bfloat16")):
        assert bridle(*asked, f"--{option}", value)[::2] == (
            2, f"bridle: --{option} needs the model's weights, which a server does not show; leave it out\n"
        )  # fmt: skip
    (tmp_path / "verdicts.jsonl").unlink()
    assert bridle(*asked, "--api_key_env", "OPENAI_API_KEY")[0] == 0
    assert server.requests[-1][1]["Authorization"] == f"Bearer {KEY}"


def test_many_at_once_keep_their_order(server, chat_judge):
    items = [Comparison("p", "x" * (1 + index % 7), "x" * (1 + index % 5)) for index in range(40)]
    sizes = [len(item.first) - len(item.second) for item in items]
    expected = ["tie" if size == 0 else "first" if size > 0 else "second" for size in sizes]
    assert [verdict.winner for verdict in chat_judge(concurrency=8).compare(items)] == expected


def test_an_endpoint_that_fails_gives_no_verdict(server, chat_judge):
    server.script.extend([error(500, "out of\norder"), reset, *[error(500, "out of\norder")] * 2])
    assert chat_judge(retries=3).compare([ITEM]) == [Verdict.missing("HTTP 500")]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((b"[]", 200, {}), "no chat completion in the answer"),
        (completion(None), "no chat completion in the answer"),
        (completion("Both have their charm."), "the reply holds no verdict"),
        (completion('{"winner": "A"}\n{"winner": "B"}'), "the reply holds several verdicts"),
        (error(400, "unsupported value: temperature", code="unsupported_value"), "HTTP 400 unsupported_value"),
        ((b"", 307, {"Location": "/elsewhere"}), "HTTP 307"),
    ],
)
def test_an_unreadable_answer_is_missing_and_not_asked_again(server, chat_judge, answer, reason):
    server.script.append(answer)
    assert chat_judge().compare([ITEM]) == [Verdict.missing(reason)]
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "word"), [(401, "refuses"), (403, "refuses"), (404, "does not know")])
def test_wrong_settings_stop_at_once(server, chat_judge, monkeypatch, status, word):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script.append(error(status, f"bad key {KEY}"))
    with pytest.raises(UserError, match=f"{word} .*OPENAI_API_KEY") as caught:
        chat_judge(api_key_env="OPENAI_API_KEY").compare([ITEM])
    assert KEY not in str(caught.value)


def test_the_key_shows_nowhere(server, chat_judge, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OTHER_KEY", f" {KEY}\n")
    judge = chat_judge(api_key_env="OTHER_KEY")
    server.script.append(error(400, f"{KEY} has no credit"))
    (verdict,) = judge.compare([ITEM])
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert verdict.reason == "HTTP 400"
    assert KEY not in repr(vars(judge)) + repr(vars(judge.endpoint)) + caplog.text


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}é", f"{KEY}\x01z"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters") as caught:
        ChatJudge("http://127.0.0.1/v1", "m", "OPENAI_API_KEY")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["file:///etc/hosts", "localhost:8000", "https://me:word@host/v1", "https://host/v1?key=word", "http://a b"]
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(UserError, match=r"url: .*(must look like|looks like a secret)") as caught:
        ChatJudge(url, "m")
    assert "word" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ('{"winner": "A"}', "first"),
        ('Some thought first.\n```json\n{"winner": "b", "why": "it fits"}\n```', "second"),
        ("tie", "tie"),
        ("Let me see.\n\n**B**\n", "second"),
        ('"A".', "first"),
        ('A\n{"winner": "A"}', "first"),
        ('{"winner": "C"}', None),
        ('{"winner": 1}', None),
        ("A is nice, B is too", None),
        ("A\nB", None),
        ("", None),
        ('{"winner": "\\ud800"}', None),
    ],
)
def test_verdicts_are_read_or_missing(reply, winner):
    verdict = read_verdict(reply)
    assert verdict.winner == winner
    assert bool(verdict.reason) == verdict.is_missing == (winner is None)


# The local judge


@pytest.fixture(scope="module")
def make_judge(tiny_model, tiny_tokenizer):
    def make(model_type="llama", **options):
        length = {"max_position_embeddings": 512} | ({"n_positions": 512} if model_type == "gpt2" else {})
        model = tiny_model(model_type, vocab_size=len(tiny_tokenizer), initializer_range=0.5, **length)
        return LocalJudge(model, tiny_tokenizer, **options)

    return make


def differences(judge, items):
    return [judge._differences([judge._encode(item)]).item() for item in items]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_likelihood_of_the_verdict_decides(make_judge, tiny_tokenizer, model_type):
    judge = make_judge(model_type, tie_margin=0.0)
    for item, difference in zip(ITEMS, differences(judge, ITEMS), strict=True):
        with torch.no_grad():
            log_p = judge.model(torch.tensor([judge._encode(item)])).logits[0, -1].log_softmax(-1)
        a, b = log_p[list(judge._letters)].tolist()
        assert difference == pytest.approx(a - b, abs=1e-4)
        assert judge.compare([item]) == [Verdict("first" if difference > 0 else "second")]


def test_it_reads_the_template_and_then_names_a_text(make_judge, tiny_tokenizer):
    judge = make_judge()
    ids = judge._encode(ITEM)
    assert ids.count(tiny_tokenizer.bos_token_id) == 1
    for letter, name in zip(judge._letters, "AB", strict=True):
        text = tiny_tokenizer.decode([*ids, letter], skip_special_tokens=True)
        assert text.endswith(f"The better text is text {name}")
        assert f"Beginning:\n{ITEM.prompt}\n\nText A:\n{ITEM.first}\n\nText B:\n{ITEM.second}\n" in text


def test_examples_stand_before_the_question_with_their_verdicts(make_judge, tiny_tokenizer):
    judge = make_judge(examples=[(ITEMS[3], "second"), (ITEMS[1], "first")])
    ids = judge._encode(ITEM)
    assert ids.count(tiny_tokenizer.bos_token_id) == 1
    text = tiny_tokenizer.decode(ids, skip_special_tokens=True)
    one, other, question, after = text.split("The better text is text")
    assert "the river {bends}" in one
    assert other.startswith(" B\n\n")
    assert "bread is" in other
    assert question.startswith(" A\n\n")
    assert ITEM.first in question
    assert not after.strip()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_batches_and_padding_change_nothing(make_judge, model_type):
    judge = make_judge(model_type)
    rows, sizes = [judge._encode(item) for item in ITEMS], differences(judge, ITEMS)
    assert len({len(row) for row in rows}) > 1
    assert judge._differences(rows).tolist() == pytest.approx(sizes, abs=1e-4)
    judge.tie_margin = margin = sum(sorted(map(abs, sizes))[1:3]) / 2  # two ties and three verdicts
    alone = [judge.compare([item])[0] for item in ITEMS]
    for batch_size in (2, 5):
        assert make_judge(model_type, batch_size=batch_size, tie_margin=margin).compare(ITEMS) == alone
    assert len({verdict.winner for verdict in alone}) > 1


def test_equal_texts_are_judged_alike_in_either_order(make_judge):
    one = Comparison("the kettle", "sings", "sings")
    other = Comparison(one.prompt, one.second, one.first)
    first, second = make_judge().compare([one, other])
    assert first == second
    judge = make_judge()
    a, b = judge._letters
    judge.model.lm_head.weight.data[b] = judge.model.lm_head.weight.data[a]  # no preference for a place
    assert judge.compare(ITEMS) == [Verdict("tie")] * len(ITEMS)


def test_a_difference_within_the_margin_is_a_tie(make_judge):
    sizes = sorted(abs(difference) for difference in differences(make_judge(), ITEMS))
    verdicts = make_judge(tie_margin=(sizes[1] + sizes[2]) / 2).compare(ITEMS)
    assert [verdict.winner for verdict in verdicts].count("tie") == 2


def test_long_completions_are_cut_and_the_question_never(make_judge, tiny_tokenizer):
    question = len(make_judge()._encode(Comparison(ITEM.prompt, "", "")))
    judge = make_judge(max_length=question + 11)
    long, short = "old oak door " * 20, "oak"
    long_ids, short_ids = judge._ids(long), judge._ids(short)
    assert len(short_ids) < 5
    both = judge._encode(Comparison(ITEM.prompt, long, long[::-1]))
    assert len(both) == question + 10  # 5 tokens each; an odd one over goes to neither
    one = judge._encode(Comparison(ITEM.prompt, short, long))
    assert len(one) == question + 11
    kept = tiny_tokenizer.decode(long_ids[: 11 - len(short_ids)])
    assert f"Text A:\n{short}\n\nText B:\n{kept}\n\nThe better" in tiny_tokenizer.decode(one)
    assert judge.truncated == 2
    assert len(judge.compare([Comparison(ITEM.prompt, short, long)])) == 1
    assert judge.truncated == 3


def test_a_prompt_without_room_for_completions_is_missing(make_judge):
    question = len(make_judge()._encode(Comparison("the kettle", "", "")))
    judge = make_judge(max_length=question + 2)
    fits, fills = judge.compare([ITEM, Comparison("the old kettle of the keeper", "a", "b")])
    assert not fits.is_missing
    assert fills == Verdict.missing(f"the prompt leaves no room in {question + 2} tokens")


def test_the_context_is_the_models_own(make_judge):
    judge = make_judge()
    long = "the kettle sings " * 100
    assert len(judge._encode(Comparison("so", long, long))) in (511, 512)
    assert judge.truncated == 1


def test_a_likelihood_that_is_not_finite_is_missing(make_judge):
    judge = make_judge()
    judge.model.lm_head.weight.data[judge._letters[0]] = float("nan")
    assert judge.compare([ITEM]) == [Verdict.missing("the judge's likelihoods are not finite")]


def test_dropout_is_off(make_judge):
    judge = make_judge("gpt2", tie_margin=0.0)
    assert not judge.model.training
    assert differences(judge, ITEMS) == differences(judge, ITEMS)


def test_verdicts_that_are_one_token_are_needed(tiny_model):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    with pytest.raises(UserError, match=r"does not tell .*text A' and .*text B' apart"):
        LocalJudge(tiny_model(vocab_size=2), tokenizer)


# The judge by likelihoods


@pytest.fixture(scope="module")
def make_likelihood_judge(tiny_model, tiny_tokenizer):
    def make(**options):
        model = tiny_model(vocab_size=len(tiny_tokenizer), initializer_range=0.5, max_position_embeddings=512)
        return LikelihoodJudge(model, tiny_tokenizer, **options)

    return make


def mean_log_p(judge, prompt, text):
    """Of the text's tokens, each after the prompt and those before it."""
    ids, rest = judge.tokenizer(prompt)["input_ids"], judge.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = judge.model(torch.tensor([ids + rest])).logits[0].log_softmax(-1)
    return sum(log_p[len(ids) - 1 + place, token].item() for place, token in enumerate(rest)) / len(rest)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_completion_that_is_likelier_per_token_wins_in_either_order(make_likelihood_judge, batch_size):
    judge = make_likelihood_judge(batch_size=batch_size)
    items = [ITEMS[0], ITEMS[4], Comparison("the kettle", "sings sings", "a door twice")]
    swapped = [Comparison(item.prompt, item.second, item.first) for item in items]
    verdicts = judge.compare([*items, *swapped])
    for item, shown, other in zip(items, verdicts[:3], verdicts[3:], strict=True):
        first, second = (mean_log_p(judge, item.prompt, text) for text in (item.first, item.second))
        assert shown.winner == ("first" if first > second else "second")
        assert other.winner == ("second" if first > second else "first")


def test_a_completion_without_tokens_loses(make_likelihood_judge):
    assert make_likelihood_judge().compare([ITEMS[2], Comparison("so", "", "")]) == [Verdict("second"), Verdict("tie")]


def test_a_completion_whose_likelihood_is_not_finite_is_missing(make_likelihood_judge):
    judge = make_likelihood_judge()
    judge.model.lm_head.weight.data[5] = float("nan")
    assert judge.compare([ITEM]) == [Verdict.missing("the judge's likelihoods are not finite")]
