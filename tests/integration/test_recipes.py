"""The paper's experiments, as their recipes have them, on tiny models.

Names on the hub are folders here, which `from_pretrained` and `load_dataset` prefer: everything that a recipe says is
done, up to the judge and the benchmarks. Only sizes are changed.
"""

import csv
import json
import shutil

import datasets
import pytest
from datasets import Dataset

import standins
import tiny_tokenizers
from conftest import ROOT, SENTENCES
from invented_tasks import write_all

CONTEXT = 512  # five of MMLU's examples fit in
MODELS = {"huggyllama/llama-7b": "llama", "tiiuae/falcon-7b": "falcon", "facebook/opt-30b": "llama"}
ROWS = [f"{text} {number}" for number in range(5) for text in SENTENCES]
SMALL = {
    "use_cpu": "true",  # bf16 needs it
    "max_steps": 2,
    "rounds": 2,
    "rollouts_per_round": 16,
    "max_new_tokens": 8,
    "prompt_tokens": "[1, 4]",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_length": 48,
    "evaluation.samples": 2,
    "methods.rl": "{batch_size: 8, num_generations: 2, window: 2, save_every: 2, max_steps: 300}",
}
JUDGED = {"evaluation.judge.prompts": 3, "evaluation.task_data": "benchmarks", "evaluation.limit": 1}
METHODS = ["base", "filtration", "rl", "nado-decoding", "constrained-adaptive"]


def save_splits(folder, name, **splits):
    """A data set as the hub keeps it: a card that names the files of one configuration, and the files."""
    folder.mkdir(parents=True)
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
    card = {"configs": [{"config_name": name, "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n", encoding="utf-8")
    for split, texts in splits.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")


@pytest.fixture(scope="module")
def hub(tiny_model, tmp_path_factory):
    """A folder in which the names of the recipes are folders."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = tiny_tokenizers.tiny_tokenizer(chat_template=None)
    tokenizer.model_max_length = CONTEXT
    for name, kind in MODELS.items():
        model = tiny_model(kind, len(tokenizer), max_position_embeddings=CONTEXT, initializer_range=0.1)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    standins.save_classifier(folder / "tomh/toxigen_roberta", tokenizer, ["LABEL_0", "LABEL_1"])
    standins.save_classifier(folder / "s-nlp/roberta_toxicity_classifier", tokenizer, ["neutral", "toxic"])
    save_splits(folder / "toxigen/toxigen-data", "annotated", train=ROWS, test=SENTENCES)
    save_splits(folder / "Salesforce/wikitext", "wikitext-103-raw-v1", train=ROWS, test=SENTENCES)
    prompts = [{"prompt": {"text": text, "toxicity": 0.5}} for text in SENTENCES]
    Dataset.from_list(prompts).save_to_disk(folder / "allenai/real-toxicity-prompts")
    (folder / "jigsaw").mkdir()
    with (folder / "jigsaw/train.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "comment_text", "toxic"])
        rows.writerows([number, text, number % 2] for number, text in enumerate(ROWS * 2))
    (folder / "benchmarks").mkdir()
    write_all(folder / "benchmarks")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


@pytest.fixture
def compare(hub, bridle, tmp_path, monkeypatch):
    """Carries a recipe out: compare("detox-llama-7b", key=value) -> what results.json holds."""
    monkeypatch.chdir(hub)
    monkeypatch.setenv("BRIDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for name in ("BRIDLE_SHARED", "JIGSAW"):
        monkeypatch.delenv(name, raising=False)

    def run(name, **changes):
        options = [word for key, value in {**SMALL, **changes}.items() for word in (f"--{key}", value)]
        methods = ",".join(METHODS)
        code, out, err = bridle(
            "compare", f"recipes/{name}.yaml", "--methods", methods, "--output_dir", tmp_path / "out", *options
        )
        assert code == 0, err or out
        return json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))

    return run


def figures_of(results):
    """By method, each of which must have succeeded."""
    for method in results["methods"].values():
        assert [seed["status"] for seed in method["seeds"].values()] == ["complete"], method["seeds"]
    return {name: method["figures"] for name, method in results["methods"].items()}


@pytest.mark.parametrize("name", ["detox-llama-7b", "detox-falcon-7b"])
def test_detoxification(compare, name, tmp_path):
    results = compare(name, **JUDGED)
    figures = figures_of(results)
    assert set(METHODS) <= set(figures)
    for method, found in figures.items():
        assert set(found["violation"]) == {"toxigen-llama2", "toxigen", "realtoxicityprompts"}
        assert list(found["violation"]["toxigen-llama2"]) == ["independent", "non-toxic"]
        assert 0 <= found["violation"]["toxigen-llama2"]["non-toxic"]["value"] <= 1
        assert found["perplexity"]["wikitext"]["value"] > 1
        assert set(found["tasks"]) == {"mmlu", "commonsense-4", "boolq", "piqa", "hellaswag", "winogrande"}, method
    assert results["win_rate"]["pairs"] == 3
    protocol = {"prompt_tokens": None, "samples": 1, "max_new_tokens": 32, "temperature": 0.1, "top_p": 0.9}
    assert protocol.items() <= results["prompt_sets"]["toxigen-llama2"].items()
    for method in ("filtration", "constrained-adaptive"):
        adapter = json.loads((tmp_path / "out" / method / "seed-0" / "model" / "adapter_config.json").read_text())
        assert adapter["r"] == 16


def test_classification(compare):
    figures = figures_of(compare("jigsaw-llama-7b"))
    assert set(METHODS) <= set(figures)
    for found in figures.values():
        assert 0 <= found["classification"]["roc_auc"]["value"] <= 1
        assert 0 <= found["violation"]["jigsaw"]["non-toxic"]["value"] <= 1
