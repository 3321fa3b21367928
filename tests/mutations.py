"""Whether the tests notice when the method is wrong: small faults are put into its files, one at a time.

    python tests/mutations.py                       # every fault in every file; an hour
    python tests/mutations.py --sample 40           # some of each file's, the same ones each time
    python tests/mutations.py core/loss --jobs 2 --json fates.json

A fault is killed where a test fails, or does not end. Only the tests that enter its function are run, the quickest
first. Faults that nobody can see, such as another size of a batch, are listed in `INVISIBLE` with the reason.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = str(ROOT / "src" / "bridle")
CORE = ["unit/test_core", "unit/test_core_loss", "unit/test_core_sparse"]
TARGETS = {
    "core/tokens": [*CORE, "unit/test_models"],
    "core/decomposition": CORE,
    "core/sparse": CORE,
    "core/loss": CORE,
    "core/output_layer": CORE,
    "core/calibration": CORE,
    "models/guidance": ["unit/test_models", "integration/test_training"],
    "training/rollouts": ["unit/test_regulariser"],
    "training/examples": ["unit/test_fitting"],
    "training/fitting": ["unit/test_fitting"],
    "training/measures": ["unit/test_fitting", "unit/test_regulariser"],
    "training/regulariser": ["unit/test_regulariser"],
    "training/regulariser_set": ["unit/test_trainer"],
    "training/setup": ["unit/test_trainer", "unit/test_options", "integration/test_python_api"],
    "training/trainer": ["unit/test_trainer", "unit/test_options", "integration/test_python_api"],
}
"""The files that hold the method, and the tests that should notice."""

INVISIBLE = {
    "core/loss": {"chunk_rows": "how many positions a chunk has changes time and memory, not the loss"},
    "training/examples": {"": "ENCODE_BATCH, LOGITS_AT_ONCE: how many go through the model at once"},
}
"""By file and function, faults in them that change nothing but speed; "" is the file's own level."""

SWAPS: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "exp": "log", "log": "exp", "zeros": "ones"}
SAYING = {"Progress", "track", "RowLimit", "warning", "tell", "UserError", "RunStopped", "field"}  # and do nothing

UNSEEN = {"strict", "non_blocking", "fused"}  # arguments that check, as an `assert` does, or change nothing but speed


@dataclass(frozen=True)
class Fault:
    """One change: the `number`th of a file."""

    file: str
    number: int
    line: int
    function: str
    what: str


class Changer(ast.NodeTransformer):
    """Walks a file and makes the change of one number; with none it only counts and describes them."""

    def __init__(self, file: str, chosen: int | None = None):
        self.file, self.chosen, self.found = file, chosen, list[Fault]()
        self._function: list[str] = []

    def _change(self, node: ast.AST, what: str) -> bool:
        self.found.append(Fault(self.file, len(self.found), node.lineno, ".".join(self._function), what))
        return len(self.found) - 1 == self.chosen

    def _named(self, node):
        self._function.append(node.name)
        node.body = [self.visit(part) for part in node.body]
        self._function.pop()
        return node

    visit_FunctionDef = visit_ClassDef = _named  # noqa: N815

    def visit_Expr(self, node):
        return node if isinstance(node.value, ast.Constant) else self.generic_visit(node)  # docstrings

    def visit_AnnAssign(self, node):
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_Raise(self, node):
        return node  # what an error says

    def visit_Assert(self, node):
        return node

    def visit_keyword(self, node):
        return node if node.arg in UNSEEN else self.generic_visit(node)

    def visit_JoinedStr(self, node):
        return node

    def visit_Call(self, node):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in SAYING:
            return node
        if name in NAMES and self._change(node, f"{name} → {NAMES[name]}"):
            node = copy.deepcopy(node)
            setattr(node.func, "id" if isinstance(node.func, ast.Name) else "attr", NAMES[name])
            return node
        return self.generic_visit(node)

    def visit_BinOp(self, node):
        swapped = SWAPS.get(type(node.op))
        if swapped and self._change(node, f"{type(node.op).__name__} → {swapped.__name__}"):
            return ast.copy_location(ast.BinOp(node.left, swapped(), node.right), node)
        return self.generic_visit(node)

    def visit_AugAssign(self, node):
        swapped = SWAPS.get(type(node.op))
        if swapped and self._change(node, f"{type(node.op).__name__}= → {swapped.__name__}="):
            return ast.copy_location(ast.AugAssign(node.target, swapped(), node.value), node)
        return self.generic_visit(node)

    def visit_Compare(self, node):
        for place, operator in enumerate(node.ops):
            swapped = SWAPS.get(type(operator))
            if swapped and self._change(node, f"{type(operator).__name__} → {swapped.__name__}"):
                node = copy.deepcopy(node)
                node.ops[place] = swapped()
                return node
        return self.generic_visit(node)

    def visit_BoolOp(self, node):
        if self._change(node, f"{type(node.op).__name__} → {SWAPS[type(node.op)].__name__}"):
            return ast.copy_location(ast.BoolOp(SWAPS[type(node.op)](), node.values), node)
        return self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not | ast.USub | ast.Invert) and self._change(node, f"no {type(node.op).__name__}"):
            return node.operand
        return self.generic_visit(node)

    def visit_IfExp(self, node):
        if self._change(node, "the other branch"):
            return ast.copy_location(ast.IfExp(node.test, node.orelse, node.body), node)
        return self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            if self._change(node, f"{node.value} → {not node.value}"):
                return ast.copy_location(ast.Constant(not node.value), node)
        elif isinstance(node.value, int | float) and self._change(node, f"{node.value} → {node.value + 1}"):
            return ast.copy_location(ast.Constant(node.value + 1), node)
        return node


