"""Layers: a file imports only from layers below its own, and packages of one layer never import each other."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import bridle

SOURCE = Path(bridle.__file__).parent
ROWS = [
    {"errors", "utils"},
    {"core", "constraints"},
    {"models", "data"},
    {"training", "evaluation", "baselines"},
    {"recipes", "report", "certification"},
    {"comparison"},
    {"quickstart", "demo"},
    {"cli"},
    {"__main__"},
]


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(("bridle", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Modules that a file imports from this package, also inside functions and for type checking alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported_rooms(path: Path) -> set[str]:
    """Rooms a file imports from, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            names.append(f"{node.module}.{node.names[0].name}" if node.module == "bridle" else node.module)
    return {name.split(".")[1] for name in names if name.startswith("bridle.")}


def test_imports_point_downwards():
    row_of = {room: index for index, row in enumerate(ROWS) for room in row}
    files = [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem != "__init__"]
    assert len(files) > 20
    for path in files:
        room = room_of(path)
        assert room in row_of, f"{room} stands in no row"
        for imported in imported_rooms(path) - {room}:
            assert row_of[imported] < row_of[room] or imported == "errors", (
                f"{path.relative_to(SOURCE)} imports {imported}"
            )


def test_no_files_import_each_other_in_a_circle():
    files = {module_of(path): path for path in SOURCE.rglob("*.py") if path.stem != "__init__"}
    graph = {name: imported_modules(path) & files.keys() for name, path in files.items()}
    assert sum(map(len, graph.values())) > 300
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_method_is_read_in_one_sitting():
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    path = [SOURCE / file for file in re.findall(r"^\| \d \| `([\w/]+\.py)`", page, re.MULTILINE)]
    assert len(path) == 8
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in path) <= 1_500


def test_no_function_is_longer_than_sixty_lines():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path.relative_to(SOURCE)}:{node.lineno} {node.name} has {length} lines"
