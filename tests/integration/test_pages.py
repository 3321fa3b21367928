"""Every page of the documentation is a session: its blocks run in their order, as they stand.

Names on the hub that the pages use are folders of tiny models here, which `from_pretrained` prefers. `bridle train`
and `bridle compare` get fewer steps and samples (`SHORT`) where the command does not set them. A block that cannot
run here has a comment in front of it that says why, `<!-- not run: reason -->`, and is checked as far as it can
be: its commands, options and keys must exist. A block with a title is the content of that file. Of a notebook the cells
of code are the blocks.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from string import ascii_lowercase

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from typer.main import get_command

import standins
import tiny_tokenizers
from bridle.cli import app
from bridle.comparison.plan import evaluation_of
from bridle.constraints import build_constraint
from bridle.recipes.recipe import build_recipe, load_recipe, parse_overrides
from bridle.training.config import ConstrainedConfig
from bridle.utils.settings import parse_yaml
from conftest import INSULTS, ROOT, SENTENCES
from tiny_gguf import write_gguf

NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.ipynb"))
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")), *NOTEBOOKS]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n\n?)?```(?P<head>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
KEYS = {"model", "corpus", "constraints", "regularisers", "eval", "evaluation", "methods"}
KEYS |= {field.name for field in fields(ConstrainedConfig)}
CONTEXT = 128  # tokens
MODELS = [
    "huggyllama/llama-7b",
    "HuggingFaceTB/SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "shared/models/mini-en",
]
CLASSIFIERS = {
    "tomh/toxigen_roberta": ["LABEL_0", "LABEL_1"],
    "shared/models/minilm-toxicity": ["non-toxic", "toxic"],
    "shared/models/minilm-toxicity-independent": ["non-toxic", "toxic"],
}
ROWS = [
    "forum.jsonl",
    "prose.jsonl",
    "wiki.jsonl",
    "unseen.jsonl",
    *(f"shared/data/{n}.jsonl" for n in ("toxigen", "wikitext", "novels")),
]
SHORT = {
    "max_steps": "2",
    "rounds": "2",
    "rollouts_per_round": "32",
    "max_new_tokens": "8",
    "prompt_tokens": "[1, 4]",
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "1",
}


@dataclass
class Block:
    """A fenced block of a page."""

    place: str
    language: str
    title: str | None
    reason: str | None
    text: str


def cells_of(page):
    """The code of a notebook; a cell with the tag `parameters`, as papermill has it, is followed by short ones."""
    for number, cell in enumerate(json.loads((ROOT / page).read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            yield Block(f"{page} cell {number}", "python", None, None, "".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", ()):
                yield Block(f"{page} cell {number}", "python", None, None, "UPDATES, ROUNDS, ROLLOUTS = 2, 2, 32")


def blocks_of(page):
    if page in NOTEBOOKS:
        yield from cells_of(page)
        return
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(FENCE.findall("\n" + text)), (
        f"{page}: a fence that is not closed, or indented"
    )
    for match in FENCE.finditer(text):
        language, _, options = match["head"].partition(" ")
        title = re.search(r'title="([^"]+)"', options)
        place = f"{page}:{text.count(chr(10), 0, match.start('text')) + 1}"
        yield Block(place, language, title and title[1], match["reason"], match["text"])


def commands_of(block):
    """The commands of a block, one a line, continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