def path(test: str) -> str:
    return f"tests/{test}.py"


def source(file: str) -> Path:
    return ROOT / "src" / "bridle" / f"{file}.py"


def faults(file: str) -> list[Fault]:
    """All faults of a file that could be seen."""
    changer = Changer(file)
    changer.visit(ast.parse(source(file).read_text(encoding="utf-8")))
    return [fault for fault in changer.found if fault.function not in INVISIBLE.get(file, {})]


class Finder(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports a file with one fault in it."""

    def __init__(self, fault: Fault):
        self.fault, self.name = fault, "bridle." + fault.file.replace("/", ".")

    def find_spec(self, name, path, target=None):
        return (
            importlib.util.spec_from_loader(name, self, origin=self.get_filename(name)) if name == self.name else None
        )

    def get_filename(self, name):
        return str(source(self.fault.file))

    def get_data(self, path):
        return Path(path).read_bytes()

    def source_to_code(self, data, path="", *, _optimize=-1):
        tree = Changer(self.fault.file, self.fault.number).visit(ast.parse(data))
        return compile(ast.fix_missing_locations(tree), path, "exec")


class Watch:
    """Notes how long each test takes, and which functions of bridle it enters, its fixtures' included."""

    def __init__(self):
        self.entered = self.at_import = set[str]()
        self.fixtures, self.tests = dict[str, tuple[float, set[str]]](), dict[str, tuple[float, set[str]]]()
        sys.settrace(self._trace)
        threading.settrace(self._trace)

    def _trace(self, frame, event, argument):
        if frame.f_code.co_filename.startswith(SOURCES):
            name = frame.f_code.co_qualname.replace("<locals>.", "").removeprefix("<module>")
            self.entered.add(f"{frame.f_code.co_filename}:{name}")

    @contextmanager
    def _noting(self, found: dict[str, tuple[float, set[str]]], name: str):
        began, outer, self.entered = time.monotonic(), self.entered, set()
        yield
        found[name] = (time.monotonic() - began, self.entered | found.get(name, (0, set()))[1])
        self.entered = outer

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        with self._noting(self.fixtures, fixturedef.argname):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        with self._noting(self.tests, item.nodeid):
            result = yield
        seconds, entered = self.tests[item.nodeid]
        of_fixtures = [self.fixtures[name] for name in item.fixturenames if name in self.fixtures]
        seconds += sum(more for more, _ in of_fixtures)
        self.tests[item.nodeid] = seconds, entered.union(self.at_import, *(names for _, names in of_fixtures))
        return result


class Choose:
    """Runs some tests in a given order."""

    def __init__(self, chosen: list[str]):
        self.chosen = chosen

    def pytest_collection_modifyitems(self, items):
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.chosen]


