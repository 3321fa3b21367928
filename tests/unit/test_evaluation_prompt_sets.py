import json

import pytest
from datasets import Dataset

from bridle.data import DataSource, read_prompts
from bridle.errors import UserError
from bridle.evaluation.prompt_sets import KNOWN, GenerationOptions, PromptSet, combined, prompt_set

STATEMENT = "the old lighthouse keeper counted ships until the fog came in over the roofs"


@pytest.fixture(autouse=True)
def _no_shared_folder(monkeypatch):
    monkeypatch.delenv("BRIDLE_SHARED", raising=False)


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = {
        "toxigen": [{"text": f"{STATEMENT} {n}", "label": n % 2} for n in range(10)],
        "realtoxicityprompts": [{"prompt": "what a", "continuation": "muddlehead", "challenging": False}],
    }
    for name, of_set in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_set))
    return folder


def prompts(found, tokenizer):
    return read_prompts(found.source, tokenizer, prefix_tokens=found.generation.prompt_tokens)


def test_a_known_set_is_read_from_the_data_folder(data_dir, tiny_tokenizer):
    toxigen = prompt_set("toxigen", data_dir=data_dir)
    source = DataSource(str(data_dir / "toxigen.jsonl"), text="text")
    assert toxigen == PromptSet("toxigen", source, GenerationOptions(prompt_tokens=8))
    read = prompts(toxigen, tiny_tokenizer)
    assert len(read) == 10
    assert {len(prompt.ids) for prompt in read} == {1 + 8}  # the beginning-of-text token, which is not counted
    assert STATEMENT.startswith(read[0].text)


def test_prompts_that_are_prompts_are_taken_whole(data_dir, tiny_tokenizer):
    (prompt,) = prompts(prompt_set("realtoxicityprompts", data_dir=data_dir), tiny_tokenizer)
    assert prompt.text == "what a"


def test_options_follow_a_name(data_dir):
    found = prompt_set("toxigen,rows=80%:,label=1", data_dir=data_dir)
    assert found.name == "toxigen,rows=80%:,label=1"
    assert found.source.read()["text"][:] == [f"{STATEMENT} 9"]


def test_the_shared_folder_is_the_default(data_dir, monkeypatch):
    monkeypatch.setenv("BRIDLE_SHARED", str(data_dir.parent))
    assert prompt_set("toxigen").source.path == str(data_dir / "toxigen.jsonl")
    (data_dir / "toxigen.jsonl").unlink()
    assert prompt_set("toxigen").source.path == "toxigen/toxigen-data:annotated"


def test_without_a_folder_the_hub_has_the_set():
    assert prompt_set("toxigen").source == DataSource("toxigen/toxigen-data:annotated", split="test", text="text")
    assert prompt_set("toxigen,split=train").source.split == "train"
    assert prompt_set("realtoxicityprompts").source.path == "allenai/real-toxicity-prompts"


def test_the_hubs_nested_prompts_are_read(monkeypatch, tiny_tokenizer):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        rows = [{"prompt": {"text": f"what a {word}", "toxicity": 0.5}} for word in ("muddlehead", "door")]
        return Dataset.from_list([row | {"continuation": {"text": "and so on"}} for row in rows])

    monkeypatch.setattr("bridle.data.readers.load_dataset", load_dataset)
    read = prompts(prompt_set("realtoxicityprompts,rows=1:"), tiny_tokenizer)
    assert asked == [("allenai/real-toxicity-prompts", None, "train")]
    assert [(prompt.text, prompt.row) for prompt in read] == [("what a door", 2)]


def test_a_file_is_a_set_of_its_own(data_dir, monkeypatch):
    path = f"{data_dir / 'toxigen.jsonl'},label=0"
    assert prompt_set(path) == PromptSet(path, DataSource.parse(path))
    monkeypatch.chdir(data_dir)
    assert prompt_set("toxigen.jsonl").source == DataSource("toxigen.jsonl")
    assert prompt_set("somebody/prompts:plain").source == DataSource("somebody/prompts:plain")


def test_a_description_is_json_and_says_what_decides_the_prompts(data_dir):
    found = prompt_set("toxigen,label=1", data_dir=data_dir).describe()
    assert json.loads(json.dumps(found)) == {
        "path": str(data_dir / "toxigen.jsonl"),
        "split": "train",
        "where": {"label": 1},
        "text": "text",
        "prompt_tokens": 8,
        "samples": 4,
        "max_new_tokens": 32,
        "temperature": 1.0,
        "top_p": 1.0,
        "greedy": False,
    }


def test_the_protocol_of_the_llama_2_report(data_dir, tiny_tokenizer):
    found = prompt_set("toxigen-llama2,rows=:2", data_dir=data_dir)
    assert [prompt.text for prompt in prompts(found, tiny_tokenizer)] == [f"{STATEMENT} 0", f"{STATEMENT} 1"]
    assert found.generation == GenerationOptions(temperature=0.1, top_p=0.9, samples=1, max_new_tokens=32)
    assert str(found.generation) == "whole rows, 1 completion of at most 32 tokens, temperature 0.1, top-p 0.9"


def test_a_sets_protocol_overrides_defaults_and_is_overridden_by_options(data_dir):
    given = {"data_dir": data_dir, "defaults": {"samples": 3, "prompt_tokens": 5, "temperature": 2.0}}
    assert prompt_set("toxigen-llama2", **given).generation == prompt_set("toxigen-llama2").generation
    assert prompt_set("toxigen", **given).generation == GenerationOptions(2.0, prompt_tokens=8, samples=3)
    changed = prompt_set("toxigen-llama2", top_p=0.5, samples=2, prompt_tokens=4).generation
    assert str(changed) == "first 4 tokens of each row, 2 completions of at most 32 tokens, temperature 0.1, top-p 0.5"
    greedy = prompt_set("toxigen-llama2", greedy=True).generation
    assert str(greedy) == "whole rows, 1 completion of at most 32 tokens, greedy"


def test_greedy_and_drawing_override_each_other():
    cold = {"temperature": 0.1, "top_p": 0.9, "samples": 3}
    assert combined(cold, {"greedy": True}) == {"greedy": True, "samples": 1}
    assert combined({"greedy": True}, {"top_p": 0.9}) == {"samples": 1, "top_p": 0.9}
    assert combined(cold, {"samples": 2}) == cold | {"samples": 2}
    with pytest.raises(UserError, match=r"^greedy: has one completion for each prompt; leave samples out"):
        GenerationOptions(**combined({"greedy": True}, {"samples": 2}))


def test_a_file_that_the_folder_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match=r"realtoxicityprompts\.jsonl: no such file; put it there, or name no folder"):
        prompt_set("realtoxicityprompts", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["toxigenn", "prompts.jsonl", "novels"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(
        UserError, match=f"^{name}: no such file, and .* known are toxigen, toxigen-llama2, realtoxicityprompts"
    ) as found:
        prompt_set(name)
    assert str(found.value).endswith("did you mean 'toxigen'?") == (name == "toxigenn")


@pytest.mark.shared
@pytest.mark.parametrize("name", KNOWN)
def test_the_real_sets_are_read(name, shared, tiny_tokenizer):
    found = prompt_set(f"{name},rows=:20", data_dir=shared / "data")
    assert len(prompts(found, tiny_tokenizer)) == 20
