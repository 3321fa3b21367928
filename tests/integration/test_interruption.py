"""SIGINT and SIGTERM end a run with what it has done kept, and say how it goes on."""

import json
import os
import shlex
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import bridle.training.engine as engine
import bridle.training.regulariser as regulariser
from bridle.comparison.compare import Comparison
from bridle.recipes.recipe import load_recipe
from bridle.recipes.run import train
from bridle.utils.files import only_writer
from bridle.utils.interruption import Interrupted, catching_signals
from warm import Warm


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture
def signalled(monkeypatch):
    """Lets signals come as a function is called for the given time."""

    def at(owner, name, call, signals=1):
        real, calls = getattr(owner, name), []

        def signalling(*args, **kwargs):
            calls.append(True)
            if len(calls) == call:
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, signalling)

    with catching_signals():
        yield at


def interrupted(recipe, folder):
    with pytest.raises(Interrupted, match="interrupted by SIGTERM") as caught:
        train(load_recipe(recipe), folder)
    assert caught.value.signal == signal.SIGTERM
    return caught.value.kept


def test_the_update_is_finished_and_the_run_goes_on_to_the_same_weights(recipe, tmp_path, signalled, monkeypatch):
    path, folder = recipe(max_steps=8, save_strategy="no"), tmp_path / "run"
    with monkeypatch.context():
        train(load_recipe(path), tmp_path / "whole")
    signalled(regulariser.DomainRegulariser, "target", 2)
    assert interrupted(path, folder) == f"{folder / 'checkpoint-2'} is kept"
    train(load_recipe(path), folder, resume=True)
    whole, resumed = weights(tmp_path / "whole"), weights(folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_in_a_round_it_stops_at_once_and_the_last_checkpoint_is_named(recipe, tmp_path, signalled):
    signalled(engine, "sample", 2)
    folder = tmp_path / "run"
    assert interrupted(recipe(), folder) == f"{folder / 'checkpoint-2'} is kept"


def test_before_the_first_checkpoint_nothing_is_promised(recipe, tmp_path, signalled):
    signalled(regulariser, "fit_auxiliary", 1)
    assert interrupted(recipe(), tmp_path / "run") == f"{tmp_path / 'run'} holds no checkpoint yet"


def test_a_second_signal_stops_at_once(recipe, tmp_path, signalled):
    signalled(regulariser.DomainRegulariser, "target", 3, signals=2)
    folder = tmp_path / "run"
    assert interrupted(recipe(max_steps=8, save_strategy="no"), folder) == f"{folder} holds no checkpoint yet"


def test_a_comparison_is_no_failed_method_and_goes_on(recipe, corpus_files, tmp_path, signalled):
    prompts = {"rude": {"path": str(corpus_files["rude"]), "rows": "0:2", "prompt_tokens": 2}}
    path = recipe(max_steps=4, evaluation={"prompts": prompts})
    compare = {"recipe": load_recipe(path), "folder": tmp_path / "run", "names": ["base", "constrained-adaptive"]}
    signalled(regulariser.DomainRegulariser, "target", 1)
    with pytest.raises(Interrupted) as caught:
        Comparison(**compare).run()
    assert caught.value.kept.endswith("checkpoint-1 is kept")
    Comparison(**compare, resume=True).run()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [method["seeds"]["0"]["status"] for method in results["methods"].values()] == ["complete", "complete"]
    assert results["settings"]["reads"] == {"no e": "completion"}


@pytest.fixture(scope="module")
def warm():
    warm = Warm()
    yield warm
    warm.close()


def wait_for(path, text):
    """Until a file holds a text."""
    deadline = time.monotonic() + 120
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} holds no {text}"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_says_what_is_kept_and_how_to_go_on(warm, recipe, tmp_path, number, code):
    folder = tmp_path / "run"
    command = ["train", str(recipe(max_steps=5000, rounds=1)), "--output_dir", str(folder), "--hub_token", "secret"]
    process = warm.start("-m", "bridle", *command, folder=tmp_path)
    wait_for(folder / "metrics.jsonl", '"kl/rude"')
    os.kill(process.pid, number)
    done = process.wait()
    assert done.returncode == code
    (checkpoint,) = folder.glob("checkpoint-*")
    assert done.stderr.splitlines()[-1] == (
        f"bridle: interrupted by {number.name}; {checkpoint} is kept; "
        f"resume with: {shlex.join(['bridle', *command[:-1], '***', '--resume'])}"
    )


def test_who_watches_a_run_leaves_it_with_ctrl_c(warm, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "round": 1, "seconds": 1.0, "max_steps": 4, "rounds": 2}\n')
    with only_writer(tmp_path):
        process = warm.start("-m", "bridle", "watch", tmp_path, folder=tmp_path)
        wait_for(process.out, "round 1/2")
        os.kill(process.pid, signal.SIGINT)
        done = process.wait()
    assert (done.returncode, done.stderr) == (0, "")