# ---------------------------------------------------------------------- the folder that pages begin in


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """A folder that holds everything the pages take for granted."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizers.tiny_tokenizer(chat_template=None)
    tokenizer.model_max_length = CONTEXT
    for name in MODELS:
        options = {"max_position_embeddings": CONTEXT, "initializer_range": 0.1}
        tiny_model("llama", vocab_size=len(tokenizer), **options).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_gguf(folder / "base.gguf", tiny_model("llama", vocab_size=len(tokenizer), **options), tokenizer)
    for name, labels in CLASSIFIERS.items():
        standins.save_classifier(folder / name, tokenizer, labels)
    for name in ROWS:
        rows = [{"text": f"{text} {number}", "label": number % 2} for number in range(13) for text in SENTENCES]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts = [{"prompt": text, "prompt_toxicity": n % 2} for n in range(13) for text in SENTENCES]
    rows = "".join(json.dumps(row) + "\n" for row in prompts)
    (folder / "shared/data/realtoxicityprompts.jsonl").write_text(rows, encoding="utf-8")
    (folder / "mild.txt").write_text("\n".join(INSULTS), encoding="utf-8")
    (village,) = (block.text for block in blocks_of("docs/tutorial.md") if block.title == "village.yaml")
    (folder / "village.yaml").write_text(village, encoding="utf-8")  # other pages go on with it
    (folder / "orders.txt").write_text("\n".join(ascii_lowercase), encoding="utf-8")  # what tiny models write
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


@pytest.fixture
def session(world, bridle, tmp_path, monkeypatch):
    folder = tmp_path / "session"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BRIDLE_SHARED", str(folder / "shared"))
    monkeypatch.setenv("BRIDLE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    known, session = set(sys.modules), Session(bridle)
    yield session
    session.close()
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
            del sys.modules[name]  # another page may have a file of the same name


class Session:
    """Runs the blocks of one page."""

    def __init__(self, bridle):
        self.bridle = bridle
        self.names = {"__name__": "__page__"}
        self.servers = []

    def close(self):
        for server in self.servers:
            server.terminate()
            server.wait()

    def do(self, block):
        if block.title is not None:
            with open(block.title, "w", encoding="utf-8") as file:
                file.write(block.text)
        getattr(self, f"do_{block.language}", self.refuse)(block)

    def refuse(self, block):
        raise AssertionError(
            f"{block.place}: a block of {block.language!r}; use python, bash, yaml, toml, json or text"
        )

    def do_text(self, block):
        assert block.reason is None, f"{block.place}: text is never run"

    def do_json(self, block):
        json.loads(block.text)

    def do_toml(self, block):
        tomllib.loads(block.text)

    # ------------------------------------------------------------------ Python

    def do_python(self, block):
        code = compile(block.text, block.place, "exec")
        if block.reason is not None:
            check_imports(block)
        elif block.title is None:
            exec(code, self.names)

    # ------------------------------------------------------------------ recipes

    def do_yaml(self, block):
        """A whole recipe, sections of one, or constraints; or a configuration of accelerate, in a file."""
        given = parse_yaml(block.text, block.place)
        if "compute_environment" in given:
            load_config_from_file(block.title)  # an unknown key raises
            return
        if not given.keys() & KEYS:  # constraints by name
            for name, spec in given.items():
                build_constraint(spec, name)
            return
        mapping = given if {"model", "corpus"} <= set(given) else merged(BASE, given)
        recipe = build_recipe({key: value for key, value in mapping.items() if key not in ("bf16", "fp16")})
        recipe.config("unused")
        if recipe.evaluation:
            evaluation_of(recipe)

    # ------------------------------------------------------------------ commands

    def do_bash(self, block):
        for command in commands_of(block):
            if block.reason is not None:
                check_command(command, block.place)
            else:
                self.run(command, block.place)

    def run(self, command, place):
        words = shlex.split(command, comments=True)
        if words[0] == "bridle":
            words, file = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
            code, out, err = self.bridle(*shortened(words[1:]))
            assert code == 0, f"{place}: {command}\n{err or out}"
            if file is not None:
                Path(file).write_text(out, encoding="utf-8")
        elif words[0] == "make":
            check_command(command, place)
        elif words[-1] == "&":
            self.servers.append(subprocess.Popen(with_this_python(words[:-1])))
        else:
            done = subprocess.run(
                shlex.join(with_this_python([words[0]])) + command.removeprefix(words[0]),
                shell=True,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert done.returncode == 0, f"{place}: {command}\n{done.stderr}"


def with_this_python(words):
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def shortened(words):
    """A command with fewer steps and samples, where the page leaves them open."""
    if words[0] not in ("train", "compare"):
        return words
    short = [word for key, value in SHORT.items() if f"--{key}" not in words for word in (f"--{key}", value)]
    if words[0] == "compare":
        short += ["--evaluation.tasks", "[]", "--evaluation.samples", "1", "--evaluation.judge", "null", "--seeds", "2"]
    return [*words, *short]


# ---------------------------------------------------------------------- what can be said of a block that is not run

BASE = {
    "model": "huggyllama/llama-7b",
    "corpus": {"forum": {"path": "forum.jsonl", "label": {"column": "label"}}, "encyclopaedia": {"path": "wiki.jsonl"}},
    "constraints": {"polite": {"type": "classifier", "model": "tomh/toxigen_roberta", "label": "LABEL_1"}},
    "regularisers": {"forum": {"constraint": "polite"}},
    "max_steps": 100,
}
"""The recipe that sections on a page are read into."""


def merged(base, given):
    """Sections of a recipe put over another; constraints and domains of both are there."""
    groups = ("corpus", "constraints")
    named = {key: {**base[key], **given[key]} for key in groups if key in given}
    return {**base, **given, **named}


def check_imports(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "bridle":
            module = import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{block.place}: {node.module} has no {name.name}"


def check_command(command, place):
    """Whether programs, options and a recipe's keys exist."""
    words = shlex.split(command, comments=True)
    while words and "=" in words[0]:  # environment variables in front
        words = words[1:]
    if "-m" in words and words[words.index("-m") + 1] == "bridle":
        words = words[words.index("-m") + 1 :]
    if words[0] == "bridle":
        check_bridle(words[1:], place)
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{place}: make has no such target: {command}"
    elif words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{place}: there is no {words[1]}"


