"""Pushing to a hub that is played by a real HTTP server: which files arrive there, and which never do."""

import base64
import json
import os
import re
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridle.errors import UserError
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.hub import check_strategy, model_files, without_token
from bridle.training.config import ConstrainedConfig
from bridle.utils.provenance import redacted
from tiny_tokenizers import tiny_tokenizer
from warm import Warm

TOKEN = "hf_invented_token_of_the_tests"


class Hub(ThreadingHTTPServer):
    """A hub with one user, `me`: repositories, branches and commits in memory."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.forget()

    def forget(self):
        self.repositories: dict[str, dict] = {}  # settings by name
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}  # files by (repository, branch)
        self.commits: list[tuple[str, str, set[str]]] = []  # (branch, message, paths)
        self.objects: dict[str, bytes] = {}  # large files by their sha256
        self.fails = ""  # requests whose path holds this get an error


class Request(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks when it makes a repository and commits to it."""

    server: Hub
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(.+)/branch/(.+)", "branch"),
        ("POST", r"/api/models/(.+)/preupload/(.+)", "preupload"),
        ("POST", r"/(.+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/(.+)", "upload"),
        ("POST", r"/api/models/(.+)/commit/(.+)", "commit"),
        ("GET", r"/api/models/(.+)/revision/(.+)", "info"),
    )

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/objects/" not in self.path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.server.fails and self.server.fails in self.path:
            return self.answer({"error": "out of order"}, 400)
        for method, pattern, handler in self.ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, self.path.partition("?")[0])):
                return getattr(self, handler)(*match.groups())
        return self.answer({"error": f"unknown: {self.command} {self.path}"}, 404)

    do_PUT = do_GET = do_POST  # noqa: N815

    def answer(self, body, status=200):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, asked)
        self.server.branches.setdefault((name, "main"), {})
        self.answer({"url": f"{self.server.url}/{name}"}, 409 if known else 200)

    def validate(self):
        header = json.loads(self.body)["content"].split("\n---\n")[0].removeprefix("---\n")
        ok = isinstance(yaml.safe_load(header), dict)
        self.answer({"warnings": [], "errors": []}, 200 if ok else 400)

    def branch(self, repository, name):
        known = (repository, name) in self.server.branches
        self.server.branches.setdefault((repository, name), {})
        self.answer({}, 409 if known else 200)

    def preupload(self, repository, branch):
        if (repository, branch) not in self.server.branches:
            return self.answer({"error": "Revision Not Found"}, 404)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        return self.answer({"files": modes})

    def batch(self, repository):
        objects = []
        for one in json.loads(self.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.url}/objects/{one['oid']}"}}}
            objects.append({**one, **({} if one["oid"] in self.server.objects else upload)})
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        assert sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.answer({})

    def commit(self, repository, branch):
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            files[value["path"]] = self.server.objects[value["oid"]] if large else base64.b64decode(value["content"])
        self.server.branches[repository, branch] |= files
        self.server.commits.append((branch, lines[0]["value"]["summary"], set(files)))
        self.answer({"commitUrl": f"{self.server.url}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def info(self, repository, branch):
        self.answer({"id": repository, "sha": "0" * 40})

    def log_message(self, *args):
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def server():
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def warm(server, tmp_path_factory):
    """Processes that know this hub alone: its address is read at import."""
    surroundings = {
        **{key: value for key, value in os.environ.items() if key != "HF_TOKEN"},
        **{"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        **{"HF_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"},
    }
    warm = Warm(surroundings)
    yield warm
    warm.close()


@pytest.fixture
def hub(server):
    """A hub that holds nothing yet."""
    server.forget()
    return server


@pytest.fixture
def execute(hub, warm, tmp_path):
    """Runs Python in a process of its own."""
    return partial(warm.run, folder=tmp_path)


@pytest.fixture
def train(execute, tiny_folder, corpus_files, tmp_path):
    """Runs `bridle train` on a tiny model, and pushes what comes of it."""
    recipe = {
        "model": str(tiny_folder()),
        "corpus": {name: {"path": str(path)} for name, path in corpus_files.items()},
        "constraints": {"no e": {"all": [{"type": "regex", "pattern": "e"}, {"type": "words", "words": ["zzz"]}]}},
        "regularisers": {"rude": {"constraint": "no e"}},
        **{"rounds": 1, "rollouts_per_round": 32, "max_new_tokens": 8, "prompt_tokens": [1, 3], "max_steps": 4},
        **{"per_device_train_batch_size": 4, "max_length": 24, "gradient_checkpointing": False, "save_steps": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def run(*options, token=TOKEN):
        pushed = ["--output_dir", tmp_path / "run", "--push_to_hub", "true", "--hub_token", token]
        return execute("-m", "bridle", "train", tmp_path / "recipe.yaml", *pushed, *options)

    return run


MODEL = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
AUXILIARY = {
    f"auxiliary/{folder}{name}" for folder in ("", "round-1/") for name in ("config.json", "model.safetensors")
}


def test_the_model_its_card_and_its_auxiliary_arrive_and_nothing_else(train, hub, tmp_path):
    done = train("--hub_model_id", "me/tiny", "--hub_private_repo", "true")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["me/tiny"]["visibility"] == "private"
    files = hub.branches["me/tiny", "main"]
    assert files.keys() == MODEL | AUXILIARY | {"tokenizer_config.json"}
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert not [name for name, content in files.items() if TOKEN.encode() in content]
    assert hub.commits[-1][1] == "End of training"
    assert {message for _, message, _ in hub.commits[:-1]} <= {f"Training in progress, checkpoint-{n}" for n in (2, 4)}

    pulled = tmp_path / "pulled"
    for name, content in files.items():
        (pulled / name).parent.mkdir(parents=True, exist_ok=True)
        (pulled / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(pulled).config.vocab_size == len(AutoTokenizer.from_pretrained(pulled))
    assert "words: 1 listed" in AuxiliaryModel.from_pretrained(pulled / "auxiliary").config.provenance["constraint"]
    card = ModelCard.load(pulled / "README.md")
    assert card.data.library_name == "transformers"
    assert card.text.startswith("\n# tiny\n")
    assert "| 1 | rude | 0." in card.text, "the compliance of the rollouts"

    run = tmp_path / "run"
    assert not (run / "README.md").exists(), "no library's draft stands beside the card"
    assert (run / "model" / "README.md").read_bytes() == files["README.md"]
    holders = [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not holders, "the token is in no file, pickled arguments and the command included"
    assert "--hub_token" in json.loads((run / "environment.json").read_text())["command"]

    commits = len(hub.commits)
    again = train("--hub_model_id", "me/tiny", "--hub_revision", "second", "--resume")
    assert again.returncode == 0, again.stderr
    assert len(hub.commits) == commits + 1
    assert hub.commits[-1][0] == "second"
    second = hub.branches["me/tiny", "second"]
    assert second.keys() == files.keys(), "no further round was begun"
    assert second["model.safetensors"] == files["model.safetensors"], "nor a further step"
    assert b"| 1 | rude | 0." in second["README.md"]


def test_an_adapter_is_pushed_once_without_the_folder_of_its_base(train, hub, tmp_path):
    done = train("--lora", "{r: 2}", "--hub_strategy", "end")
    assert done.returncode == 0, done.stderr
    ((branch, message, paths),) = hub.commits
    assert (branch, message) == ("main", "End of training")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= paths
    files = hub.branches["me/run", "main"]  # named after the output folder
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny-llama"
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert b"library_name: peft" in files["README.md"]


def test_a_second_chat_template_is_pushed_too(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    found = model_files(tmp_path)
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} <= found.keys()
    assert all(os.path.isfile(path) for path in found.values())


FROM_PYTHON = """
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bridle.constraints import build_constraint
from bridle.errors import UserError
from bridle.training.config import ConstrainedConfig, Regulariser
from bridle.training.trainer import ConstrainedTrainer

model, folder, token = sys.argv[1:]
args = ConstrainedConfig(
    output_dir=folder, hub_model_id="me/own", hub_token=token, rounds=1, rollouts_per_round=32, max_new_tokens=8,
    prompt_tokens=(1, 3), max_steps=2, per_device_train_batch_size=4, max_length=24, gradient_checkpointing=False,
    seed=0, report_to="none", push_to_hub=True,
)
trainer = ConstrainedTrainer(
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules="all-linear")),
    args,
    {"plain": Dataset.from_dict({"text": ["the rain went on over the roofs", "bread is baked before dawn"] * 8})},
    {"plain": Regulariser(build_constraint("regex:e", "no e"))},
)
trainer.train()
trainer.push_to_hub()
assert not [*Path(folder).glob("checkpoint-*/README.md")], "peft drafts no card"
card = Path(folder, "model", "README.md")
card.write_text(card.read_text(encoding="utf-8") + "A word of the author's.", encoding="utf-8")
trainer.push_to_hub(revision="second")
trainer.push_to_hub(revision="third", license="mit", tags="mine", dataset_name=["me/rows"])
for describe, said in (
    (lambda: trainer.push_to_hub(licence="mit"), "unexpected keyword argument 'licence'"),
    (lambda: trainer.create_model_card("own", tags=["mine"]), "create_model_card: tags: the card is written when"),
):
    try:
        describe()
    except (TypeError, UserError) as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
"""


def test_a_trainer_of_ones_own_pushes_a_card_of_what_it_knows(execute, hub, tiny_folder, tmp_path):
    hub.branches["me/own", "second"], hub.branches["me/own", "third"] = {}, {}
    done = execute("-c", FROM_PYTHON, tiny_folder(), tmp_path / "run", TOKEN)
    assert done.returncode == 0, done.stderr
    files = hub.branches["me/own", "main"]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert "This is tiny-llama after constrained fine-tuning on plain." in card.text
    assert "| no e | type: regex; pattern: e" in card.text
    assert "| plain | no e | 30.0 | live | rollouts |" in card.text
    assert "| seed | 0 |" in card.text
    assert "| 1 | plain | 0." in card.text, "the compliance of the rollouts"
    assert "Where its rows came from was not recorded." in card.text
    second = hub.branches["me/own", "second"]["README.md"]
    assert second == files["README.md"] + b"A word of the author's.", "a card that stands there stays"
    third = ModelCard(hub.branches["me/own", "third"]["README.md"].decode())
    assert (third.data.license, third.data.datasets) == ("mit", ["me/rows"])
    assert third.data.tags == [*card.data.tags, "mine"]
    assert third.text == ModelCard(second.decode()).text


def test_a_refused_token_shows_before_training(train, hub, tmp_path):
    done = train("--hub_model_id", "me/tiny", token="hf_wrong")
    assert done.returncode == 2, done.stderr
    assert "bridle: push_to_hub: me/tiny: " in done.stderr.splitlines()[-1]
    assert "401" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_push_that_fails_keeps_the_model(train, hub, tmp_path):
    hub.fails = "/commit/"
    done = train("--hub_model_id", "me/tiny")
    assert done.returncode == 3, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "was not pushed to me/tiny" in last
    assert "--resume pushes it again" in last
    assert (tmp_path / "run" / "model" / "README.md").is_file()
    hub.fails = ""
    assert train("--hub_model_id", "me/tiny", "--resume").returncode == 0
    assert hub.branches["me/tiny", "main"].keys() >= MODEL


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_push_optimiser_states_are_refused(tmp_path, strategy):
    config = ConstrainedConfig(output_dir=str(tmp_path), push_to_hub=True, hub_strategy=strategy)
    with pytest.raises(UserError, match=f"hub_strategy: {strategy} would push optimiser states and rollouts"):
        check_strategy(config)


def test_the_token_is_taken_out_of_recipes_and_commands():
    assert without_token({"model": "m", "hub_token": TOKEN}) == {"model": "m"}
    command = ["bridle", "train", "--hub_token", TOKEN, f"--hub-token={TOKEN}", "--seed", "1"]
    assert redacted(command) == ["bridle", "train", "--hub_token", "***", "--hub-token=***", "--seed", "1"]
