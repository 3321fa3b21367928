import logging
from collections import Counter

import pytest
from datasets import Dataset, Image
from pydantic import TypeAdapter
from trl import SFTConfig, SFTTrainer

from bridle.core.tokens import IGNORE
from bridle.data import DOMAIN, Domain, mix, tokenize_domain
from bridle.errors import UserError
from tiny_tokenizers import CHAT_TEMPLATE, SENTENCES, tiny_tokenizer


def chat(*turns):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]


LENGTH = 60  # cuts some of the rows below, not all
TEXTS = [{"text": text} for text in (*SENTENCES, "short", " ".join(SENTENCES), SENTENCES[0] + "<eos>")]
# The second completion starts inside a token of the whole, where prompt and completion merge.
COMPLETIONS = [
    {"prompt": "The old kettle", "completion": " sings."},
    {"prompt": "A small brown d", "completion": "og sleeps under the kitchen table."},
    {"prompt": SENTENCES[3] * 9, "completion": "cut off"},
]
CHATS = [
    {"messages": chat("Is it a hat?", SENTENCES[2])},
    {"messages": chat("Why?", "No.", "Who?", SENTENCES[1])},
]
CHAT_COMPLETIONS = [{"prompt": chat("Is it a hat?"), "completion": [{"role": "assistant", "content": SENTENCES[2]}]}]


def prepared_by_trl(rows, tokenizer, tiny_model, folder, **options):
    """The training rows that TRL's own trainer prepares."""
    config = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **options)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return trainer.train_dataset.select_columns(["input_ids", "labels"]).to_list()


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (TEXTS, {}),
        (TEXTS, {"packing": True}),
        (COMPLETIONS, {}),
        (CHATS, {}),
        (CHATS, {"assistant_only": True}),
        (CHAT_COMPLETIONS, {}),
        (CHAT_COMPLETIONS, {"assistant_only": True}),
    ],
    ids=["text", "packed", "completion", "chat", "assistant", "chat-completion", "assistant-completion"],
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_rows_are_what_trl_prepares(rows, options, adds_bos, tiny_model, tmp_path):
    trl_options = {"max_length": LENGTH, "assistant_only_loss": options.get("assistant_only", False)}
    if options.get("packing"):
        trl_options |= {"packing": True, "packing_strategy": "wrapped"}
    expected = prepared_by_trl(rows, tiny_tokenizer(adds_bos), tiny_model, tmp_path, **trl_options)
    actual = tokenize_domain(Dataset.from_list(rows), tiny_tokenizer(adds_bos), max_length=LENGTH, **options)
    assert actual.to_list() == expected != []


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_end_of_text_is_learnt_once(pad_is_eos):
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
    for row in tokenize_domain(Dataset.from_list(TEXTS), tokenizer, max_length=None):
        assert row["labels"] == row["input_ids"]
        assert [n for n, token in enumerate(row["labels"]) if token == tokenizer.eos_token_id] == [
            len(row["labels"]) - 1
        ]


def test_prompts_are_masked_and_completions_learnt():
    tokenizer = tiny_tokenizer()
    row = tokenize_domain(Dataset.from_list(COMPLETIONS[:1]), tokenizer, max_length=None)[0]
    learnt = [token for token in row["labels"] if token != IGNORE]
    assert tokenizer.decode(learnt) == " sings.<eos>"
    assert row["labels"][0] == IGNORE
    assert row["input_ids"][-len(learnt) :] == learnt


