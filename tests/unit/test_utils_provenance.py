import json
import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest
import torch

from bridle.utils.files import write_json
from bridle.utils.provenance import PACKAGES, environment


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    for command in (
        ["init", "--quiet"],
        ["add", "recipe.yaml"],
        ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "first"],
    ):
        subprocess.run(["git", *command], check=True)
    return tmp_path


def test_environment_names_what_the_result_was_made_with(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bridle", "evaluate", "model", "--samples", "4"])
    found = environment(seed=7)
    assert set(found["versions"]) == {"python", *PACKAGES}
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["seed"] == 7
    assert found["command"] == ["bridle", "evaluate", "model", "--samples", "4"]
    assert found["threads"] == torch.get_num_threads()
    age = datetime.now(UTC) - datetime.fromisoformat(found["time"])
    assert 0 <= age.total_seconds() < 60


def test_environment_is_json(tmp_path):
    write_json(tmp_path / "environment.json", environment(seed=0))
    assert json.loads((tmp_path / "environment.json").read_text())["seed"] == 0


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr("bridle.utils.provenance.PACKAGES", ("torch", "no-such-package-here"))
    versions = environment(seed=0)["versions"]
    assert versions["no-such-package-here"] is None
    assert versions["torch"] is not None


def test_git_state_follows_the_repository(repository):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert environment(seed=0)["git"] == {"commit": commit, "dirty": False}
    (repository / "untracked.json").write_text("{}")
    assert environment(seed=0)["git"]["dirty"] is False
    (repository / "recipe.yaml").write_text("seed: 2\n")
    assert environment(seed=0)["git"] == {"commit": commit, "dirty": True}


def test_no_git_state_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert environment(seed=0)["git"] is None


def test_no_git_state_without_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    assert environment(seed=0)["git"] is None
