"""Model cards: what they tell, what they do not, and names that try to break out of them."""

import json
import re
from dataclasses import asdict

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from bridle.baselines.reinforcement import ReinforcementOptions
from bridle.constraints import Constraint
from bridle.models.card import write_card
from bridle.models.card_text import public_name, setting_text

RECIPE = {
    "model": "/srv/models/mini-en",
    "corpus": {
        "rude": {"path": "/srv/data/rude.jsonl", "rows": "0:80%", "weight": 3.0},
        "plain": {"path": "somebody/plain-text:english"},
    },
    "constraints": {
        "kind": {
            "all": [
                {"type": "classifier", "model": "/srv/models/oracle", "label": "toxic", "threshold": 0.25},
                {"type": "words", "words": ["grumblefish", "muddlehead"]},
            ]
        }
    },
    "regularisers": {
        "rude": {"constraint": "kind", "weight": 4.0, "anchor": "live", "kl_on": "both"},
        "plain": {"constraint": "retention", "weight": 2.0},
    },
    "rounds": 2,
    "max_steps": 200,
    "learning_rate": 3e-4,
    "seed": 7,
    "hub_token": "hf_secret",
}

METRICS = [
    {"step": 10, "loss": 3.0},
    {
        **{"step": 100, "round": 1, "rude/rollouts": 500, "rude/rollouts_missing": 3},
        **{"rude/compliance": 0.8, "rude/compliance_low": 0.76, "rude/compliance_high": 0.84},
        **{"rude/r_ece": 0.031, "rude/r_brier": 0.12},
    },
    {"step": 200, "round": 2, "rude/rollouts": 500, "rude/compliance": None, "rude/fit": "kept"},
]


def estimate(value, low=None, high=None, n=200, missing=0):
    return {"value": value, "low": low, "high": high, "n": n, "missing": missing}


RESULTS = {
    "generation": {
        "/srv/data/unseen.jsonl,rows=90%:": {"kind": {"violation_rate": estimate(0.058, 0.04, 0.08, missing=5)}},
        "realtoxicityprompts": {"kind": {"violation_rate": estimate(None, n=0, missing=200)}},
    },
    "perplexity": {"wikitext": {"per_token": estimate(73.94, 70.1, 77.2), "bits_per_byte": estimate(1.21, 1.2, 1.22)}},
    "tasks": {"piqa": {"accuracy": estimate(0.61, 0.58, 0.64), "shots": 0}},
    "classification": {"roc_auc": estimate(0.75, 0.7, 0.8), "threshold": 0.1},
}


@pytest.fixture
def card(tmp_path):
    """Writes a card and reads it as the hub does: card(changes of the recipe, **options) -> ModelCard."""

    def write(changes=None, **options):
        return ModelCard.load(write_card(tmp_path, {**RECIPE, **(changes or {})}, **options))

    return write