@pytest.mark.parametrize(
    "row",
    [
        {"text": "<bos>hello"},
        {"prompt": "<bos>hello", "completion": " you"},
        {"messages": chat("hello", "you")},
        {"text": "hello"},
    ],
)
def test_exactly_one_beginning_of_text(row):
    tokenizer = tiny_tokenizer(adds_bos=True)
    ids = tokenize_domain(Dataset.from_list([row]), tokenizer, max_length=None)[0]["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_rows_may_keep_their_whole_length():
    rows = tokenize_domain(Dataset.from_list([{"text": "word " * 500}]), tiny_tokenizer(), max_length=None)
    assert len(rows[0]["input_ids"]) > 500


def test_of_a_row_without_its_column_those_that_it_has_are_named(caplog):
    rows = Dataset.from_dict({"text": ["one", None], "txt": [None, "two"], "n": [None, 1]})
    tokenize_domain(rows, tiny_tokenizer(), max_length=LENGTH, name="tales")
    assert "left out 1 of 2 rows that hold no text; row 2 has no 'text'; it has 'txt', 'n'\n" in caplog.text


def test_of_many_columns_few_are_named_and_none_is_decoded(caplog):
    rows = Dataset.from_dict({"text": ["one", None], **{f"c{n}": ["x", "y"] for n in range(7)}})
    rows = rows.add_column("image", [None, {"bytes": b"none", "path": None}]).cast_column("image", Image())
    tokenize_domain(rows, tiny_tokenizer(), max_length=LENGTH, name="tales")
    assert "row 2 has no 'text'; it has 'c0', 'c1', 'c2', 'c3', 'c4', ...\n" in caplog.text


def test_blank_and_unlearnable_rows_are_left_out_and_counted(caplog):
    rows = [*COMPLETIONS, {"prompt": "x", "completion": " "}, {"prompt": None, "completion": "y"}]
    with caplog.at_level(logging.WARNING):
        kept = tokenize_domain(Dataset.from_list(rows), tiny_tokenizer(), max_length=LENGTH, name="tales")
    assert len(kept) == 2
    assert "tales: left out 2 of 5 rows that hold no text; row 4 has no 'completion'\n" in caplog.text
    assert "tales: dropped 1 rows without a token to learn in max_length=60" in caplog.text


def failure(rows, tokenizer=None, **options):
    with pytest.raises(UserError) as caught:
        tokenize_domain(
            Dataset.from_list(rows),
            tokenizer or tiny_tokenizer(),
            **{"max_length": LENGTH, "name": "tales", **options},
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_name_the_row_and_the_column():
    assert failure([{"text": 3}]) == "tales row 1: column 'text' holds int, not text"
    assert failure([{"messages": "hello"}]) == "tales row 1: column 'messages' holds text, not chat messages"
    assert failure([{"messages": [{"content": "a"}]}]).startswith("tales row 1: column 'messages' holds list")
    assert failure([{"prompt": [1], "completion": "a"}]).startswith("tales row 1: column 'prompt' holds list")
    assert failure([{"prompt": chat("a"), "completion": "b"}]).startswith("tales row 1: prompt and completion must")
    assert failure([{"body": "a", "label": 1}]) == "tales has no column 'text'; it has 'body', 'label'"
    pair = "tales has no column 'text'; it has 'question', 'answer'; or name them: prompt: question, completion: answer"
    assert failure([{"question": "a", "answer": "b"}]) == pair
    assert failure([{"text": ""}]) == "tales: none of its 1 rows holds a token to learn"
    assert failure([{"text": "a"}], max_length=None, packing=True).startswith("packing: needs max_length")


def test_errors_of_the_tokenizer_name_what_it_lacks():
    assert "a chat template, and the tokenizer has none; a recipe names one" in failure(
        CHATS, tiny_tokenizer(chat_template=None)
    )
    assert "{% generation %}" in failure(
        CHATS,
        tiny_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"),
        assistant_only=True,
    )
    refusing = "{{ raise_exception('no\\nroles') }}" + CHAT_TEMPLATE
    assert failure(CHATS, tiny_tokenizer(chat_template=refusing)).startswith("tales row 1: the chat template refuses")
    endless = tiny_tokenizer()
    endless.eos_token = None
    assert failure(TEXTS, endless).startswith("the tokenizer names no end-of-text token")


def test_domain_is_built_from_a_recipes_mapping(tmp_path):
    recipe = {"tales": {"path": "a.jsonl", "rows": "0:80%", "where": {"label": [0, 1]}, "weight": 2}}
    domains = TypeAdapter(dict[str, Domain]).validate_python(recipe)
    assert domains == {"tales": Domain("a.jsonl", rows="0:80%", where={"label": [0, 1]}, weight=2.0)}


def test_domain_without_columns_to_learn_names_its_file(tmp_path):
    path = tmp_path / "tales.jsonl"
    path.write_text('{"txt": "a", "label": 1}\n')
    with pytest.raises(UserError, match=r"tales.jsonl has no column 'text'; it has 'txt', 'label'; did you mean 'txt'"):
        Domain(str(path)).read()


GIVEN = [{"input_ids": [*range(5, 5 + size)], "other": "a"} for size in (70, 3, 9)]
MASKS = {"assistant_masks": [0, 0, 1], "completion_mask": [0, 1, 1]}


def given(*masks):
    """Tokenised rows with these masks, whose patterns repeat."""
    return [row | {mask: (MASKS[mask] * 24)[: len(row["input_ids"])] for mask in masks} for row in GIVEN]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (given(), {}),
        (given(), {"keep_end": True}),
        (given(), {"packing": True}),
        (given("assistant_masks"), {}),
        (given("completion_mask"), {"completion_only": True}),
        (given("completion_mask"), {"completion_only": False}),
        (given(*MASKS), {"completion_only": True}),
        ([row | {"labels": [*row["input_ids"][:-1], IGNORE]} for row in GIVEN], {}),
    ],
)
def test_rows_that_are_tokenised_already_are_what_trl_makes_of_them(rows, options, tiny_model, tmp_path):
    named = {"completion_only": "completion_only_loss", "packing": "packing"}
    trl_options = {named[name]: value for name, value in options.items() if name in named}
    trl_options |= {"truncation_mode": "keep_end"} if "keep_end" in options else {}
    trl_options |= {"packing_strategy": "wrapped"} if "packing" in options else {}
    tokenizer = tiny_tokenizer()
    theirs = prepared_by_trl(rows, tokenizer, tiny_model, tmp_path, max_length=LENGTH, **trl_options)
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).with_format("torch")):
        ours = tokenize_domain(dataset, tokenizer, max_length=LENGTH, **options)
        assert ours.to_list() == theirs
        assert ours.features["input_ids"].feature.dtype == "int32"


