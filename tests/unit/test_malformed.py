"""Whatever is malformed ends in one clear line that names it, or in rows passed over and counted: see `malformed`."""

import copy
import json
import logging
import re

import pytest
import yaml
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import malformed
import report_folder
import tiny_tokenizers
from bridle.comparison.compare import Comparison
from bridle.comparison.methods import options_of
from bridle.comparison.plan import evaluation_of
from bridle.constraints.base import Score
from bridle.constraints.mapping import JsonMapping, Scale
from bridle.data import DataSource, Domain, read_prompts, tokenize_domain
from bridle.errors import UserError
from bridle.evaluation.judges import read_verdict
from bridle.recipes.recipe import build_recipe, load_recipe
from bridle.report.reading import read_report
from bridle.training.state import RegulariserState, readable
from bridle.utils.checkpoints import last_whole

TABLES = {name: table for name, table in vars(malformed).items() if isinstance(table, list | dict) and name.isupper()}
ENTRIES = {name: table for name, table in TABLES.items() if name not in ("RECIPE", "REGEX", "REMOTE", "ROLLOUT")}


def of(table):
    """Parametrises a test over a table: its arguments are `given`, ..., `said`."""
    rows = [row if isinstance(row, tuple) else (row,) for row in (table.values() if isinstance(table, dict) else table)]
    names = list(table) if isinstance(table, dict) else [_id(row) for row in rows]
    return [pytest.param(*row, id=name) for row, name in zip(rows, names, strict=True)]


def _id(row):
    return re.sub(r"[^\w.,:-]+", " ", " ".join(map(repr, row)))[:70].strip()


def test_there_are_at_least_two_hundred():
    assert sum(map(len, ENTRIES.values())) >= 200


def ends_in_one_line(act, said):
    """Asserts that an act ends in a `UserError` of one line that says so."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert said in message
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert len(message) < 1100


def written(path, content):
    """Writes text or bytes; None removes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogateescape"))
    return path


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizers.tiny_tokenizer()


@pytest.mark.parametrize(("text", "said"), of(malformed.RECIPE_FILES))
def test_recipe_files(text, said, tmp_path):
    path = written(tmp_path / "recipe.yaml", text)
    ends_in_one_line(lambda: load_recipe(path), said)
    ends_in_one_line(lambda: load_recipe(path), "recipe.yaml: ")


def read(mapping):
    """A recipe as `bridle compare` reads it, up to where files are read."""
    recipe = build_recipe(mapping)
    recipe.config("unused")
    evaluation_of(recipe)
    options_of("rl", recipe)
    return recipe


def with_key(dotted, value):
    mapping = copy.deepcopy(malformed.RECIPE)
    *groups, last = dotted.split(".")
    inner = mapping
    for group in groups:
        inner = inner.setdefault(group, {})
    inner[last] = value
    return mapping


def test_the_recipe_that_is_spoilt_is_a_good_one():
    assert read(malformed.RECIPE).regularisers


@pytest.mark.parametrize(("key", "value", "said"), of(malformed.RECIPE_KEYS))
def test_recipe_keys(key, value, said):
    ends_in_one_line(lambda: read(with_key(key, value)), said)
    unset_hf_deepspeed_config()  # or a refused configuration is seen until it is collected


def tokenised(path, tokenizer):
    return tokenize_domain(Domain(str(path)).read(), tokenizer, max_length=32, name=path.name)


@pytest.mark.parametrize(("name", "content", "said"), of(malformed.DATA_FILES))
def test_data_files(name, content, said, tmp_path, tokenizer):
    path = written(tmp_path / name, content)
    ends_in_one_line(lambda: tokenised(path, tokenizer), said)
    ends_in_one_line(lambda: tokenised(path, tokenizer), name)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "said"), of(malformed.DATA_PATHS))
def test_paths_of_no_data(name, said):
    ends_in_one_line(lambda: Domain(name).read(), said)


