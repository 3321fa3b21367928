"""What docstrings owe their readers: shapes of tensors, errors, sources, and no argument that is not there.

That public names have docstrings at all is ruff's rule D1, part of `make lint`; a method whose name says it needs none.
"""

import ast
import re
import runpy

import pytest

from conftest import ROOT

SOURCE = ROOT / "src" / "bridle"
SHAPE = re.compile(r"\[[^\]]*\]|\bscalars?\b|[Ss]hapes? as in `")
CITATION = re.compile(r"\d{4}\)|EMNLP 2024|NeurIPS 2022|concepts/method")
ERRORS = ("UserError", "RunStopped")
OF_EQUATIONS = [
    "core",
    "baselines/reinforcement.py",
    "training/trainer.py",
    "training/schedule.py",
    "training/parallel.py",
]


def public_functions():
    """(place, function, class or None) of every public function and method, constructors included."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        scopes = [(None, tree), *((node, node) for node in tree.body if isinstance(node, ast.ClassDef))]
        for cls, scope in scopes:
            for node in scope.body:
                if isinstance(node, ast.FunctionDef) and is_public(node, cls) and not is_obvious(node, cls):
                    yield f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}", node, cls


def is_public(function, cls):
    constructor = function.name in ("__init__", "__post_init__")
    return (cls is None or not cls.name.startswith("_")) and (constructor or not function.name.startswith("_"))


def is_obvious(function, cls):
    """A callback or another method that needs no words: it overrides one that has them."""
    return cls is not None and not function.name.startswith("__") and ast.get_docstring(function) is None


def docstring_of(function, cls):
    """The class documents its constructor."""
    return ast.get_docstring(cls if function.name.startswith("__") else function) or ""


def arguments_of(function):
    """Annotations by name."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    starred = [argument for argument in (function.args.vararg, function.args.kwarg) if argument is not None]
    return {one.arg: ast.unparse(one.annotation) if one.annotation else "" for one in [*arguments, *starred]}


def is_tensor(annotation):
    return bool(re.search(r"\bTensor\b", annotation)) and not re.search(r"dict|Mapping|Callable", annotation)


FUNCTIONS = list(public_functions())


@pytest.fixture(scope="module")
def entries():
    """entries(docstring, section): what is said of each name; the documentation reads it in the same way."""
    pytest.importorskip("griffe", reason="the extra `docs` is not installed")
    return runpy.run_path(str(ROOT / "docs" / "hooks.py"))["entries"]


def test_methods_have_docstrings_but_for_callbacks_and_what_another_describes():
    """The rule that ruff's D102 has no words for."""
    described, bare = set(), []
    for path in sorted(SOURCE.rglob("*.py")):
        for cls in ast.parse(path.read_text(encoding="utf-8")).body:
            for node in cls.body if isinstance(cls, ast.ClassDef) and not cls.name.startswith("_") else []:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    if ast.get_docstring(node):
                        described.add(node.name)
                    elif not node.name.startswith("on_"):
                        bare.append((f"{path.relative_to(SOURCE)}:{node.lineno} {cls.name}", node.name))
    assert [f"{place}.{name}" for place, name in bare if name not in described] == []


def test_there_is_something_to_check():
    assert len(FUNCTIONS) > 300


def test_tensors_have_shapes(entries):
    shapeless = []
    for place, function, cls in FUNCTIONS:
        docstring = docstring_of(function, cls)
        told = entries(docstring, "Args")
        for name, annotation in arguments_of(function).items():
            if is_tensor(annotation) and not SHAPE.search(told.get(name, docstring)):
                shapeless.append(f"{place}: {name}")
        if function.returns and is_tensor(ast.unparse(function.returns)) and not SHAPE.search(docstring):
            shapeless.append(f"{place}: what is returned")
    assert not shapeless, "\n".join(["no shape in square brackets for:", *shapeless])


def test_attributes_that_are_tensors_have_shapes(entries):
    shapeless = []
    for path in sorted(SOURCE.rglob("*.py")):
        for cls in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(cls, ast.ClassDef) and not cls.name.startswith("_"):
                told = entries(ast.get_docstring(cls) or "", "Attributes")
                for node in cls.body:
                    tensor = isinstance(node, ast.AnnAssign) and is_tensor(ast.unparse(node.annotation))
                    docstring = ast.get_docstring(cls) or ""
                    if tensor and not SHAPE.search(told.get(node.target.id, docstring)):
                        shapeless.append(f"{path.relative_to(SOURCE)}:{node.lineno} {cls.name}.{node.target.id}")
    assert not shapeless, "\n".join(["no shape in square brackets for:", *shapeless])


def test_errors_that_are_raised_are_told():
    untold = []
    for place, function, cls in FUNCTIONS:
        if place.startswith("cli/"):
            continue  # what `--help` prints; `main` tells of all errors
        raised = {
            name
            for node in ast.walk(function)
            if isinstance(node, ast.Raise) and node.exc is not None
            for name in ERRORS
            if ast.unparse(node.exc).startswith(name)
        }
        docstring = docstring_of(function, cls)
        referred = re.search(r"Raises as `", docstring)
        untold += [f"{place}: {name}" for name in sorted(raised) if name not in docstring and not referred]
    assert not untold, "\n".join(["not told in the docstring:", *untold])


def test_arguments_that_are_told_are_there(entries):
    strangers = []
    for place, function, cls in FUNCTIONS:
        if function.name != "__post_init__":
            there = arguments_of(function)
            told = entries(docstring_of(function, cls), "Args")
            strangers += [f"{place}: {name}" for name in told if name.strip("*") not in there]
    assert not strangers, "\n".join(["told but not there:", *strangers])


def test_what_implements_an_equation_names_its_source():
    files = [path for name in OF_EQUATIONS for path in ([SOURCE / name] if "." in name else (SOURCE / name).glob("*"))]
    files = [path for path in files if path.suffix == ".py" and path.stem not in ("__init__", "tokens")]
    assert len(files) > 6
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = [ast.get_docstring(tree) or ""]
        docstrings += [ast.get_docstring(node) or "" for node in tree.body if hasattr(node, "decorator_list")]
        assert any(map(CITATION.search, docstrings)), f"{path.relative_to(SOURCE)} cites no paper"