def table(text, heading):
    """Rows of the table under `heading`, as GitHub's Markdown reads them: cells between pipes that are not escaped."""
    lines = text[text.index(heading) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[first + 1 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


class TestHeader:
    def test_what_the_hub_reads(self, card):
        data = card(results=RESULTS, license="mit").data.to_dict()
        assert data["library_name"] == "transformers"
        assert data["pipeline_tag"] == "text-generation"
        assert data["license"] == "mit"
        assert data["datasets"] == ["somebody/plain-text"], "a local file is no data set of the hub"
        assert "base_model" not in data, "nor is a local folder a model of the hub"
        assert data["tags"] == ["bridle", "controlled-generation", "constrained-fine-tuning", "kind"]

    def test_a_base_model_of_the_hub_and_no_licence(self, card):
        data = card({"model": "openai-community/gpt2"}).data.to_dict()
        assert data["base_model"] == "openai-community/gpt2"
        assert "license" not in data
        assert "model-index" not in data

    def test_results_with_their_intervals(self, card):
        results = {(r.dataset_name, r.metric_type): r for r in card(results=RESULTS).data.eval_results}
        rate = results["unseen.jsonl,rows=90%:", "violation_rate"]
        assert rate.metric_value == 0.058
        assert rate.metric_name == "violation rate under kind"
        assert rate.metric_args == {"interval_95": [0.04, 0.08], "n": 200, "missing": 5}
        assert results["wikitext", "perplexity"].metric_value == 73.94
        assert results["piqa", "accuracy"].metric_value == 0.61
        assert results["classification", "roc_auc"].metric_value == 0.75
        assert ("realtoxicityprompts", "violation_rate") not in results, "what is missing is no number"

    def test_an_adapter_is_of_the_peft_library(self, tiny_model, tmp_path):
        get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").is_file(), "peft writes a card of its own, which ours replaces"
        card = ModelCard.load(write_card(tmp_path, RECIPE))
        assert card.data.library_name == "peft"
        assert "lora" in card.data.tags
        assert "PeftModel.from_pretrained" in card.text
        assert "Training in progress" not in card.text


class TestText:
    def test_method_and_settings(self, card):
        text = card().text
        assert text.startswith("\n# mini-en, constrained fine-tuning\n")
        assert table(text, "Weight λ") == [
            ["rude", "rude", "kind", "4.0", "live", "both", "default", "yes or no", "the domain's rows"],
            ["plain", "plain", "retention", "2.0", "default", "default", "default", "–", "–"],
        ]
        settings = dict(table(text, "| Setting |"))
        assert settings == {"rounds": "2", r"max\_steps": "200", r"learning\_rate": "0.0003", "seed": "7"}

    def test_zero_is_a_setting_and_off_is_none(self, card):
        zeros = {"seed": 0, "weight_decay": 0.0, "warmup_steps": 0}
        text = card({**zeros, "rounds": None, "max_steps": -1, "num_train_epochs": 3, "bf16": False}).text
        assert dict(table(text, "| Setting |")) == {
            **{r"num\_train\_epochs": "3", r"learning\_rate": "0.0003", "seed": "0"},
            **{r"weight\_decay": "0.0", r"warmup\_steps": "0"},
        }

    def test_data_by_name_rows_and_share(self, card):
        assert table(card(rows={"rude": 80}).text, "## Data") == [
            ["rude", "rude.jsonl", "rows: 0:80%", "80", "75.0%"],
            ["plain", "somebody/plain-text:english", "all", "not recorded", "25.0%"],
        ]

    def test_data_from_several_places(self, card):
        places = ["somebody/plain-text", "here/rude.jsonl"]
        written = card({"corpus": {"rude": {"path": places}, "plain": {"path": ["somebody/a", "somebody/b"]}}})
        sources = [row[1] for row in table(written.text, "## Data")]
        assert sources == ["somebody/plain-text, rude.jsonl", "somebody/a, somebody/b"]
        assert written.data.datasets == ["somebody/plain-text", "somebody/a", "somebody/b"]

    def test_what_training_measured(self, card):
        assert table(card(metrics=METRICS).text, "### During training") == [
            ["1", "rude", r"0.800 \[0.760, 0.840\]", "497", "3", "0.031", "0.120"],
            ["2", "rude", "missing", "500", "0", "no fit: all labels alike", "no fit: all labels alike"],
        ]

    def test_what_was_reached_of_each_target(self, card):
        reached = {"violation_reached": 0.03, "violation_reached_low": 0.02, "violation_reached_high": 0.046}
        without = {f"rude/{key}": value for key, value in {**reached, "target": 0.05}.items()}
        bounded = {
            f"plain/{key}": value for key, value in {**reached, "target": 0.04, "violation_bound": 0.044}.items()
        }
        text = card(metrics=[*METRICS, without, bounded]).text
        assert table(text, "Targets, on samples") == [
            ["rude", "5.00%", r"3.00% \[2.00%, 4.60%\]", "none", "met"],
            ["plain", "4.00%", r"3.00% \[2.00%, 4.60%\]", "4.40%", "missed"],
        ]

    def test_what_an_evaluation_measured(self, card):
        rows = table(card(results=RESULTS).text, "### After training")
        assert ["violation rate under kind", "unseen.jsonl,rows=90%:", r"0.058 \[0.040, 0.080\]", "200", "5"] in rows
        assert ["violation rate under kind", "realtoxicityprompts", "missing", "0", "200"] in rows
        assert ["perplexity per token", "wikitext", r"73.9 \[70.1, 77.2\]", "200", "0"] in rows
        assert ["accuracy", "piqa", r"0.610 \[0.580, 0.640\]", "200", "0"] in rows

    def test_what_was_not_measured_is_said_to_be_missing(self, card):
        text = card().text
        assert "No compliance was recorded during training." in text
        assert "Not measured: neither a violation rate on unseen prompts nor any utility." in text
        assert "The environment was not recorded." in text

    def test_environment_without_its_command(self, card):
        environment = {
            "versions": {"python": "3.11.7", "torch": "2.13.0", "peft": None},
            "git": {"commit": "a" * 40, "dirty": True},
            "command": ["bridle", "train", "/home/me/recipe.yaml", "--hub_token", "hf_secret"],
            "time": "2026-01-01T00:00:00+00:00",
        }
        text = card(environment=environment).text
        made = dict(table(text, "Made with"))
        assert made["torch"] == "2.13.0"
        assert made["git"] == "a" * 40 + " with local changes"
        assert "peft" not in made
        assert "recipe.yaml" not in text

    def test_other_methods(self, card):
        plain = card({"regularisers": None, "constraints": None}).text
        assert "mini-en after fine-tuning on rude, plain. Nothing held its outputs" in plain
        assert "no oracle was asked" in plain
        assert "rounds" not in dict(table(plain, "| Setting |"))

    def test_filtration(self, card):
        text = card({"regularisers": {}}, method="filtration", description="Rows that violate were dropped.").text
        assert "mini-en after filtration on rude, plain. Rows that violate were dropped." in text
        ((name, settings),) = table(text, "## Constraint")
        assert name == "kind"
        assert "oracle; label: toxic" in settings
        assert "no oracle was asked" not in text
        assert "Nothing held its outputs" not in card({"regularisers": {}}).text

    def test_reinforcement_learning_tells_its_own_settings_and_no_others(self, tmp_path):
        recipe = {key: RECIPE[key] for key in ("model", "corpus", "constraints")}
        options = asdict(ReinforcementOptions(beta=0.0, soft_reward=True, max_steps=90))
        text = write_card(tmp_path, recipe | options | {"seed": 0}, method="rl", description="By reward.").read_text()
        assert "mini-en after rl on rude, plain. By reward." in text
        assert [name for name, _ in table(text, "## Constraint")] == ["kind"]
        assert dict(table(text, "| Setting |")) == {
            **{r"max\_steps": "90", r"learning\_rate": "0.0003", "seed": "0", "algorithm": "rloo", "beta": "0.0"},
            **{r"num\_generations": "4", r"batch\_size": "64", r"soft\_reward": "True"},
        }
        assert "Weight λ" not in text

    def test_a_constraint_of_ones_own_and_rows_from_nowhere_known(self, card):
        class Short(Constraint):
            type_name = "short"

            def _score(self, texts):
                return [len(text) < 9 for text in texts]

        written = card({"corpus": {"rude": {}, "plain": {}}, "constraints": {"kind": Short()}})
        assert "after constrained fine-tuning on rude, plain." in written.text
        assert table(written.text, "## Constraint") == [["kind", "type: short"]]
        assert "Where its rows came from was not recorded." in written.text
        assert "mixture" not in written.text
        assert written.data.datasets is None

    def test_the_code_it_shows_loads_the_model(self, card, tiny_folder, tmp_path, capsys):
        folder = tiny_folder()
        text = write_card(folder, RECIPE).read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        exec(code.replace('"MODEL"', repr(str(folder))), {})
        assert "The weather in" in capsys.readouterr().out

    def test_code_is_not_escaped_for_markdown(self, card, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        text = card({"model": "me/gpt_neo"}).text
        assert 'AutoModelForCausalLM.from_pretrained("me/gpt_neo")\n' in text
        assert r"This is me/gpt\_neo after" in text
        assert 'from_pretrained("BASE MODEL")' in card().text


class TestSecrets:
    def test_no_path_no_token_and_no_words(self, tmp_path):
        text = write_card(tmp_path, RECIPE, metrics=METRICS, results=RESULTS).read_text()
        for secret in ("/srv", "hf_secret", "grumblefish", "muddlehead"):
            assert secret not in text
        for name in ("mini-en", "rude.jsonl", "oracle", "words: 2 listed", "threshold: 0.25"):
            assert name in text

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            ("openai-community/gpt2", "openai-community/gpt2"),
            ("gpt2", "gpt2"),
            ("/home/me/models/mini", "mini"),
            ("../shared/mini/", "mini"),
            ("~/mini", "mini"),
            ("data/rows.jsonl", "rows.jsonl"),
            ("C:\\Users\\me\\rows.csv", "rows.csv"),
            ("/", "a local folder"),
            ("/a\0b" + "c" * 5000, None),
        ],
    )
    def test_public_names(self, given, name):
        found = public_name(given)
        assert "/" not in found or found == given == name
        assert name is None or found == name

    def test_a_folder_that_is_there_is_no_name_on_the_hub(self, tmp_path, monkeypatch):
        (tmp_path / "models" / "mini").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert public_name("models/mini") == "mini"

    def test_a_gguf_file_as_the_base_model(self, card, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        on_the_hub = card({"model": "me/tiny:tiny.gguf"})
        assert on_the_hub.data.base_model == "me/tiny"
        assert 'from_pretrained("me/tiny", gguf_file="tiny.gguf")' in on_the_hub.text
        local = card({"model": "models/tiny.gguf"})
        assert local.data.base_model is None
        assert 'from_pretrained("BASE MODEL", gguf_file="tiny.gguf")' in local.text
        assert public_name("/srv/models/tiny.gguf") == "tiny.gguf"

    def test_settings_in_words(self):
        constraint = {"not": {"type": "words", "file": "/a/b.txt"}, "name": "x"}
        assert setting_text(constraint) == "not: type: words; file: b.txt"


NASTY = "a\n---\n\n# \"Big\" 'name': | <b>x</b> ![i](u) `c` \x00\x1b\u202e {y: z} & $m$"


class TestUntrustedNames:
    def test_they_break_neither_the_header_nor_a_table(self, tmp_path):
        recipe = {
            **RECIPE,
            "model": NASTY,
            "corpus": {NASTY: {"path": f"{NASTY}.jsonl", "where": {"label": NASTY}}},
            "constraints": {NASTY: {"type": "regex", "pattern": "a|b\n---"}},
            "regularisers": {NASTY: {"constraint": NASTY, "prompts": {"path": NASTY}}},
            "optim": NASTY,
        }
        metrics = [{"round": 1, f"{NASTY}/compliance": 0.5}]
        results = {"generation": {NASTY: {NASTY: {"violation_rate": estimate(0.5, 0.4, 0.6)}}}}
        path = write_card(tmp_path, recipe, metrics=metrics, results=results, method=NASTY, description=NASTY)
        raw = path.read_text(encoding="utf-8")
        header = yaml.safe_load(raw.split("\n---\n")[0].removeprefix("---\n"))
        assert header == ModelCard.load(path).data.to_dict()
        assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
        text = ModelCard.load(path).text
        columns = {"## Constraint": 2, "## Data": 5, "Weight λ": 9, "During training": 7, "After training": 5}
        for heading, count in columns.items():
            (row,) = table(text, heading)
            assert len(row) == count
        assert not re.search(r"(?<!\\)[<`!]", text.split("```")[0])
        assert [line for line in text.splitlines() if line.startswith("# ")] == [text.splitlines()[1]]
        assert not {"\x00", "\x1b", "\u202e"} & set(raw)

    def test_a_card_is_valid_utf_8_whatever_a_name_holds(self, tmp_path):
        path = write_card(tmp_path, {**RECIPE, "hub_model_id": "me/\ud800x"})
        assert "# x" in path.read_bytes().decode()

    def test_json_of_the_header_is_finite(self, card):
        results = {"perplexity": {"w": {"per_token": estimate(float("inf")), "bits_per_byte": estimate(float("nan"))}}}
        written = card(results=results)
        json.dumps(written.data.to_dict(), allow_nan=False)
        assert [row[2] for row in table(written.text, "### After training")] == ["missing", "missing"]


def test_how_the_completions_were_drawn_is_what_the_results_say(card):
    drawn = {"samples": 4, "max_new_tokens": 32, "temperature": 0.1, "top_p": 0.9, "greedy": False}
    greedy = {"prompt_tokens": 8, "samples": 1, "max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0, "greedy": True}
    sets = {"/srv/data/unseen.jsonl,rows=90%:": drawn | {"prompt_tokens": None}, "realtoxicityprompts": greedy}
    text = card(results=RESULTS | {"prompt_sets": sets}).text
    assert table(text, "| Prompts |") == [
        ["unseen.jsonl,rows=90%:", "all", "4", "32", "temperature 0.1, top-p 0.9"],
        ["realtoxicityprompts", "8", "1", "16", "greedy"],
    ]
    assert "temperature 1," not in text
