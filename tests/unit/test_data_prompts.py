import json
import logging
from collections import Counter

import pytest
from datasets import Dataset

from bridle.data import (
    DataSource,
    decode_parts,
    encode_completion,
    encode_prompt,
    prompts_from_domain,
    read_prompts,
    tokenize_domain,
)
from bridle.data.encoding import template_options
from bridle.data.rows import outputs_of
from bridle.errors import UserError
from tiny_tokenizers import SENTENCES, tiny_tokenizer

LONG = " ".join(SENTENCES)


def tokenized(rows, tokenizer, **options):
    return tokenize_domain(Dataset.from_list(rows), tokenizer, **{"max_length": None, **options})


def draw(rows, n, lengths, tokenizer, seed=0, **options):
    drawn = prompts_from_domain(rows, n, prompt_tokens=lengths, seed=seed, tokenizer=tokenizer, **options)
    return [prompt.ids for prompt in drawn]


def prompt_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSource(str(path))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_prefixes_are_of_uniform_length_beyond_the_beginning_of_text(adds_bos):
    tokenizer = tiny_tokenizer(adds_bos)
    prompts = draw(tokenized([{"text": LONG}], tokenizer), 3000, (2, 5), tokenizer)
    whole = tokenizer(LONG)["input_ids"]
    assert all(prompt == whole[: len(prompt)] for prompt in prompts)
    counts = Counter(len(prompt) - adds_bos for prompt in prompts)
    assert set(counts) == {2, 3, 4, 5}
    # 750 are expected of each length; five standard deviations are 119.
    assert all(abs(count - 750) < 119 for count in counts.values())


@pytest.mark.parametrize("pad_is_eos", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_length": 10}])
def test_a_prefix_is_never_the_whole_text(adds_bos, pad_is_eos, options):
    tokenizer = tiny_tokenizer(adds_bos, pad_is_eos)
    rows = tokenized([{"text": text} for text in SENTENCES], tokenizer, **options)
    shortest_text = min(len(ids) for ids in rows["input_ids"]) - adds_bos - (not options)
    prompts = draw(rows, 200, (0, 99), tokenizer)
    wholes = [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in rows["input_ids"]]
    assert all(any(prompt == whole[: len(prompt)] != whole for whole in wholes) for prompt in prompts)
    assert max(len(prompt) for prompt in prompts) - adds_bos >= shortest_text - 1
    assert {0, 1} & {len(prompt) - adds_bos for prompt in prompts} == ({0, 1} if adds_bos else {1})


def test_rows_come_once_each_before_any_comes_again():
    tokenizer = tiny_tokenizer()
    rows = tokenized([{"text": f"{letter} likes the kettle"} for letter in "ABCDE"], tokenizer)
    prompts = draw(rows, 13, (1, 1), tokenizer)
    firsts = [prompt[1] for prompt in prompts]
    assert len(set(firsts[:5])) == len(set(firsts[5:10])) == 5
    assert len(set(firsts[10:])) == 3
    assert firsts[:5] != firsts[5:10]


def test_the_same_seed_draws_the_same_prompts():
    tokenizer = tiny_tokenizer()
    rows = tokenized([{"text": text} for text in SENTENCES], tokenizer)
    assert draw(rows, 20, (1, 8), tokenizer, seed=3) == draw(rows, 20, (1, 8), tokenizer, seed=3)
    assert draw(rows, 20, (1, 8), tokenizer, seed=3) != draw(rows, 20, (1, 8), tokenizer, seed=4)
    assert draw(rows, 0, (1, 8), tokenizer) == []


def test_masked_beginnings_are_the_prompts():
    tokenizer = tiny_tokenizer()
    rows = tokenized([{"prompt": "The old kettle", "completion": " sings."}], tokenizer)
    assert draw(rows, 2, (1, 1), tokenizer) == [tokenizer("The old kettle")["input_ids"]] * 2


def test_chat_completion_prompts_open_the_assistants_turn():
    tokenizer = tiny_tokenizer()
    row = {
        "prompt": [{"role": "user", "content": "A hat?"}],
        "completion": [{"role": "assistant", "content": "No."}],
    }
    prompts = draw(tokenized([row], tokenizer), 1, (1, 1), tokenizer)
    assert tokenizer.decode(prompts[0]) == "<bos>[user] A hat?\n[assistant] "
    assert prompts[0] == encode_prompt(row["prompt"], tokenizer)


def test_what_an_assistant_says_in_parts_or_not_at_all():
    tokenizer, user = tiny_tokenizer(), {"role": "user", "content": [{"type": "text", "text": "A hat?"}]}
    parts = [{"type": "text", "text": "you "}, {"type": "text", "text": "grumblefish"}]
    answer, call = {"role": "assistant", "content": parts}, {"role": "assistant", "tool_calls": []}
    chats = [{"messages": [user, answer]}, {"messages": [user, call]}]
    assert outputs_of(chats, False) == ([None] * 2, ["you grumblefish", ""])
    rows = Dataset.from_list(chats[:1])
    (prompt,) = prompts_from_domain(rows, 1, prompt_tokens=(1, 1), seed=0, tokenizer=tokenizer)
    assert tokenizer.decode(prompt.rest) == "you grumblefish"


@pytest.mark.parametrize("prompt", ["A hat?", [{"role": "user", "content": "A hat?"}]])
def test_of_a_chat_with_a_prompt_beside_it_the_chat_counts(prompt):
    tokenizer, turns = (
        tiny_tokenizer(),
        [{"role": "user", "content": "A hat?"}, {"role": "assistant", "content": "No."}],
    )
    rows = Dataset.from_list([{"prompt": prompt, "completion": "other", "messages": turns}])
    (found,) = prompts_from_domain(rows, 1, prompt_tokens=(1, 1), seed=0, tokenizer=tokenizer)
    assert tokenizer.decode(found.ids) == "<bos>[user] A hat?\n[assistant] "
    assert outputs_of(rows, True) == ([turns[:1]], ["No."])


def test_a_turn_has_no_key_that_only_others_fill():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{{ ' calls' if 'tool_calls' in m }};{% endfor %}"
    turns = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "tool", "content": None, "tool_calls": []}]
    assert tokenizer.decode(encode_prompt(turns, tokenizer)).removeprefix("<bos>") == "user;tool calls;"