def check_bridle(words, place):
    command = get_command(app).commands.get(words[0])
    assert command is not None, f"{place}: there is no bridle {words[0]}"
    context = command.make_context(words[0], list(words[1:]))  # an unknown option raises
    if words[0] in ("train", "compare"):
        load_recipe(context.params["recipe"], parse_overrides(context.args))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page, session):
    for block in blocks_of(page):
        session.do(block)


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(page):
    notebook = json.loads((ROOT / page).read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert not [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]]


class TestTheReadersThemselves:
    """What the test above would not notice if it were blind."""

    def test_blocks_are_found_with_their_titles_and_reasons(self):
        blocks = [block for page in PAGES for block in blocks_of(page)]
        assert {block.language for block in blocks} >= {"python", "bash", "yaml"}
        assert any(block.title for block in blocks)
        assert sum(block.reason is not None for block in blocks if block.language == "bash") > 2
        ran = [block for block in blocks if block.language in ("python", "bash") and block.reason is None]
        assert len(ran) > 15

    @pytest.mark.parametrize(
        "command",
        [
            "bridle trian recipes/detox-mini.yaml",
            "bridle evaluate model --promts x",
            "bridle train recipes/detox-mini.yaml --learning_rat 1",
            "accelerate launch -m bridle train recipes/detox-mini.yaml --regularisers.toxigen.wieght 1",
            "make breakfast",
            "python benchmarks/none.py",
        ],
    )
    def test_a_slip_in_a_command_that_is_not_run_is_seen(self, command, session):
        with pytest.raises(Exception, match=r"trian|promts|learning_rat|wieght|breakfast|none"):
            check_command(command, "here")

    def test_a_slip_in_a_recipe_is_seen(self, session):
        with pytest.raises(ValueError, match="did you mean weight"):
            session.do_yaml(
                Block("here", "yaml", None, None, "regularisers:\n  forum: {constraint: polite, wieght: 3}\n")
            )