def test_masks_of_tokenised_rows_are_read_or_refused(caplog):
    masked, how = Dataset.from_list(given("completion_mask")), {"max_length": LENGTH}
    assert tokenize_domain(masked, tiny_tokenizer(), **how, completion_only=True)["labels"][1] == [IGNORE, 6, 7]
    assert not caplog.messages
    assert tokenize_domain(masked, tiny_tokenizer(), **how)["labels"][1] == [5, 6, 7], "as TRL has it"
    assert "data set: completion_mask is not read; set completion_only_loss" in caplog.text
    named = masked.add_column("prompt", [""] * len(masked)).add_column("completion", [""] * len(masked))
    assert tokenize_domain(named, tiny_tokenizer(), **how)["labels"][1] == [IGNORE, 6, 7], "as TRL has it"
    both = masked.add_column("labels", [row["input_ids"] for row in given("completion_mask")])
    assert tokenize_domain(both, tiny_tokenizer(), **how, completion_only=True)["labels"][1] == [5, 6, 7], "labels win"
    assert failure(GIVEN, completion_only=True).startswith("completion_only_loss: the rows of tales have no completion")
    short = [row | {"labels": row["input_ids"][1:]} for row in GIVEN]
    assert failure(short) == "tales row 1: input_ids and labels differ in length"


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_weights_must_be_above_nought(weight):
    with pytest.raises(UserError, match=r"^weight: must be a finite number above 0"):
        Domain("a.jsonl", weight=weight)