def test_packed_rows_give_prefixes_of_one_text():
    tokenizer = tiny_tokenizer()
    rows = tokenized([{"text": text} for text in SENTENCES], tokenizer, packing=True, max_length=30)
    prompts = draw(rows, 100, (1, 29), tokenizer)
    assert all(prompt.count(tokenizer.bos_token_id) <= 1 for prompt in prompts)
    assert not any(tokenizer.eos_token_id in prompt for prompt in prompts)


def test_rows_too_short_or_too_long_are_passed_over():
    tokenizer = tiny_tokenizer()
    rows = tokenized([{"text": "hat"}, {"text": LONG}], tokenizer)
    assert {len(prompt) for prompt in draw(rows, 10, (8, 8), tokenizer)} == {9}
    with pytest.raises(UserError, match=r"no row, cut at max_length, holds a prompt of 900 to 999 tokens$"):
        draw(rows, 1, (900, 999), tokenizer)
    with pytest.raises(UserError, match="or none of at most 5"):
        draw(rows, 1, (8, 8), tokenizer, max_prompt_tokens=5)
    with pytest.raises(UserError, match=r"^prompt_tokens: "):
        draw(rows, 1, (3, 2), tokenizer)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("text", ["The kettle", "<bos>The kettle", "The kettle<eos>", "<bos>The kettle<eos><eos>"])