@pytest.mark.parametrize(("name", "content", "said"), of(malformed.SKIPS))
def test_rows_that_are_passed_over_are_counted(name, content, said, tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(tokenised(written(tmp_path / name, content), tokenizer)) >= 1
    (record,) = caplog.records
    assert said in record.message


@pytest.mark.parametrize(("content", "options", "said"), of(malformed.PROMPTS))
def test_prompts(content, options, said, tmp_path, tokenizer):
    source = DataSource(str(written(tmp_path / "prompts.jsonl", content)))
    ends_in_one_line(lambda: read_prompts(source, tokenizer, 64, **options), said)


@pytest.mark.parametrize(("text", "said"), of(malformed.SOURCES))
def test_sources(text, said):
    ends_in_one_line(lambda: DataSource.parse(text), said)


@pytest.mark.parametrize(("where", "reply"), of(malformed.REPLIES))
def test_replies_of_scorers_without_a_score_are_missing(where, reply):
    (outcome,) = JsonMapping(body={"text": "{text}"}, score=where).read(reply, 1)
    found = Scale().checked(outcome)
    assert isinstance(found, str), "a reason, and no label"
    assert Score.missing(found).value is None


@pytest.mark.parametrize("reply", of(malformed.VERDICTS))
def test_replies_of_judges_without_a_verdict_are_missing(reply):
    assert read_verdict(reply).is_missing


@pytest.mark.parametrize(("name", "content", "said"), of(malformed.STATES))
def test_states_of_regularisers(name, content, said, tmp_path):
    folder = tmp_path / "checkpoint-2"
    RegulariserState(rollout_cursor=0).save(folder)
    written(folder / name, content)

    def load():
        with readable(folder):
            RegulariserState.load(folder)

    ends_in_one_line(load, said)
    ends_in_one_line(load, "checkpoint-2")


@pytest.mark.parametrize("state", [None, "", '{"global_step": 2', "[]", b"\xff"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(state, tmp_path):
    written(tmp_path / "checkpoint-2" / "trainer_state.json", "{}")
    written(tmp_path / "checkpoint-10" / "model.safetensors", "half")
    (tmp_path / "checkpoint-best").mkdir()
    if state is not None:
        written(tmp_path / "checkpoint-10" / "trainer_state.json", state)
    assert last_whole(tmp_path, "trainer_state.json").name == "checkpoint-2"


def merged(results, changes):
    for key, value in changes.items():
        known = isinstance(value, dict) and isinstance(results.get(key), dict)
        results[key] = merged(results[key], value) if known else value
    return results


@pytest.mark.parametrize(("name", "content", "said"), of(malformed.REPORTS))
def test_folders_of_reports(name, content, said, tmp_path):
    folder = report_folder.make_folder(tmp_path / "comparison")
    if isinstance(content, dict):
        content = json.dumps(merged(json.loads((folder / name).read_text()), content))
    written(folder / name, content)
    before = files(folder)
    ends_in_one_line(lambda: read_report(folder), said)
    assert files(folder) == before


@pytest.mark.parametrize(("name", "content", "said"), of(malformed.COMPARISONS))
def test_folders_of_comparisons_that_are_resumed(name, content, said, tmp_path):
    recipe = build_recipe(malformed.RECIPE)
    folder = tmp_path / "comparison"
    written(folder / "recipe.yaml", yaml.safe_dump(malformed.RECIPE))
    written(folder / name, content)
    before = files(tmp_path)
    ends_in_one_line(lambda: Comparison(recipe, folder, resume=True).run(), said)
    assert files(tmp_path) == before, "nothing is written, there or anywhere beside it"


@pytest.fixture
def places(tiny_folder, tmp_path):
    """What arguments refer to."""
    rows = written(tmp_path / "rows.jsonl", malformed.lines({"prompt": "a", "completion": "b"}))
    evaluation = {"prompts": {"forum": {"path": str(rows)}}}
    recipe = written(tmp_path / "recipe.yaml", yaml.safe_dump({**malformed.RECIPE, "evaluation": evaluation}))
    return {"recipe": recipe, "rows": rows, "model": tiny_folder()}


@pytest.mark.parametrize(("arguments", "said"), of(malformed.ARGUMENTS))
def test_arguments(arguments, said, bridle, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    code, _, err = bridle(*(argument.format(**places) for argument in arguments))
    (line,) = [line for line in err.splitlines() if line.startswith("bridle: ")]
    assert code == 2
    assert said in line
    assert "Traceback" not in err
    assert files(tmp_path) == before


@pytest.mark.parametrize("arguments", of([(arguments,) for arguments in malformed.REFUSED_OPTIONS]))
def test_options_that_the_command_line_refuses(arguments, bridle):
    code, _, err = bridle(*arguments)
    assert code == 2
    assert err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in err
