"""What pages say of the code is so: tests that promises name, files and names of the paper's index, links."""

import ast
import re

import pytest

from bridle.constraints.spec import TYPES
from conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def names_in(path):
    """What a file defines: functions, classes, their methods as Class::method, and constants."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}::{inner.name}" for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            found |= {ast.unparse(target) for target in node.targets}
    return found


def rows_of(page):
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|") and "---" not in line]


def test_every_promise_is_held_by_tests_that_are_there():
    promises = [row for row in rows_of("promises.md") if not row.startswith("| promise |")]
    assert len(promises) > 30
    for row in promises:
        tests = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", row)
        assert tests, f"no test holds: {row}"
        for file, name in tests:
            assert name in names_in(ROOT / file), f"promises.md: {file} has no {name}"


def test_the_index_names_what_is_there():
    checked = 0
    for row in rows_of("paper-index.md"):
        file = None
        for code in re.findall(r"`([^`]+)`", row):
            if re.fullmatch(r"(recipes|benchmarks)/[\w.-]+", code):
                assert (ROOT / code).is_file(), f"paper-index.md: there is no {code}"
            elif re.fullmatch(r"\w+/\w+\.py", code):
                file = ROOT / "src" / "bridle" / code
                assert file.is_file(), f"paper-index.md: there is no {code}"
            elif file is not None and re.fullmatch(r"\w+", code):
                assert code in names_in(file), f"paper-index.md: {file.name} has no {code}"
                checked += 1
    assert checked > 30


def test_the_reference_has_every_room():
    page = (DOCS / "reference" / "modules.md").read_text(encoding="utf-8")
    found = (ROOT / "src" / "bridle").iterdir()
    rooms = {path.stem for path in found if path.suffix == ".py" or (path / "__init__.py").exists()}
    for room in rooms - {"__init__", "__main__", "cli"}:
        assert f"<!-- modules: {room} -->" in page, f"docs/reference/modules.md has no {room}"


def test_the_reference_has_every_type_of_constraint():
    recipe, classes = ((DOCS / "reference" / page).read_text(encoding="utf-8") for page in ("recipe.md", "python.md"))
    for name, cls in TYPES.items():
        place = f"{cls.__module__}.{cls.__qualname__}"
        assert re.search(rf"^\| `{name}` \| .*\(python.md#{re.escape(place)}\) \|$", recipe, re.MULTILINE), name
        assert f"::: {place}\n" in classes, name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(page):
    """MkDocs checks links between its pages, and their anchors; README and CONTRIBUTING are none of them."""
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_pictures_say_where_they_come_from():
    told = (DOCS / "images" / "README.md").read_text(encoding="utf-8")
    pictures = [path.name for path in (DOCS / "images").iterdir() if path.suffix in (".png", ".svg")]
    assert pictures
    assert all(f"`{name}`" in told for name in pictures)
