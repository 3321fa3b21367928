"""Chats from their rows to rollouts, evaluation, reinforcement learning and filtration."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl.chat_template_utils import qwen3_chat_template

from bridle.comparison.tracing import FILE
from bridle.constraints import PythonFunction
from bridle.data import DataSource, prompts_from_domain, read_prompts, read_rollouts, tokenize_domain
from bridle.data.encoding import RowEncoder
from bridle.errors import UserError
from bridle.evaluation.generation import generate_completions
from bridle.models.loading import end_token_ids, load_model, load_tokenizer
from bridle.training.config import AuxiliaryOptions, Regulariser
from bridle.training.corpus_outputs import corpus_outputs
from bridle.training.prompts import prompts_of_corpus
from chats import CHATS, TEMPLATES, chat_folder, chat_tokenizer, write_rows
from trainers import NO_E, trainer_of

KINDS = pytest.mark.parametrize("kind", TEMPLATES)


@pytest.fixture
def folder(tiny_model, tmp_path):
    return lambda kind: chat_folder(tiny_model, tmp_path / kind, TEMPLATES[kind][0])


def drawn_from(rows, tokenizer, n=40, **options):
    return prompts_from_domain(rows, n, prompt_tokens=(1, 3), seed=0, tokenizer=tokenizer, **options)


class TestGenerate:
    def test_a_prompt_is_asked_as_a_users_turn(self, folder, bridle, tmp_path):
        model, output = folder("smollm2"), tmp_path / "said.jsonl"
        rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "a kettle"}]}])
        drawn = []
        for given in (("--prompt", "a kettle", "--chat"), ("--prompts", rows), ("--prompt", "a kettle")):
            code, _, err = bridle("generate", model, *given, "--max_new_tokens", 8, "--output", output)
            assert code == 0, err
            drawn.append(json.loads(output.read_text()))
        assert drawn[0] == drawn[1] != drawn[2]
        assert "user" in drawn[0]["prompt"]

    def test_a_model_without_a_template_is_refused(self, tiny_folder, bridle):
        code, _, err = bridle("generate", tiny_folder(), "--prompt", "a kettle", "--chat")
        assert code == 2
        assert "prompt: chat messages need a chat template, and the tokenizer has none" in err


class TestPrompts:
    @KINDS
    def test_all_turns_before_any_of_the_assistants_with_the_generation_prompt(self, kind):
        tokenizer = chat_tokenizer(TEMPLATES[kind][0])
        prompts = drawn_from(Dataset.from_dict({"messages": CHATS}), tokenizer)
        assert {len(prompt.messages) for prompt in prompts} == {2, 4}
        for prompt in prompts:
            assert prompt.messages == CHATS[prompt.row - 1][: len(prompt.messages)]
            rendered = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True)["input_ids"]
            assert prompt.ids == rendered

    def test_a_completion_in_chat_form_starts_where_it_starts(self):
        tokenizer = chat_tokenizer(TEMPLATES["llama3"][0])
        rows = Dataset.from_dict({"prompt": [chat[:4] for chat in CHATS], "completion": [chat[4:] for chat in CHATS]})
        assert {len(prompt.messages) for prompt in drawn_from(rows, tokenizer)} == {4}

    @KINDS
    def test_an_output_of_the_corpus_ends_with_its_turn(self, folder, kind):
        model, tokenizer = load_model(str(folder(kind))), load_tokenizer(str(folder(kind)))
        config = SimpleNamespace(prompt_tokens=(1, 1), max_new_tokens=40, auxiliary=AuxiliaryOptions(corpus_outputs=16))
        rows = {"chats": Dataset.from_dict({"messages": CHATS})}
        held = SimpleNamespace(name="chats", model=model, tokenizer=tokenizer, corpus=rows, config=config)
        held.constraint, held.seed, held.has_begun, held.is_fitted = NO_E, lambda purpose: 0, False, False
        outputs = corpus_outputs(held)
        assert len(outputs) == 16
        said = {turn["content"] for chat in CHATS for turn in chat if turn["role"] == "assistant"}
        for output in outputs:
            assert output.finished
            assert tokenizer.decode(output.completion_ids[-1:]) == TEMPLATES[kind][1]
            assert output.completion in said
        config.max_new_tokens = 3
        cut = corpus_outputs(held)
        assert not any(output.finished for output in cut)

    @KINDS
    def test_what_is_too_long_is_cut_by_whole_exchanges_and_keeps_the_system_turn(self, kind):
        tokenizer = chat_tokenizer(TEMPLATES[kind][0])
        rows = Dataset.from_dict({"messages": CHATS})
        whole = {len(prompt.messages): len(prompt.ids) for prompt in drawn_from(rows, tokenizer)}
        prompts = drawn_from(rows, tokenizer, max_prompt_tokens=whole[4] - 1)
        cut = [prompt.messages for prompt in prompts if prompt.messages[-1]["content"] == "And a dog?"]
        assert cut
        assert all([turn["role"] for turn in turns] == ["system", "user"] for turns in cut)
        with pytest.raises(UserError, match="no chat has a turn of the assistant"):
            drawn_from(rows, tokenizer, max_prompt_tokens=3)

    def test_a_domain_of_chats_without_an_answer_is_named(self, folder):
        model, tokenizer = load_model(str(folder("qwen3"))), load_tokenizer(str(folder("qwen3")))
        config = SimpleNamespace(prompt_tokens=(1, 1), max_new_tokens=8)
        asked = Dataset.from_dict({"messages": [chat[:2] for chat in CHATS]})
        held = SimpleNamespace(model=model, tokenizer=tokenizer, corpus={"asked": asked}, config=config, seed=len)
        with pytest.raises(UserError, match=r"^asked: no chat has a turn of the assistant after .*; add answers, or"):
            prompts_of_corpus(held, 2, "prompts")

    def test_tools_and_options_of_the_template_pass_through(self, tmp_path):
        tokenizer = chat_tokenizer(TEMPLATES["qwen3"][0])
        tools = [{"type": "function", "function": {"name": "boil", "parameters": {}}}]
        row = {"messages": CHATS[0], "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
        rows = DataSource(str(write_rows(tmp_path / "chats.jsonl", [row, {"messages": CHATS[1]}]))).read()
        learnt = tokenize_domain(rows, tokenizer, max_length=None)
        assert "boil" in tokenizer.decode(learnt[0]["input_ids"])
        assert "boil" not in tokenizer.decode(learnt[1]["input_ids"])
        texts = {prompt.row: tokenizer.decode(prompt.ids) for prompt in drawn_from(rows, tokenizer)}
        assert "boil" in texts[1]
        assert texts[1].endswith("</think>\n\n")
        assert "boil" not in texts[2]
        assert texts[2].endswith("assistant\n")
        with pytest.raises(UserError, match="row 1: column 'tools' holds no list"):
            tokenize_domain(Dataset.from_list([{"messages": CHATS[0], "tools": "boil"}]), tokenizer, max_length=None)

    def test_prompts_of_an_evaluation_are_the_turns_before_the_last_answer(self, tmp_path):
        tokenizer = chat_tokenizer(TEMPLATES["gemma3"][0])
        rows = [{"messages": CHATS[0]}, {"messages": CHATS[1][:4]}]
        prompts = read_prompts(DataSource(str(write_rows(tmp_path / "p.jsonl", rows))), tokenizer)
        assert [prompt.messages for prompt in prompts] == [CHATS[0][:4], CHATS[1][:4]]
        assert all(tokenizer.decode(prompt.ids).endswith("<start_of_turn>model\n") for prompt in prompts)


class TestAssistantOnly:
    def test_a_template_without_markers_that_trl_knows(self):
        encoder = RowEncoder(chat_tokenizer(qwen3_chat_template), assistant_only=True)
        ids, labels = encoder.encode({"messages": CHATS[0]}, "row 1")
        learnt = encoder.tokenizer.decode([token for token in labels if token != -100])
        assert len(ids) == len(labels)
        assert "The kettle is not a hat.<|im_end|>" in learnt
        assert "And a dog?" not in learnt

    @KINDS
    def test_one_that_nobody_knows_is_refused_in_one_line(self, kind):
        encoder = RowEncoder(chat_tokenizer(TEMPLATES[kind][0]), assistant_only=True)
        with pytest.raises(UserError, match="needs a chat template with"):
            encoder.encode({"messages": CHATS[0]}, "row 1")


@KINDS
def test_rollouts_answer_the_user_and_end_with_the_turn(folder, tmp_path, caplog, kind):
    seen = []

    def short(prompts, completions):
        seen.extend(prompts)
        return [float(len(completion) % 2) for completion in completions]

    constraint = PythonFunction(short, name="short", reads="chat")
    path = folder(kind)
    trainer = trainer_of(
        path,
        tmp_path / "out",
        {"talk": Regulariser(constraint=constraint, kl_on="both")},
        rows={"talk": Dataset.from_dict({"messages": CHATS})},
        max_length=120,
        max_new_tokens=12,
    )
    assert "R is fitted on the assistant's turns of talk, and the KL looks at the users' turns too" in caplog.text
    end = trainer.processing_class.convert_tokens_to_ids(TEMPLATES[kind][1])
    assert end in end_token_ids(trainer.model, trainer.processing_class)
    likely = 5.0 * torch.nn.functional.one_hot(torch.tensor(end), len(trainer.processing_class))
    trainer.model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits + likely)
    (regulariser,) = trainer.regularisers
    measured = regulariser.update(1)
    assert measured["rollouts"] == 32
    assert measured["rollouts_missing"] == 0
    assert all(rollout.messages[-1]["role"] == "user" for rollout in regulariser.rollouts)
    ended = [rollout for rollout in regulariser.rollouts if rollout.completion_ids[-1] == end]
    assert ended
    assert all(rollout.finished and end not in rollout.completion_ids[:-1] for rollout in ended)
    assert {prompt[-1]["role"] for prompt in seen} == {"user"}

    model, tokenizer = load_model(str(path)), load_tokenizer(str(path))
    prompts = read_prompts(DataSource(str(write_rows(tmp_path / "p.jsonl", [{"messages": CHATS[0]}]))), tokenizer)
    drawn = generate_completions(
        model, tokenizer, [prompt.ids for prompt in prompts], samples=2, max_new_tokens=4, batch_size=2, seed=0
    )
    assert len(drawn[0]) == 2


@KINDS
def test_every_kind_of_method_on_chats(bridle, recipe, folder, tmp_path, kind):
    """Training and evaluation; with one template guided decoding, filtration and reinforcement learning, too."""
    rows = str(write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS]))
    path = recipe(
        model=str(folder(kind)),
        corpus={"talk": {"path": rows}},
        constraints={
            "polite": {"type": "words", "words": ["grumblefish"]},
            "ends": {"type": "regex", "pattern": "you|[aeiou]$"},
        },
        regularisers={"talk": {"constraint": "ends"}},
        rollouts_per_round=16,
        max_length=120,
        max_steps=2,
        evaluation={"prompts": {"talk": {"path": rows, "rows": "0:2"}}, "samples": 1},
        methods={"rl": {"batch_size": 4, "num_generations": 2, "window": 1, "tolerance": 1.0, "save_every": 1}},
    )
    methods = "base,sft,filtration,constrained,nado-decoding,rl" if kind == "smollm2" else "base,constrained"
    code, _, err = bridle("compare", path, "--methods", methods, "--output_dir", tmp_path / "out")
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    assert all(results[name]["seeds"]["0"]["status"] == "complete" for name in methods.split(","))
    file = min((tmp_path / "out" / "constrained").rglob("rollouts/**/*.jsonl"))
    assert all(rollout.messages[-1]["role"] == "user" for rollout in read_rollouts(file))
    traced = json.loads((tmp_path / "out" / FILE).read_text())["tokens"]
    tokenizer = load_tokenizer(str(folder(kind)))
    asked = tokenizer.apply_chat_template(CHATS[0][:2], add_generation_prompt=True, tokenize=False)
    assert "".join(token["text"] for token in traced).startswith(asked[:20])