def tested(tests: Iterable[str], plugin: Watch | Choose) -> int:
    """Runs tests in this process, silently, up to the first that fails: pytest's exit code."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    sys.path[:0] = [str(ROOT / "src")]
    options = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    return int(pytest.main([*options, *(str(ROOT / test) for test in tests)], plugins=[plugin]))


def watched(files: Iterable[str]) -> dict[str, tuple[float, set[str]]]:
    """The seconds of each test of some files, and the functions that it enters, without any fault."""
    watch = Watch()
    return {} if tested(files, watch) else watch.tests


def fate_of(fault: Fault, tests: dict[str, tuple[float, set[str]]], most: float) -> str:
    """Runs the tests that enter a fault's function in a process of their own: "killed", "survived" or "timeout".

    Args:
        fault: to be found.
        tests: from `watched`.
        most: seconds of tests, the quickest first.
    """
    place, files = f"{source(fault.file)}:{fault.function}", set(map(path, TARGETS[fault.file]))
    entering = {name: s for name, (s, entered) in tests.items() if place in entered and name.split("::")[0] in files}
    ordered = sorted(entering, key=entering.__getitem__)
    ends = accumulate(entering[name] for name in ordered)
    ordered = [name for name, end in zip(ordered, ends, strict=True) if end <= most]
    if not ordered:
        return "survived"
    child = os.fork()
    if not child:
        os.setsid()
        sys.meta_path.insert(0, Finder(fault))
        os._exit(tested({name.split("::")[0] for name in ordered}, Choose(ordered)))
    end = time.monotonic() + 5 * sum(map(entering.__getitem__, ordered)) + 30
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "killed" if status else "survived"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def chosen(files: list[str], sample: int | None, seed: int) -> Iterator[Fault]:
    for file in files:
        found = faults(file)
        if sample is not None and sample < len(found):
            found = sorted(random.Random(f"{seed}/{file}").sample(found, sample), key=lambda fault: fault.number)
        yield from found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--sample", type=int, help="faults of each file; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of tests for one fault; all if not given")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at a time")
    parser.add_argument(
        "--json", type=Path, help="write every fault and its fate here, as they come; what it has as killed is not run"
    )
    options = parser.parse_args()
    import datasets  # noqa: F401 - what takes long to import is imported once, and forked
    import peft  # noqa: F401
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    transformers.AutoModelForCausalLM, trl.SFTTrainer  # noqa: B018 - loads them
    fates = dict[Fault, str]()
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text())
        fates = {Fault(**fault): fate for fault in known if (fate := fault.pop("fate")) != "survived"}
    files = options.files or list(TARGETS)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        tests = pool.submit(watched, {path(test) for file in files for test in TARGETS[file]}).result()
    if not tests:
        sys.exit("a test fails without any fault")
    for file in files:
        todo = list(chosen([file], options.sample, options.seed))
        left = [fault for fault in todo if fault not in fates]
        with ThreadPoolExecutor(options.jobs) as threads:
            for fault, fate in zip(
                left, threads.map(partial(fate_of, tests=tests, most=options.seconds), left), strict=True
            ):
                fates[fault] = fate
                if fate == "survived":
                    print(
                        f"survived: {file}.py:{fault.line} in {fault.function or 'the file'}: {fault.what}", flush=True
                    )
                if options.json:
                    found = [asdict(fault) | {"fate": fate} for fault, fate in fates.items()]
                    options.json.write_text(json.dumps(found, indent=1))
        print(f"{file}: {_share([fates[fault] for fault in todo])}", flush=True)
    print(f"all: {_share(list(fates.values()))}")


def _share(fates: list[str]) -> str:
    killed = sum(fate != "survived" for fate in fates)
    return f"{killed} of {len(fates)} killed ({killed / max(1, len(fates)):.1%})"


if __name__ == "__main__":
    main()
