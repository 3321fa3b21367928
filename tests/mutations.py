"""Whether the tests notice when the method is wrong: small faults are put into its files, one at a time.

    python tests/mutations.py                       # every fault in every file; hours
    python tests/mutations.py --sample 40           # some of each file's, the same ones each time
    python tests/mutations.py core/loss --json survivors.json

A fault is killed where a test fails, or does not end. Faults that nobody can see, such as another size of a batch, are
listed in `INVISIBLE` with the reason.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ["tests/unit/test_core.py", "tests/unit/test_core_loss.py", "tests/unit/test_core_sparse.py"]
TRAINING = ["tests/unit/test_exactness.py", "tests/integration/test_training.py"]
TARGETS = {
    "core/tokens": [*CORE, "tests/unit/test_models.py"],
    "core/decomposition": CORE,
    "core/target": CORE,
    "core/loss": CORE,
    "core/calibration": CORE,
    "models/guidance": ["tests/unit/test_models.py", "tests/unit/test_exactness.py"],
    "training/fitting": [*TRAINING, "tests/integration/test_guards.py"],
    "training/regulariser": [*TRAINING, "tests/integration/test_guards.py"],
    "training/trainer": [*TRAINING, "tests/integration/test_guards.py"],
}
"""The files that hold the method, and the tests that should notice."""

INVISIBLE = {
    "core/loss": {"chunk_rows": "how many positions a chunk has changes time and memory, not the loss"},
    "training/fitting": {"": "ENCODE_BATCH, PREFIXES_AT_ONCE: how many go through the model at once"},
}
"""By file and function, faults in them that change nothing but speed; "" is the file's own level."""

SWAPS: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "exp": "log", "log": "exp", "zeros": "ones"}
SAYING = {
    "Progress",
    "track",
    "RowLimit",
    "warning",
    "UserError",
    "RunStopped",
    "field",
}  # calls that only say something


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


def run(tests: list[str], fault: Fault | None, seconds: float) -> tuple[str, float]:
    """Runs tests in a process of their own: "killed", "survived" or "timeout", and how long it took."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        if fault is not None:
            sys.meta_path.insert(0, Finder(fault))
        sys.path[:0] = [str(ROOT / "src")]
        import pytest

        options = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
        os._exit(int(pytest.main([*options, *(str(ROOT / test) for test in tests)])))
    while time.monotonic() - began < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return ("killed" if status else "survived"), time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", seconds


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
    parser.add_argument("--json", type=Path, help="write every fault and its fate here, as they come")
    options = parser.parse_args()
    import datasets  # noqa: F401 - what takes long to import is imported once, and forked
    import peft  # noqa: F401
    import torch
    import transformers
    import trl  # noqa: F401

    torch.set_num_threads(1)
    transformers.AutoModelForCausalLM  # noqa: B018 - loads it
    files, fates = options.files or list(TARGETS), list[dict]()
    for file in files:
        fate, seconds = run(TARGETS[file], None, 3600)
        if fate != "survived":
            sys.exit(f"{file}: its tests fail without any fault")
        of_file = []
        for fault in chosen([file], options.sample, options.seed):
            fate, _ = run(TARGETS[file], fault, 5 * seconds + 10)
            of_file.append(asdict(fault) | {"fate": fate})
            if fate == "survived":
                print(f"survived: {file}.py:{fault.line} in {fault.function or 'the file'}: {fault.what}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(fates + of_file, indent=1))
        fates += of_file
        print(f"{file}: {_share(of_file)}", flush=True)
    print(f"all: {_share(fates)}")


def _share(fates: list[dict]) -> str:
    killed = sum(fate["fate"] != "survived" for fate in fates)
    return f"{killed} of {len(fates)} killed ({killed / max(1, len(fates)):.1%})"


if __name__ == "__main__":
    main()