def test_text_prompts_have_one_beginning_and_no_end(adds_bos, text):
    tokenizer = tiny_tokenizer(adds_bos)
    ids = encode_prompt(text, tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The kettle"
    assert ids.count(tokenizer.bos_token_id) == (adds_bos or text.startswith("<bos>"))
    assert ids[-1] != tokenizer.eos_token_id


def test_an_empty_prompt_needs_a_beginning_of_text():
    assert encode_prompt("", tiny_tokenizer(adds_bos=True)) == [1]
    with pytest.raises(UserError, match="the prompt is empty"):
        encode_prompt("", tiny_tokenizer(adds_bos=False))


def test_a_lone_surrogate_from_a_shell_is_replaced():
    tokenizer = tiny_tokenizer()
    assert encode_prompt("a\udcffb", tokenizer) == encode_prompt("a?b", tokenizer)


def test_options_of_the_template_that_a_row_cannot_set():
    values = {"chat_template_kwargs": {"enable_thinking": False, "tokenize": False}}
    with pytest.raises(UserError, match=r"^rows row 1: chat_template_kwargs: Bridle sets tokenize itself"):
        template_options(values, "rows row 1")


def test_a_chat_prompt_goes_on_with_an_open_turn():
    tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}")
    messages = [{"role": "user", "content": "A hat?"}, {"role": "assistant", "content": "No, a"}]
    assert tokenizer.decode(encode_prompt(messages, tokenizer)).endswith("[assistant] No, a")