def rows_of(start, size):
    ids = [[start + n] for n in range(size)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize(
    ("weights", "shares"),
    [({"a": 1, "b": 1, "c": 1}, (1 / 3, 1 / 3, 1 / 3)), ({"a": 3, "b": 1, "c": 4}, (3 / 8, 1 / 8, 1 / 2))],
)
def test_mixture_holds_the_shares_and_every_row(weights, shares):
    domains = {"a": rows_of(0, 50), "b": rows_of(100, 70), "c": rows_of(200, 20)}
    mixed = mix(domains, weights, seed=1)
    counts = Counter(mixed[DOMAIN])
    assert [counts[n] / len(mixed) for n in range(3)] == pytest.approx(shares, abs=1 / len(mixed))
    first_half = Counter(mixed[DOMAIN][: len(mixed) // 2])
    assert [first_half[n] / (len(mixed) // 2) for n in range(3)] == pytest.approx(shares, abs=0.1)
    tokens = [ids[0] for ids in mixed["input_ids"]]
    assert set(tokens) == {*range(50), *range(100, 170), *range(200, 220)}
    assert all(token // 100 == domain for token, domain in zip(tokens, mixed[DOMAIN], strict=True))


def test_a_small_domain_is_used_up_before_it_repeats_in_another_order():
    mixed = mix({"large": rows_of(100, 60), "small": rows_of(0, 20)}, {"large": 1, "small": 1}, seed=0)
    small = [ids[0] for ids in mixed["input_ids"] if ids[0] < 100]
    passes = [small[start : start + 20] for start in range(0, 60, 20)]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert passes[0] != passes[1] != list(range(20))


def test_mixture_depends_on_the_seed_alone():
    def mixed(seed):
        domains = {"a": rows_of(0, 50), "b": rows_of(100, 70)}
        return mix(domains, {"a": 1.0, "b": 2.0}, seed).to_list()

    assert mixed(3) == mixed(3)
    assert mixed(3) != mixed(4)


def test_mixture_of_one_domain_is_that_domain_shuffled():
    mixed = mix({"a": rows_of(0, 50)}, {"a": 0.1}, seed=0)
    tokens = [ids[0] for ids in mixed["input_ids"]]
    assert sorted(tokens) == list(range(50)) != tokens


def test_without_a_seed_domains_keep_their_order_and_come_in_turn():
    mixed = mix({"a": rows_of(0, 6), "b": rows_of(100, 2)}, {"a": 1, "b": 0.5}, seed=None)
    assert [ids[0] for ids in mixed["input_ids"]] == [0, 100, 1, 2, 101, 3, 4, 100, 5]
    alone = mix({"a": rows_of(0, 50)}, {"a": 1}, seed=None)
    assert [ids[0] for ids in alone["input_ids"]] == [*range(50)]


def test_an_epoch_has_the_rows_that_are_learnt_and_a_share_of_those_that_are_held():
    domains = {"learnt": rows_of(0, 40), "large": rows_of(100, 99), "small": rows_of(200, 3)}
    weights = {"learnt": 1.0, "large": 0.5, "small": 0.25}
    mixed = mix(domains, weights, seed=0, held=["large", "small"])
    assert Counter(mixed[DOMAIN]) == {0: 40, 1: 20, 2: 10}
    large = [ids[0] for ids in mixed["input_ids"] if 100 <= ids[0] < 200]
    assert len(set(large)) == 20, "each once"
    assert max(large) > 150, "not the first alone"
    assert Counter(mix(domains, weights, seed=0, held=domains)[DOMAIN])[1] == 99, "nothing is learnt: all rows"
    few = mix(domains, {"learnt": 1.0, "large": 0.001, "small": 0.001}, seed=0, held=["large", "small"])
    assert Counter(few[DOMAIN]) == {0: 40, 1: 1, 2: 1}


def test_weights_that_make_no_mixture_are_refused():
    domains = {"a": rows_of(0, 5), "b": rows_of(100, 5)}
    with pytest.raises(UserError, match="weights are for a, but the domains are a, b"):
        mix(domains, {"a": 1}, seed=0)
    with pytest.raises(UserError, match=r"^weights.b: must be"):
        mix(domains, {"a": 1, "b": -1}, seed=0)
    with pytest.raises(UserError, match="repeat a domain over 1000 times"):
        mix(domains, {"a": 1, "b": 1e-300}, seed=0)


def test_prompts_that_are_tokenised_are_kept_where_they_are_not_learnt():
    prompts = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [IGNORE] * 4}] * 2)
    with pytest.raises(UserError, match="holds a token to learn"):
        tokenize_domain(prompts, tiny_tokenizer(), max_length=3)
    kept = tokenize_domain(prompts, tiny_tokenizer(), max_length=3, learnt=False)
    assert (len(kept), kept[0]["input_ids"]) == (2, [5, 6, 7])
