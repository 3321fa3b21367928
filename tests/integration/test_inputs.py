"""What a run was begun with is what it goes on with: a file that was edited meanwhile is named."""

import json
import os
import sys

import pytest
import yaml

from bridle.errors import UserError
from bridle.recipes.inputs import INPUTS_FILE, check_inputs, write_inputs
from bridle.recipes.recipe import load_recipe
from conftest import SENTENCES

OF_EVALUATION = ("held-out.jsonl", "asked.jsonl", "others.txt")


def edited(path):
    """Changes one letter, and neither size nor time."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b"the", b"thy", 1))
    assert path.read_bytes() != content
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return content


@pytest.fixture
def path(recipe, corpus_files, tmp_path, monkeypatch):
    """A recipe that reads a file of every kind."""
    (tmp_path / "words.txt").write_text("the\nmuddlehead\n")
    (tmp_path / "given_scorers.py").write_text("def mild(texts):\n    return ['the fog' not in t for t in texts]\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in SENTENCES))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("STEPS", "3")
    for name in ("held-out.jsonl", "asked.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    (tmp_path / "others.txt").write_text("the\nfog\n")
    (tmp_path / "chat.jinja").write_text("the {{ messages[0]['content'] }}")
    words = {"type": "words", "file": str(tmp_path / "words.txt")}
    function = {"type": "python", "function": "given_scorers:mild"}
    yield recipe(
        env=["STEPS"],
        constraints={
            "mild": {"any": [words, function, {"type": "regex", "pattern": "e"}]},
            "others": {"type": "words", "file": str(tmp_path / "others.txt")},
        },
        regularisers={"rude": {"constraint": "mild", "prompts": {"path": str(tmp_path / "prompts.jsonl")}}},
        eval={
            "corpus": {"plain": {"path": str(tmp_path / "held-out.jsonl")}},
            "prompts": {"path": str(tmp_path / "asked.jsonl")},
            "constraints": ["others"],
            "completions": 4,
        },
        chat_template_path=str(tmp_path / "chat.jinja"),
        rounds=1,
        max_steps="${STEPS}",
    )
    sys.modules.pop("given_scorers", None)


def test_a_refused_recipe_leaves_no_run(bridle, path, tmp_path):
    run = ("train", path, "--output_dir", tmp_path / "run")
    code, _, err = bridle(*run, "--rounds", "9")
    assert code == 2
    assert "rounds: 9 are more than the run's 3 updates" in err
    code, _, err = bridle(*run)
    assert code == 0, err


def test_a_run_goes_on_with_the_files_it_was_begun_with(bridle, path, tmp_path, corpus_files, monkeypatch):
    run = ("train", path, "--output_dir", tmp_path / "run")
    assert bridle(*run)[0] == 0
    inputs = json.loads((tmp_path / "run" / INPUTS_FILE).read_text())
    model = tmp_path / "tiny-llama"
    for file in (
        *corpus_files.values(),
        *(tmp_path / name for name in ("words.txt", "given_scorers.py", "prompts.jsonl", *OF_EVALUATION)),
        model / "model.safetensors",
        model / "tokenizer.json",
    ):
        assert str(file) in inputs["files"]
    for name in ("plain.jsonl", "words.txt", "given_scorers.py", "prompts.jsonl", *OF_EVALUATION, "chat.jinja"):
        content = edited(tmp_path / name)
        code, _, err = bridle(*run, "--resume")
        assert code == 2
        (line,) = err.splitlines()
        assert f"{tmp_path / name}: changed since" in line
        assert "--accept_changes" in line
        (tmp_path / name).write_bytes(content)
    assert bridle(*run, "--resume")[0] == 0, "as nothing has changed"
    monkeypatch.setenv("STEPS", "4")
    code, _, err = bridle(*run, "--resume")
    assert code == 2
    assert "the variable in max_steps: changed since" in err
    edited(corpus_files["plain"])
    assert bridle(*run, "--resume", "--accept_changes")[0] == 0
    assert bridle(*run, "--resume")[0] == 0, "the new ones are what it has now"


def test_files_that_come_or_go_are_changes(path, tmp_path, corpus_files):
    (tmp_path / "run").mkdir()
    recipe = load_recipe(path, {"corpus.plain.path": str(tmp_path / "part-*.jsonl")})
    parts = [tmp_path / f"part-{number}.jsonl" for number in (1, 2)]
    for part in parts:
        part.write_bytes(corpus_files["plain"].read_bytes())
    write_inputs(recipe, tmp_path / "run")
    check_inputs(recipe, tmp_path / "run", "")
    (tmp_path / "part-3.jsonl").write_bytes(parts[0].read_bytes())
    with pytest.raises(UserError, match=r"part-3.jsonl: changed since"):
        check_inputs(recipe, tmp_path / "run", "")
    check_inputs(recipe, tmp_path / "run", "", reads_the_same=False)
    (tmp_path / "part-3.jsonl").rename(parts[0])
    parts[1].unlink()
    with pytest.raises(UserError, match=r"part-2.jsonl: changed since"):
        check_inputs(recipe, tmp_path / "run", "")


@pytest.mark.parametrize(
    "folders", [("a", "b"), ("a-long-name-of-a-folder", "another-long-name-of-one"), ("./a", "b/../c"), (None, "b")]
)
def test_files_that_were_moved_are_known_by_their_variable(path, tmp_path, corpus_files, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    before, after = (folder or "the-default" for folder in folders)
    (tmp_path / "b").mkdir()
    (tmp_path / before).mkdir()
    (tmp_path / before / "rows.jsonl").write_bytes(corpus_files["plain"].read_bytes())
    if folders[0] is not None:
        monkeypatch.setenv("ROWS", before)
    changes = {"env": ["STEPS", "ROWS"], "corpus.plain.path": "${ROWS:-the-default}/rows.jsonl"}
    write_inputs(load_recipe(path, changes), tmp_path / "run")
    (tmp_path / before).rename(tmp_path / after)
    monkeypatch.setenv("ROWS", after)
    check_inputs(load_recipe(path, changes), tmp_path / "run", "")
    edited(tmp_path / after / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows.jsonl: changed since|rows.jsonl.*rows.jsonl: changed since"):
        check_inputs(load_recipe(path, changes), tmp_path / "run", "")


def test_hidden_folders_are_not_inputs(path, tmp_path):
    (tmp_path / "tiny-llama" / ".git").mkdir()
    (tmp_path / "tiny-llama" / ".git" / "HEAD").write_text("ref: refs/heads/main")
    write_inputs(load_recipe(path), tmp_path / "run")
    inputs = json.loads((tmp_path / "run" / INPUTS_FILE).read_text())
    assert str(tmp_path / "tiny-llama" / "config.json") in inputs["files"]
    assert not [name for name in inputs["files"] if ".git" in name]


def test_a_comparison_goes_on_with_the_files_it_was_begun_with(bridle, path, tmp_path, corpus_files):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_bytes(corpus_files["plain"].read_bytes())
    evaluation = {
        "prompts": {"rude": {"path": str(corpus_files["rude"]), "rows": "0:4", "prompt_tokens": 2}},
        "perplexity": {"plain": {"path": str(held_out), "rows": "0:4"}},
        "samples": 1,
    }
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"evaluation": evaluation}))
    compare = ("compare", path, "--methods", "base", "--output_dir", tmp_path / "out")
    assert bridle(*compare)[0] == 0
    assert bridle(*compare, "--resume")[0] == 0
    for file in (held_out, tmp_path / "words.txt", corpus_files["plain"]):
        content = edited(file)
        code, _, err = bridle(*compare, "--resume")
        assert code == 2
        assert f"{file}: changed since" in err.splitlines()[-1]
        file.write_bytes(content)


def test_no_value_of_a_variable_is_written_down(path, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "3000000000")
    write_inputs(load_recipe(path), tmp_path / "one")
    write_inputs(load_recipe(path), tmp_path / "two")
    one, two = (json.loads((tmp_path / name / INPUTS_FILE).read_text()) for name in ("one", "two"))
    assert one["files"] == two["files"]
    assert one["variables"].keys() == two["variables"].keys() == {"max_steps"}
    assert one["variables"] != two["variables"], "no table of likely values finds it"
    assert "3000000000" not in json.dumps(one)


def test_a_comparison_notices_a_file_that_came_whatever_numbers_changed(bridle, path, tmp_path, corpus_files):
    (tmp_path / "part-1.jsonl").write_bytes(corpus_files["plain"].read_bytes())
    plan = {"prompts": {"rude": {"path": str(corpus_files["rude"]), "rows": "0:4", "prompt_tokens": 2}}, "samples": 1}
    recipe = yaml.safe_load(path.read_text()) | {"evaluation": plan}
    recipe["corpus"]["plain"]["path"] = str(tmp_path / "part-*.jsonl")
    path.write_text(yaml.safe_dump(recipe))
    compare = ("compare", path, "--methods", "base", "--output_dir", tmp_path / "out")
    assert bridle(*compare)[0] == 0
    (tmp_path / "part-2.jsonl").write_bytes(corpus_files["rude"].read_bytes())
    code, _, err = bridle(*compare, "--resume", "--evaluation.samples", 2)
    assert code == 2
    assert "part-2.jsonl: changed since" in err.splitlines()[-1]
