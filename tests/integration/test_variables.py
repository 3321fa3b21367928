"""Environment variables: a recipe reads those that it lists, and no file of a run holds the value of any."""

import base64
import json
import os
from pathlib import Path

import pytest
import yaml
from pydantic import SecretStr

from bridle.comparison import methods
from bridle.comparison.plan import section_of
from bridle.constraints import build_constraint
from bridle.errors import UserError
from bridle.recipes.recipe import build_recipe, constraint_of, load_recipe
from bridle.utils.variables import Variables, expanded
from loopback import completion, ok

LISTED = ["DATA_DIR", "WORDS_DIR", "SCORER_NAME", "PROMPT_WORD", "HUB_WORD", "MODEL_DIR"]


@pytest.fixture
def unlike(monkeypatch):
    """Gives every environment variable of more than 8 characters a value of its own, where nothing breaks by it."""
    for index, name in enumerate(os.environ):
        used = ("PATH", "HOME", "HF_", "PYTHON", "PYTEST", "LD_", "TMP", "BRIDLE", "CUDA", "LANG", "LC_", "GIT")
        if len(os.environ[name]) > 8 and not any(part in name for part in used):
            monkeypatch.setenv(name, f"invented-value-{index:04}-of-a-variable")


def scanned(folders, allowed=()):
    """Which files hold the value of which variable, as it is or in base64."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for name, value in os.environ.items():
            known = any(given.startswith(value) for given in allowed)
            if len(value) > 8 and not known:
                forms = value.encode(), json.dumps(value).encode()[1:-1], base64.b64encode(value.encode()).rstrip(b"=")
                found += [(str(path), name) for form in forms if form in content]
    return found


@pytest.fixture
def written(recipe, server, monkeypatch, tmp_path, corpus_files, unlike):
    """A recipe that reads a variable wherever it can be read."""
    server.answer = lambda request: ok({"rude": 0.9 if "e" in request["input"] else 0.2})
    for name, folder in {"DATA_DIR": "of-rows", "WORDS_DIR": "of-words"}.items():
        (tmp_path / "given" / folder).mkdir(parents=True)
        monkeypatch.setenv(name, str(tmp_path / "given" / folder))
    (tmp_path / "given" / "of-words" / "words.txt").write_text("muddlehead\n")
    for name, path in corpus_files.items():
        path.rename(tmp_path / "given" / "of-rows" / f"{name}.jsonl")
    monkeypatch.setenv("SCORER_NAME", "scorer-by-an-invented-name")
    monkeypatch.setenv("PROMPT_WORD", "word-in-an-invented-prompt")
    monkeypatch.setenv("HUB_WORD", "hf_inventedInventedInvented")
    monkeypatch.setenv("SCORER_KEY", "sk-invented-0123456789")
    body = {"input": "{text}", "about": "${PROMPT_WORD}"}
    remote = {"type": "remote", "url": f"{server.url}/${{SCORER_NAME}}", "body": body, "score": "rude"}
    remote |= {"api_key_env": "SCORER_KEY", "cache": "${DATA_DIR}/labels.sqlite", "concurrency": 1}
    path = recipe(
        constraints={"mild": {"all": [{"type": "words", "file": "${WORDS_DIR}/words.txt"}, remote]}},
        regularisers={"rude": {"constraint": "mild", "weight": 4.0}},
        corpus={name: {"path": f"${{DATA_DIR}}/{name}.jsonl"} for name in corpus_files},
        env=LISTED,
        hub_token="${HUB_WORD}",
        run_name="${PROMPT_WORD}",
        report_to=["tensorboard"],
        save_strategy="steps",
        save_steps=2,
    )
    mapping = yaml.safe_load(path.read_text())
    monkeypatch.setenv("MODEL_DIR", mapping["model"])
    path.write_text(yaml.safe_dump(mapping | {"model": "${MODEL_DIR}"}))
    return path


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["whole", "adapter"])
def test_no_file_of_a_run_holds_a_variables_value(written, bridle, tmp_path, server, lora, monkeypatch):
    folder = tmp_path / "run"
    if lora:
        mapping = yaml.safe_load(written.read_text()) | {"lora": lora, "model": os.environ["MODEL_DIR"]}
        written.write_text(yaml.safe_dump(mapping))
    code, _, err = bridle("train", written, "--output_dir", folder)
    assert code == 0, err
    assert {path for path, _, _ in server.requests} == {"/scorer-by-an-invented-name"}
    assert json.loads(server.requests[0][2])["about"] == "word-in-an-invented-prompt"
    given = [str(written), str(folder), str(tmp_path / "tiny-llama")]
    assert scanned([folder, tmp_path / "given"], given) == []
    saved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert saved == {k: v for k, v in yaml.safe_load(written.read_text()).items() if k != "hub_token"}
    oracle = json.loads((folder / "auxiliary" / "config.json").read_text())["provenance"]["constraint"]
    assert oracle["all"][0]["file"] == "${WORDS_DIR}/words.txt"
    assert oracle["all"][1]["url"] == f"{server.url}/${{SCORER_NAME}}"
    assert oracle["all"][1]["body"]["about"] == "${PROMPT_WORD}"
    code, _, err = bridle("train", written, "--output_dir", folder, "--resume", "--max_steps", "6", "--accept_changes")
    assert code == 0, err
    monkeypatch.setenv("MODEL_DIR", "nowhere")
    assert load_recipe(folder / "recipe.yaml").model == ("nowhere" if lora is None else mapping["model"])


def telling(cell):
    """Fails, with a variable's value in the reason."""
    raise RuntimeError(f"no {os.environ['PROMPT_WORD']} here")