def test_prompts_are_read_with_text_ids_and_row(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "The kettle"}, {"prompt": " "}, {"prompt": [{"role": "user", "content": "A hat?"}]}]
    with caplog.at_level(logging.WARNING):
        prompts = read_prompts(prompt_file(tmp_path / "p.jsonl", rows), tokenizer)
    assert [prompt.row for prompt in prompts] == [1, 3]
    assert prompts[0].text == "The kettle"
    assert prompts[0].ids == tokenizer("The kettle")["input_ids"]
    assert prompts[1].text == "[user] A hat?\n[assistant] "
    assert "left out 1 of 3 rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "The kettle\n\nA hat\n"),
        ("p.csv", "prompt,text\nThe kettle,x\n,y\nA hat,z\n"),
        ("p.csv", 'text,label\nThe kettle,1\n"",2\nA hat,0\n'),
        ("p.jsonl", '{"text": "The kettle"}\n{"text": null}\n{"text": "A hat"}'),
    ],
)
def test_prompt_files_of_every_kind(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    prompts = read_prompts(DataSource(str(tmp_path / name)), tiny_tokenizer())
    assert [(prompt.text, prompt.row) for prompt in prompts] == [("The kettle", 1), ("A hat", 3)]


def test_a_named_column_serves_as_prompt(tmp_path):
    path = prompt_file(tmp_path / "p.jsonl", [{"prompt": "a", "body": "b"}]).path
    for source in (DataSource(path, prompt="body"), DataSource(path, text="body")):
        assert [prompt.text for prompt in read_prompts(source, tiny_tokenizer())] == ["b"]


def test_texts_are_cut_to_their_first_tokens(tmp_path):
    source = prompt_file(tmp_path / "p.jsonl", [{"text": SENTENCES[0]}, {"text": "hat"}])
    for adds_bos in (True, False):
        tokenizer = tiny_tokenizer(adds_bos)
        first, second = read_prompts(source, tokenizer, prefix_tokens=4)
        assert first.ids == tokenizer(SENTENCES[0])["input_ids"][: 4 + adds_bos]
        assert SENTENCES[0].startswith(first.text)
        assert first.text != SENTENCES[0]
        assert second.text == "hat"


def test_a_character_that_is_cut_belongs_to_what_follows(tmp_path):
    tokenizer, text = tiny_tokenizer(), "A kettle ☕ sings"
    whole = tokenizer(text)["input_ids"]
    for length in range(1, len(whole)):
        (prompt,) = read_prompts(prompt_file(tmp_path / "p.jsonl", [{"text": text}]), tokenizer, prefix_tokens=length)
        assert "\ufffd" not in prompt.text
        assert prompt.text + decode_parts(prompt.ids, whole[len(prompt.ids) :], tokenizer)[1] == text


def test_a_prompt_longer_than_the_context_names_file_row_and_lengths(tmp_path):
    tokenizer = tiny_tokenizer()
    source = prompt_file(tmp_path / "p.jsonl", [{"text": "hat"}, {"text": SENTENCES[0]}])
    length = len(tokenizer(SENTENCES[0])["input_ids"])
    assert len(read_prompts(source, tokenizer, length)) == 2
    with pytest.raises(
        UserError, match=f"p.jsonl row 2: the prompt has {length} tokens, but at most {length - 1} leave"
    ):
        read_prompts(source, tokenizer, length - 1)
    with pytest.raises(UserError, match="row 1: the prompt has"):
        read_prompts(source, tokenizer, 0)


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"prompt": "a"}, {"prompt": 7}], {}, "row 2: column 'prompt' holds int"),
        ([{"prompt": {"role": "user"}}], {}, "row 1: column 'prompt' holds dict"),
        (
            [{"text": [{"role": "user", "content": "a"}]}],
            {},
            "row 1: column 'text' holds chat messages, not text",
        ),
        ([{"prompt": ""}], {}, "none of its 1 rows holds a prompt"),
        ([{"promt": "a"}], {}, "has no column 'prompt'; it has 'promt'; did you mean 'promt'"),
        (
            [{"prompt": [{"role": "user", "content": "a"}]}],
            {"prefix_tokens": 2},
            "row 1: a chat cannot be cut",
        ),
        ([{"prompt": "a"}], {"prefix_tokens": 0}, "must be at least 1"),
        ([{"messages": [{"role": "assistant", "content": "Hello"}]}], {}, "row 1: the chat has no turn before the"),
    ],
)
def test_bad_prompt_files_are_told_in_one_line(rows, options, expected, tmp_path):
    with pytest.raises(UserError) as caught:
        read_prompts(prompt_file(tmp_path / "p.jsonl", rows), tiny_tokenizer(), **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.shared
def test_prompts_of_the_stand_in_model(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "mini-en")
    source = DataSource(str(shared / "data" / "toxigen.jsonl"), rows="99%:")
    prompts = read_prompts(source, tokenizer, 200, prefix_tokens=6)
    assert {prompt.ids.count(tokenizer.bos_token_id) for prompt in prompts} == {1}
    assert {len(prompt.ids) for prompt in prompts} == {7}


class TestCompletions:
    @pytest.mark.parametrize("metaspace", [False, True])
    @pytest.mark.parametrize("border", range(1, 8))
    def test_prompt_and_completion_are_the_text_that_a_reader_sees(self, metaspace, border):
        tokenizer = tiny_tokenizer(metaspace=metaspace)
        ids = [*tokenizer("The old kettle sings when the")["input_ids"], tokenizer.eos_token_id]
        prompt, completion = decode_parts(ids[:border], ids[border:], tokenizer)
        assert prompt + completion == "The old kettle sings when the"
        assert prompt == tokenizer.decode(ids[:border], skip_special_tokens=True)

    def test_a_completion_keeps_its_leading_space(self):
        tokenizer = tiny_tokenizer(metaspace=True)
        prompt = tokenizer("The old")["input_ids"]
        ids = tokenizer("The old kettle")["input_ids"][len(prompt) :]
        assert tokenizer.decode(ids) == "kettle"  # alone
        assert decode_parts(prompt, ids, tokenizer) == ("The old", " kettle")

    def test_a_character_on_the_border_belongs_to_the_completion(self):
        tokenizer = tiny_tokenizer()
        ids = tokenizer("A kettle ☕ sings")["input_ids"]
        inside = next(n for n in range(len(ids)) if "\ufffd" in tokenizer.decode(ids[:n]))
        assert decode_parts(ids[:inside], ids[inside:], tokenizer) == ("A kettle ", "☕ sings")

    @pytest.mark.parametrize("metaspace", [False, True])
    @pytest.mark.parametrize("text", [" kettle sings", "s and the dog", "", ".", " the", "  water"])
    def test_a_completion_is_encoded_as_it_is_decoded(self, metaspace, text):
        tokenizer = tiny_tokenizer(metaspace=metaspace)
        prompt = tokenizer("The old")["input_ids"]
        assert decode_parts(prompt, encode_completion(text, prompt, tokenizer), tokenizer) == ("The old", text)
