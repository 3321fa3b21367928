"""The documentation as a site: it is built without a warning, asks nobody for anything, and cannot go stale."""

import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from trl import SFTConfig

from bridle.baselines.reinforcement import ReinforcementOptions
from bridle.data import Domain, VerbalisedLabel
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig, ParallelOptions, Regulariser
from conftest import ROOT

SECTIONS = (Domain, VerbalisedLabel, Regulariser, AuxiliaryOptions, ParallelOptions, ReinforcementOptions)

pytest.importorskip("material", reason="the extra `docs` is not installed")
pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that `make docs` fills."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_it_has_every_page(site):
    sources = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert {str(path.with_suffix(".html")) for path in sources if path.name != "README.md"} <= {
        str(path.relative_to(site)) for path in site.rglob("*.html")
    }


def test_nothing_is_fetched_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    fetched = re.compile(
        r"""<(?:script|img|iframe)[^>]*\bsrc=["']?(?:https?:)?//|<link[^>]*\bhref=["']?(?:https?:)?//"""
    )
    assert len(pages) > 20
    for page in pages:
        assert not fetched.search(page.read_text(encoding="utf-8")), f"{page.name} asks the network"


def test_every_option_of_a_recipe_is_told(site):
    text = (site / "reference" / "recipe.html").read_text(encoding="utf-8")
    trl = {field.name for field in fields(SFTConfig)}
    for cls in (*SECTIONS, ConstrainedConfig):
        for field in fields(cls):
            if field.name not in trl or cls is not ConstrainedConfig:
                assert f"<td><code>{field.name}</code></td>" in text, f"{cls.__name__}.{field.name}"
    assert "<td><code>{0: ' no', 1: ' yes'}</code></td>" in text  # a default that is made by a factory


def test_commands_and_classes_are_told(site):
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert all(f"Usage: bridle {name}" in commands for name in ("train", "generate", "evaluate", "judge", "compare"))
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert "Fine-tunes a causal language model on a corpus of domains" in python