def test_no_file_of_a_comparison_holds_a_variables_value(written, bridle, tmp_path, server, monkeypatch):
    score = server.answer
    server.answer = lambda request: completion('{"winner": "A"}') if "messages" in request else score(request)
    evaluation = {
        "prompts": {"rude": {"path": "${DATA_DIR}/rude.jsonl", "rows": "0:12", "prompt_tokens": 2}},
        "perplexity": {"plain": {"path": "${DATA_DIR}/plain.jsonl", "rows": "0:4"}},
        "judge": {"model": "${SCORER_NAME}", "url": server.url, "api_key_env": "SCORER_KEY", "prompts": 12},
        "samples": 1,
    }
    written.write_text(yaml.safe_dump(yaml.safe_load(written.read_text()) | {"evaluation": evaluation}))
    monkeypatch.setitem(methods.BUILT_IN, "telling", telling)
    folder = tmp_path / "out"
    asked = ["compare", written, "--output_dir", folder, "--methods", "telling,base,sft,nado-decoding"]
    code, _, err = bridle(*asked)
    assert code == 3, err  # as one fails
    given = [str(written), str(folder)]
    assert scanned([folder, tmp_path / "given"], given) == []
    results = json.loads((folder / "results.json").read_text())
    statuses = {name: method["seeds"]["0"]["status"] for name, method in results["methods"].items()}
    assert statuses == dict.fromkeys(statuses, "complete") | {"telling": "failed"}
    assert results["methods"]["telling"]["seeds"]["0"]["reason"] == "RuntimeError: no ${PROMPT_WORD} here"
    assert results["settings"] == evaluation | {"reads": {"mild": "completion"}}
    assert results["win_rate"]["judge"] == "${SCORER_NAME}"
    judged = [body for body in server.bodies if "messages" in body]  # the others score
    assert judged[-1]["model"] == os.environ["SCORER_NAME"]
    assert json.loads((folder / "base" / "seed-0" / "candidate.json").read_text())["model"] == "${MODEL_DIR}"
    (folder / "base" / "seed-0" / "results.json").unlink()
    code, _, err = bridle(*asked, "--resume")
    assert code == 3, err  # as one fails
    assert (folder / "base" / "seed-0" / "results.json").exists()
    assert scanned([folder], given) == []


