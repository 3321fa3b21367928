"""The command line as a user meets it: whole runs on tiny models, and every mistake told in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from bridle.recipes.recipe import load_recipe
from bridle.utils.files import only_writer
from conftest import ROOT, SENTENCES, TINY

SHORT = ("--max_new_tokens", 8)  # the tiny models' context is small


class TestWholeRuns:
    @pytest.mark.parametrize("model_type", [*TINY])
    def test_train_then_generate_and_evaluate_under_guidance(self, bridle, recipe, tmp_path, corpus_files, model_type):
        folder = tmp_path / "run"
        code, _, err = bridle("train", recipe(model_type), "--output_dir", folder)
        assert code == 0, err
        assert {"model", "auxiliary", "rollouts", "metrics.jsonl", "recipe.yaml", "environment.json"} <= {
            path.name for path in folder.iterdir()
        }
        pickles = {".bin", ".pt", ".pth", ".pkl"}
        assert not [path for path in (folder / "model").iterdir() if path.suffix in pickles]
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rounds = [record for record in records if "round" in record]
        assert [record["round"] for record in rounds] == [1, 2]
        for key in (
            "compliance",
            "compliance_low",
            "r_brier",
            "r_skill",
            "r_ece",
            "lambda",
            "tokens_sampled",
            "seconds_fitting",
        ):
            assert f"rude/{key}" in rounds[0]
        assert {"ce", "kl/rude", "tokens_trained", "seconds_policy"} <= set(rounds[0])
        assert {"versions", "git", "seed"} <= set(json.loads((folder / "environment.json").read_text()))
        rollouts = (folder / "rollouts" / "round-1.rude.jsonl").read_text().splitlines()
        assert len(rollouts) == 32
        assert {"round", "model_hash", "constraint", "value"} <= set(json.loads(rollouts[0]))

        code, out, err = bridle(
            "generate", folder / "model", *("--prompt", "the old", "--guide", folder / "auxiliary"), *SHORT
        )
        assert code == 0, err
        assert out.count("the old") == 1

        code, out, err = bridle(
            *(
                "evaluate",
                folder / "model",
                "--guide",
                folder / "auxiliary",
                "--prompts",
                corpus_files["rude"],
            ),
            *("--prompt_tokens", 2, "--constraint", f"{tmp_path / 'recipe.yaml'}:no e", "--samples", 2),
            *("--perplexity", f"{corpus_files['plain']},rows=0:5", "--max_new_tokens", 8),
            *("--json", tmp_path / "result.json", "--completions", tmp_path / "said.jsonl"),
        )
        assert code == 0, err
        result = json.loads((tmp_path / "result.json").read_text())
        (by_constraint,) = result["generation"].values()
        rate = by_constraint["no e"]["violation_rate"]
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
        assert rate["n"] == 64
        assert result["perplexity"][f"{corpus_files['plain']},rows=0:5"]["per_token"]["value"] > 1
        assert "violation rate" in out
        per_token = result["perplexity"][f"{corpus_files['plain']},rows=0:5"]["per_token"]
        assert per_token["low"] < per_token["value"] < per_token["high"]
        assert re.search(r"per token +[\d.]+ \[[\d.]+, [\d.]+\] n=\d+", out), "its interval is shown"
        assert result["completions"] == str(tmp_path / "said.jsonl")
        said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
        assert len(said) == rate["n"]
        assert {"prompt", "completion", "scores"} <= said[0].keys()
        assert sum(not row["scores"]["no e"]["complies"] for row in said) == round(rate["value"] * rate["n"])

    def test_text_is_drawn_as_it_is_asked_for(self, bridle, tiny_folder, tmp_path):
        ask = ("generate", tiny_folder(), "--prompt", "the old", *SHORT)
        drawn, greedy, cold, streamed = (
            bridle(*ask, *options)
            for options in ([], ["--greedy"], ["--top_p", "1e-9", "--seed", "5"], ["--stream", "--temperature", "1"])
        )
        assert {code for code, *_ in (drawn, greedy, cold, streamed)} == {0}
        assert drawn[1] != greedy[1] == cold[1]
        assert streamed[1].strip() == drawn[1].strip()
        assert bridle(*ask, "--temperature", "5")[1] not in (drawn[1], greedy[1])

    def test_a_known_set_is_decoded_by_its_protocol(self, bridle, tiny_folder, corpus_files, tmp_path, monkeypatch):
        model, data = tiny_folder(), tmp_path / "data"
        data.mkdir()
        shutil.copy(corpus_files["rude"], data / "toxigen.jsonl")
        monkeypatch.setenv("BRIDLE_SHARED", str(tmp_path))

        def figures_of(*options):
            code, out, err = bridle(
                *("evaluate", model, "--prompts", "toxigen-llama2,rows=:3", "--constraint", "regex:e", *options),
                *("--json", tmp_path / "results.json", "--completions", tmp_path / "said.jsonl", *SHORT),
            )
            assert code == 0, err
            (found,) = json.loads((tmp_path / "results.json").read_text())["prompt_sets"].values()
            said = [json.loads(line)["completion"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
            return found, said, out

        found, said, out = figures_of()
        assert "whole rows, 1 completion of at most 8 tokens, temperature 0.1, top-p 0.9" in out
        assert {"temperature": 0.1, "top_p": 0.9, "samples": 1, "max_new_tokens": 8}.items() <= found.items()
        code, _, err = bridle(
            *(
                "generate",
                model,
                "--prompts",
                f"{data / 'toxigen.jsonl'},rows=:3",
                "--temperature",
                0.1,
                "--top_p",
                0.9,
            ),
            *("--output", tmp_path / "text.jsonl", *SHORT),
        )
        assert code == 0, err
        by_hand = (tmp_path / "text.jsonl").read_text()
        assert [json.loads(line)["completion"] for line in by_hand.splitlines()] == said
        named = ("generate", model, "--prompts", "toxigen-llama2,rows=:3", "--output", tmp_path / "text.jsonl", *SHORT)
        assert bridle(*named)[0] == 0
        assert (tmp_path / "text.jsonl").read_text() == by_hand
        found, said, _ = figures_of("--temperature", 1, "--samples", 2)
        assert {"temperature": 1, "top_p": 0.9, "samples": 2}.items() <= found.items()
        assert len(said) == 6

    def test_an_adapter_is_trained_saved_and_used(self, bridle, recipe, tmp_path):
        folder = tmp_path / "run"
        changes = {"lora": {"r": 2}, "regularisers": {"rude": {"constraint": "no e", "anchor": "previous"}}}
        code, _, err = bridle("train", recipe(**changes), "--output_dir", folder)
        assert code == 0, err
        assert (folder / "model" / "adapter_model.safetensors").is_file()
        output = tmp_path / "text.jsonl"
        code, _, err = bridle("generate", folder / "model", "--prompt", "a kettle", "--output", output, *SHORT)
        assert code == 0, err
        assert json.loads(output.read_text())["prompt"] == "a kettle"

    def test_several_sets_constraints_and_tasks_in_one_results_file(self, bridle, shared, tmp_path):
        code, out, err = bridle(
            *("evaluate", shared / "models" / "mini-en", "--json", tmp_path / "results.json"),
            *("--prompts", "toxigen,rows=0:6", "--prompts", "realtoxicityprompts,rows=0:6"),
            *("--prompt_data", shared / "data", "--max_new_tokens", 4, "--base", shared / "models" / "mini-en"),
            *("--constraint", f"classifier:{shared / 'models' / 'mini-toxicity'},label=toxic"),
            *("--constraint", "regex:zzz"),
            *("--classify", f"{shared / 'data' / 'jigsaw.jsonl'},shuffle=0,rows=0:40"),
            *("--validation", f"{shared / 'data' / 'jigsaw.jsonl'},shuffle=0,rows=40:80"),
            *("--tasks", "piqa,mmlu", "--task_data", shared / "data" / "benchmarks", "--limit", 1, "--shots", 0),
        )
        assert code == 0, err
        results = json.loads((tmp_path / "results.json").read_text())
        assert [name.split(",")[0] for name in results["generation"]] == ["toxigen", "realtoxicityprompts"]
        for found in results["generation"].values():
            assert len(found) == 2
            assert found["regex:zzz"]["violation_rate"]["value"] == 0
        assert all(text["output_perplexity"]["value"] > 1 for text in results["text"].values())
        assert results["tasks"]["piqa"]["accuracy"]["n"] == 1
        assert results["tasks"]["mmlu"]["accuracy"]["n"] == 57
        assert 0 <= results["classification"]["roc_auc"]["value"] <= 1
        assert "mmlu" in out

    def test_a_judge_compares_what_methods_wrote(self, bridle, tiny_folder, tmp_path):
        for name, words in {"short": "mist", "long": "mist over the river"}.items():
            rows = [{"prompt": f"{text} ", "completion": f"{words} {i}"} for i, text in enumerate(SENTENCES)]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "v.jsonl").write_text('{"judge": "of an earlier run"}\n')
        code, out, err = bridle(
            *("judge", f"short={tmp_path / 'short.jsonl'}", f"long={tmp_path / 'long.jsonl'}"),
            *(
                "--judge",
                tiny_folder(max_position_embeddings=512),
                "--json",
                tmp_path / "wins.json",
                "--keep",
                tmp_path / "v.jsonl",
            ),
        )
        assert code == 0, err
        wins = json.loads((tmp_path / "wins.json").read_text())["win_rate"]
        assert wins["matrix"]["short"]["long"]["rate"]["n"] == len(SENTENCES)
        assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 2 * len(SENTENCES)
        assert "short" in out

    @pytest.mark.parametrize("options", [["--by", "likelihood"], ["--examples", 1]])
    def test_a_judge_is_examined(self, bridle, tiny_folder, tmp_path, options):
        texts = [f"{' '.join(SENTENCES[number:] + SENTENCES[:number])}" for number in range(len(SENTENCES))]
        (tmp_path / "human.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        code, out, err = bridle(
            *("judge", "--judge", tiny_folder(max_position_embeddings=512), "--examine", tmp_path / "human.jsonl"),
            *("--json", tmp_path / "examined.json", "--keep", tmp_path / "v.jsonl", *options),
        )
        assert code == 0, err
        found = json.loads((tmp_path / "examined.json").read_text())
        assert "win_rate" not in found
        examined = found["judge_examined"]
        rows = len(texts) - (2 if options[0] == "--examples" else 0)  # the example, and the other row it is made from
        assert examined["accuracy"]["n"] == 4 * rows
        assert len((tmp_path / "v.jsonl").read_text().splitlines()) == examined["asked"] == 8 * rows
        assert "human against shuffled" in out

    def test_overrides_reach_the_run_and_the_saved_recipe(self, bridle, recipe, tmp_path):
        folder = tmp_path / "run"
        code, _, err = bridle(
            *("train", recipe(), "--output_dir", folder, "--max_steps", 2, "--regularisers.rude.weight=1e1"),
            *("--regularisers.plain", "{constraint: retention, weight: 2}"),
        )
        assert code == 0, err
        saved = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert saved["max_steps"] == 2
        assert saved["regularisers"]["rude"]["weight"] == 10
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert any("kl/plain" in record for record in records)
        assert {record["rude/lambda"] for record in records if "round" in record} == {10.0}

    def test_a_run_that_was_cut_off_goes_on(self, bridle, recipe, tmp_path):
        folder = tmp_path / "run"
        code, _, err = bridle("train", recipe(), "--output_dir", folder)
        assert code == 0, err
        whole = (folder / "model" / "model.safetensors").read_bytes()
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "checkpoint-4")  # as if it had died in round 2
        code, _, err = bridle("train", recipe(), "--output_dir", folder, "--resume")
        assert code == 0, err
        assert (folder / "model" / "model.safetensors").read_bytes() == whole
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for key in ("step", "seconds"):
            assert [record[key] for record in records] == sorted(record[key] for record in records)
        code, out, err = bridle("watch", folder)
        assert code == 0, err
        assert [line.partition("  ")[0] for line in out.splitlines() if line.startswith("round")] == [
            "round 1/2", "round 2/2"
        ]  # fmt: skip
        assert out.splitlines()[-1].startswith("The run is over")

    def test_a_policy_that_loses_its_entropy_stops_the_run(self, bridle, recipe, tmp_path):
        code, _, err = bridle(
            *(
                "train",
                recipe(entropy_floor=0.99, learning_rate=0.1, max_steps=20),
                "--output_dir",
                tmp_path / "run",
            )
        )
        assert code == 3
        assert "the entropy of the policy's samples for rude fell from" in err.splitlines()[-1]
        assert list((tmp_path / "run").glob("checkpoint-*"))


def edited(**changes):
    return lambda mapping: {**mapping, **changes}


def in_group(*keys, **changes):
    def edit(mapping):
        group = mapping
        for key in keys:
            group = group[key]
        group.update(changes)
        return mapping

    return edit


BAD_RECIPES = {
    "missing data file": (in_group("corpus", "plain", path="nowhere.jsonl"), "nowhere.jsonl"),
    "absent column": (in_group("corpus", "plain", text="txet"), "no column 'txet'"),
    "unknown key": (edited(lerning_rate=1e-3), "there is no key 'lerning_rate'; did you mean learning_rate?"),
    "unknown key in a group": (
        in_group("regularisers", "rude", wieght=1),
        "regularisers.rude.wieght: there is no key 'wieght'; did you mean weight?",
    ),
    "negative weight": (in_group("regularisers", "rude", weight=-1), "regularisers.rude.weight"),
    "negative mixing weight": (in_group("corpus", "rude", weight=-1), "corpus.rude.weight"),
    "a weight in words": (in_group("regularisers", "rude", weight="heavy"), "regularisers.rude.weight"),
    "unknown domain": (
        edited(regularisers={"rdue": {"constraint": "no e"}}),
        "regularisers.rdue: there is no domain 'rdue'; did you mean rude?",
    ),
    "unknown constraint": (
        edited(regularisers={"rude": {"constraint": "no f"}}),
        "there is no constraint 'no f'; did you mean no e?",
    ),
    "a regulariser without a constraint": (
        edited(regularisers={"rude": {"weight": 1}}),
        "regularisers.rude.constraint",
    ),
    "unknown anchor": (in_group("regularisers", "rude", anchor="lively"), "regularisers.rude.anchor"),
    "unknown constraint type": (edited(constraints={"no e": {"type": "regexp", "pattern": "e"}}), "regexp"),
    "an import that fails": (
        edited(constraints={"no e": {"type": "python", "function": "no_such_module:f"}}),
        "cannot import no_such_module:f",
    ),
    "no model": (edited(model=None), "model: is missing"),
    "no corpus": (edited(corpus={}), "corpus: is missing"),
    "a model that is not there": (edited(model="no/such/folder"), "no/such/folder"),
    "rounds of zero": (edited(rounds=0), "rounds"),
    "a share above one": (edited(empty_bound=1.5), "empty_bound: must be from 0 to 1, not 1.5"),
    "a share that is no number": (edited(calibration_bound=float("nan")), ".nan is not a finite number"),
    "fewer than no skipped steps": (edited(max_skipped_steps=-1), "max_skipped_steps: must be at least 0"),
    "max_steps in words": (edited(max_steps="many"), "max_steps"),
    "an impossible packing": (edited(packing=True, packing_strategy="bfd"), "packing_strategy"),
    "a group that is no mapping": (edited(corpus=["plain"]), "corpus: must be a mapping"),
    "an optimiser that is misspelt": (edited(optim="adamm"), "adamm"),
    "an option of the command line": (edited(resume_from_checkpoint="x"), "resume_from_checkpoint: .* --resume"),
    "a constraint within a regulariser": (
        in_group("regularisers", "rude", constraint={"type": "length", "min_words": 1}),
        "regularisers.rude.constraint: must be a name; define the constraint under constraints",
    ),
    "a quantised model": (edited(load_in_4bit=True), "load_in_4bit: training of a quantised model is not supported"),
    "options of loading": (edited(model_init_kwargs={"dtype": "bfloat16"}), "model_init_kwargs: .* such as dtype"),
    "a key like no other": (edited(xyzzy=1), "there are: model, corpus, .*, .*bridle train --help"),
    "a chat template that is not there": (edited(chat_template_path="a.jinja"), "chat_template_path: a.jinja: no such"),
    "bf16 without a GPU": (edited(bf16=True, use_cpu=False), "bf16: .*use_cpu"),
}


class TestMistakes:
    def assert_one_line(self, result, *parts):
        code, _, err = result
        lines = [line for line in err.splitlines() if line.startswith("bridle: ")]
        assert code == 2, err
        assert "Traceback" not in err
        assert len(lines) == 1, err
        for part in parts:
            assert str(part) in lines[0] or re.search(str(part), lines[0])

    @pytest.mark.parametrize("mistake", BAD_RECIPES)
    def test_in_a_recipe(self, bridle, recipe, tmp_path, mistake):
        edit, part = BAD_RECIPES[mistake]
        path = recipe()
        path.write_text(yaml.safe_dump(edit(yaml.safe_load(path.read_text()))))
        self.assert_one_line(bridle("train", path, "--output_dir", tmp_path / "run"), part)
        assert not (tmp_path / "run" / "recipe.yaml").exists(), "nothing is left that looks like a run"

    def test_recipe_files(self, bridle, tmp_path):
        (tmp_path / "broken.yaml").write_text("model: [")
        (tmp_path / "list.yaml").write_text("- a\n- b\n")
        (tmp_path / "unset.yaml").write_text("model: ${BRIDLE_UNSET}\n")
        (tmp_path / "unquoted.yaml").write_text("model: a\ncorpus: {a: {path: ${HOME}/a.jsonl}}\n")
        self.assert_one_line(bridle("train", tmp_path / "nowhere.yaml"), "nowhere.yaml", "No such file")
        self.assert_one_line(bridle("train", tmp_path / "broken.yaml"), "broken.yaml: not valid YAML: ")
        self.assert_one_line(
            bridle("train", tmp_path / "unquoted.yaml"), "yaml: line 2, column 21: not", "; quote values that hold"
        )
        self.assert_one_line(bridle("train", tmp_path / "list.yaml"), "list.yaml", "mapping")
        self.assert_one_line(bridle("train", tmp_path / "unset.yaml"), "BRIDLE_UNSET is not set")

    def test_overrides(self, bridle, recipe, tmp_path):
        path = recipe()
        self.assert_one_line(bridle("train", path, "--max_setps", 3), "did you mean max_steps?")
        self.assert_one_line(bridle("train", path, "--max_steps"), "needs a value")
        self.assert_one_line(bridle("train", path, "stray"), "stray")
        self.assert_one_line(
            bridle("train", path, "--corpus.rdue.weight", 3), "there is no domain 'rdue'", "mean rude?"
        )

    @pytest.mark.parametrize(
        "overrides",
        [
            {"corpus.b": {"path": "b.jsonl"}, "corpus.b.weight": 2},
            {"corpus": {"b": {"path": "b.jsonl"}}, "corpus.b.weight": 2},
            {"corpus.b.weight": 2, "corpus.b.path": "b.jsonl"},
        ],
    )
    def test_overrides_add_a_domain(self, tmp_path, overrides):
        (tmp_path / "recipe.yaml").write_text("model: m\ncorpus: {a: {path: a.jsonl}}\n")
        assert load_recipe(tmp_path / "recipe.yaml", overrides).corpus["b"].weight == 2

    def test_a_folder_without_a_run_begins_one_and_says_so(self, bridle, recipe, tmp_path, caplog):
        code, *_ = bridle("train", recipe(max_steps=1, rounds=1), "--output_dir", tmp_path / "rnu", "--resume")
        assert code == 0
        assert f"{tmp_path / 'rnu'}: holds no run to resume; a new one begins there" in caplog.messages

    def test_a_constraint_that_had_no_part(self, bridle, recipe, tmp_path, caplog):
        path = recipe(max_steps=2, rounds=1, constraints={"no e": {"type": "regex", "pattern": "no such text"}})
        code, _, err = bridle("train", path, "--output_dir", tmp_path / "run")
        assert code == 0, err
        assert caplog.messages[-1].startswith("rude: the constraint had no part in this model")
        metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert "had no part" in json.loads(metrics[-1])["warnings"][0]
        guided = ("generate", tmp_path / "run" / "model", "--prompt", "the", "--guide", tmp_path / "run" / "auxiliary")
        self.assert_one_line(bridle(*guided), "no auxiliary model here: the run has fitted no R")

    def test_a_folder_that_holds_a_run(self, bridle, recipe, tmp_path):
        path = recipe(max_steps=2, rounds=1)
        assert bridle("train", path, "--output_dir", tmp_path / "run")[0] == 0
        self.assert_one_line(bridle("train", path, "--output_dir", tmp_path / "run"), tmp_path / "run", "--resume")

    def test_a_finished_run_that_is_resumed_writes_no_record_twice(self, bridle, recipe, tmp_path):
        run = ("train", recipe(max_steps=1, rounds=1), "--output_dir", tmp_path / "run")
        assert bridle(*run)[0] == 0
        keys = [sorted(json.loads(line)) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        for _ in range(2):
            assert bridle(*run, "--resume")[0] == 0
            again = [sorted(json.loads(line)) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
            assert again == keys

    def test_a_recipe_that_has_changed_is_not_resumed_unasked(self, bridle, recipe, tmp_path):
        path, run = recipe(max_steps=2, rounds=1), ("--output_dir", tmp_path / "run")
        assert bridle("train", path, *run)[0] == 0
        changed = (*run, "--resume", "--learning_rate", 0.5, "--regularisers.rude.weight", 2)
        keys = "learning_rate, regularisers.rude.weight differ"
        self.assert_one_line(bridle("train", path, *changed), tmp_path / "run", keys, "--accept_changes")
        assert bridle("train", path, *changed, "--accept_changes")[0] == 0
        assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["learning_rate"] == 0.5
        mapping = yaml.safe_load(path.read_text())
        mapping["corpus"] = dict(reversed(mapping["corpus"].items()))  # other rows come next
        path.write_text(yaml.safe_dump(mapping, sort_keys=False))
        line = "corpus differ"
        done = bridle("train", path, *run, "--resume", "--learning_rate", 0.5, "--regularisers.rude.weight", 2)
        self.assert_one_line(done, tmp_path / "run", line, "--accept_changes")

    def test_a_folder_that_another_run_is_writing_to(self, bridle, recipe, tmp_path):
        with only_writer(tmp_path / "run"):
            done = bridle("train", recipe(max_steps=2, rounds=1), "--output_dir", tmp_path / "run")
        self.assert_one_line(done, tmp_path / "run", "another run is writing here")

    def test_empty_and_malformed_data(self, bridle, recipe, tmp_path, corpus_files):
        path = recipe()
        corpus_files["rude"].write_text("")
        self.assert_one_line(bridle("train", path, "--output_dir", tmp_path / "a"), corpus_files["rude"])
        corpus_files["rude"].write_text('{"text": "a"}\n{"text": \n')
        self.assert_one_line(bridle("train", path, "--output_dir", tmp_path / "b"), corpus_files["rude"], "row 2")

    def test_a_model_folder_without_weights(self, bridle, recipe, tmp_path):
        path = recipe()
        next(Path(yaml.safe_load(path.read_text())["model"]).glob("*.safetensors")).unlink()
        self.assert_one_line(bridle("train", path, "--output_dir", tmp_path / "a"), "no weights")

    def test_what_a_prompt_or_a_model_writes_is_shown_and_not_obeyed(self, bridle, tiny_folder, tmp_path):
        model, prompts = tiny_folder(), tmp_path / "prompts.jsonl"
        prompts.write_text(json.dumps({"prompt": "a\x1b]0;owned\x07"}) + "\n")
        code, out, err = bridle("generate", model, "--prompts", prompts, "--samples", 9, "--max_new_tokens", 9)
        assert code == 0, err
        assert out.count("a\\x1b]0;owned\\x07") == 9
        assert all(character.isprintable() or character in "\n\t" for character in out)

    def test_generate_and_evaluate(self, bridle, tiny_folder, tmp_path):
        model = tiny_folder()
        long = tmp_path / "long.jsonl"
        long.write_text(json.dumps({"prompt": " ".join(SENTENCES)}) + "\n")
        self.assert_one_line(bridle("generate", model, "--prompts", long), long, "row 1", "context")
        self.assert_one_line(bridle("generate", model), "--prompts FILE or --prompt TEXT")
        self.assert_one_line(bridle("generate", model, "--prompt", "a", "--guide", tmp_path), "no auxiliary model")
        self.assert_one_line(bridle("generate", tmp_path / "none", "--prompt", "a"), tmp_path / "none")
        self.assert_one_line(bridle("evaluate", model), "nothing to measure")
        self.assert_one_line(bridle("evaluate", model, "--prompts", long), "go together")
        self.assert_one_line(bridle("evaluate", model, "--prompts", long, "--constraint", "regex:("), "regex")
        self.assert_one_line(bridle("evaluate", model, "--tasks", "piqqa"), "piqqa")
        self.assert_one_line(bridle("evaluate", model, "--tasks", "piqa", "--task_data", tmp_path), "piqa", tmp_path)
        self.assert_one_line(bridle("judge", "a=b.jsonl", "--judge", model), "two methods")
        self.assert_one_line(bridle("evaluate", model, "--perplexity", tmp_path / "no.jsonl"), "no.jsonl")


class TestRecipes:
    def test_words_stay_words_and_numbers_numbers(self):
        from bridle.recipes.recipe import parse_overrides

        given = ["--a", "2e-5", "--b", "{kl_on: both, weight: 1e1}", "--c", "no", "--d", "true", "--e", "[2, 16]"]
        assert parse_overrides(given) == {
            "a": 2e-5,
            "b": {"kl_on": "both", "weight": 10.0},
            "c": "no",
            "d": True,
            "e": [2, 16],
        }

    @pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_shipped_recipe_parses(self, path):
        from bridle.recipes.recipe import load_recipe

        recipe = load_recipe(path)
        assert recipe.regularisers
        config = recipe.config("unused") if "bf16" not in recipe.training else None
        assert config is None or config.max_steps > 0

    def test_help_is_there(self, bridle):
        for command in ([], ["train"], ["generate"], ["evaluate"]):
            code, out, _ = bridle(*command, "--help")
            assert code == 0
            assert "Usage: bridle" in out
