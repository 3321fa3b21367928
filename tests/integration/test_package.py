"""The wheel and the source archive that others install."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = {"lm-eval", "matplotlib", "scikit-learn", "ray", "gguf"}


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the source archive, built without a network from a copy of what git holds."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code = "from setuptools import build_meta as build; build.build_sdist('dist'); build.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        yield wheel


@pytest.fixture(scope="module")
def metadata(wheel):
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(path).decode())


def test_both_hold_every_file_of_the_package(built, wheel):
    package = ROOT / "src" / "bridle"
    files = {file.relative_to(ROOT / "src").as_posix() for file in package.rglob("*") if file.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    assert files <= set(wheel.namelist())
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{file}" for file in files} | {"pyproject.toml", "README.md", "LICENSE"} <= held


def test_the_metadata_is_that_of_the_project(metadata):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (metadata["Name"], metadata["Version"]) == (project["name"], project["version"])
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    core = {name_of(one) for one in metadata.get_all("Requires-Dist") if "extra ==" not in one}
    assert core == {name_of(one) for one in project["dependencies"]}
    assert not core & OPTIONAL


def test_all_is_every_extra_but_those_of_developers(metadata):
    (every,) = (one for one in metadata.get_all("Requires-Dist") if one.endswith('extra == "all"'))
    named = set(re.search(r"\[(.*)\]", every)[1].split(","))
    assert named == {*metadata.get_all("Provides-Extra")} - {"all", "dev", "docs", "vllm"}  # vLLM needs a GPU