class TestReading:
    @pytest.fixture(autouse=True)
    def _variables(self, monkeypatch):
        monkeypatch.setenv("SOME_SECRET", "invented-secret")
        monkeypatch.setenv("BRIDLE_ROWS", "/invented/rows")
        monkeypatch.setenv("HOME", "/invented/home")

    @pytest.mark.parametrize(
        ("text", "read", "names"),
        [
            ("${SOME_SECRET}", "invented-secret", ["SOME_SECRET"]),
            ("a${SOME_SECRET}b${UNSET:-c}", "ainvented-secretbc", ["SOME_SECRET", "UNSET"]),
            ("${BRIDLE_ROWS}/a", "/invented/rows/a", ["BRIDLE_ROWS"]),
            ("${HOME}/a", "/invented/home/a", ["HOME"]),
            ("~/a", "~/a", []),
            ("${BRIDLE_UNSET:-../shared}/a", "../shared/a", ["BRIDLE_UNSET"]),
            ("$SOME_SECRET {text} ${", "$SOME_SECRET {text} ${", []),
        ],
    )
    def test_what_is_listed_and_where_things_lie(self, text, read, names):
        mapping, variables = expanded({"env": ["SOME_SECRET", "UNSET"], "a": [{"b": text}]})
        assert mapping == {"a": [{"b": read}]}
        assert variables.names == set(names)

    @pytest.mark.parametrize("text", ["${SOME_SECRET}", "${SOME_SECRET:-x}", "a/${HOME}", "https://h/${BRIDLE_ROWS}"])
    def test_nothing_else(self, text):
        with pytest.raises(UserError, match="the recipe does not say that it reads") as caught:
            expanded({"a": text})
        assert "invented" not in str(caught.value)

    def test_what_is_hidden_comes_back(self):
        variables = Variables(frozenset({"SOME_SECRET", "BRIDLE_ROWS"}))
        told = {"a": ["/invented/rows/b", 1, None], "c": Path("/invented/rows"), "d": "not invented-secretive"}
        hidden = variables.hidden(told)
        assert hidden == {"a": ["${BRIDLE_ROWS}/b", 1, None], "c": "${BRIDLE_ROWS}", "d": "not ${SOME_SECRET}ive"}
        assert variables.expanded(hidden) == told | {"c": "/invented/rows"}

    def test_what_is_short_is_no_secret(self, monkeypatch):
        monkeypatch.setenv("SOME_SECRET", "e")
        assert Variables(frozenset({"SOME_SECRET"})).hidden("the kettle") == "the kettle"

    def test_paths_begin_with_the_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "words.txt").write_text("rude\n")
        words = {"listed": {"type": "words", "words": ["~/.ssh"]}, "kept": {"type": "words", "file": "~/words.txt"}}
        recipe = build_recipe(
            {
                "model": "~/model",
                "corpus": {"a": {"path": "~/a.jsonl"}},
                "constraints": words,
                "evaluation": {"judge": {"model": "~/judge"}, "task_data": "~/tasks"},
                "chat_template_path": "~/chat.jinja",
            }
        )
        assert (recipe.model, recipe.training["chat_template_path"]) == (f"{tmp_path}/model", f"{tmp_path}/chat.jinja")
        assert recipe.constraints["listed"].words == ["~/.ssh"]
        assert recipe.constraints["kept"].files() == [tmp_path / "words.txt"]
        measured = section_of(recipe)
        assert (measured.judge.model, measured.task_data) == (f"{tmp_path}/judge", tmp_path / "tasks")
        assert recipe.resolved["model"] == "~/model"

    def test_a_constraint_of_a_recipe(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text("env: [SOME_SECRET]\nconstraints: {kind: {type: regex, pattern: '${SOME_SECRET}'}}\n")
        kind = constraint_of(f"{path}:kind")
        assert kind.score(None, ["an invented-secret"])[0].complies is False
        assert kind.describe()["pattern"] == "${SOME_SECRET}"
        assert build_constraint(Variables(frozenset({"SOME_SECRET"})).expanded(kind.describe())).score(None, ["b"])
        path.write_text("constraints: {kind: {type: regex, pattern: '${SOME_SECRET}'}}\n")
        with pytest.raises(UserError, match=r"recipe.yaml: \$\{SOME_SECRET\}: the recipe does not say"):
            constraint_of(f"{path}:kind")

    def test_a_token_cannot_be_written_down(self):
        recipe = build_recipe(
            {"env": ["SOME_SECRET"], "model": "m", "corpus": {"a": {"path": "a.jsonl"}}, "hub_token": "x" * 20}
        )
        assert recipe.training["hub_token"] == recipe.resolved["hub_token"] == SecretStr("x" * 20)
        assert recipe.config("unused").hub_token == "x" * 20
        again = build_recipe(build_recipe({**recipe.resolved, "env": ["HOME"], "hub_token": "${HOME}"}).resolved)
        assert again.config("unused").hub_token == os.environ["HOME"], "a recipe that is built again knows it, too"
        for write in (yaml.safe_dump, json.dumps):
            with pytest.raises((TypeError, yaml.YAMLError)):
                write(recipe.resolved)
        assert "x" * 20 not in repr(recipe)
        assert build_recipe(recipe.resolved).training == recipe.training
