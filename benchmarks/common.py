"""What the benchmarks share: the command line, how figures are taken, and how they are written.

Every figure is a ratio within one repeat. In a repeat each way runs once, one after the other and the other way round
in every second one, so that a machine that drifts troubles all alike.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from bridle.recipes.recipe import parse_overrides
from bridle.utils.files import write_json
from bridle.utils.provenance import environment

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for `reference_losses`

T = TypeVar("T")
Figures = dict[str, float]

# Dense bf16 operations and bytes a second, from the makers' data sheets (SXM).
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.04e12)}


# ---------------------------------------------------------------------- the command line


def parser_of(description: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def parsed(parser: argparse.ArgumentParser, recipe_keys: bool = False) -> argparse.Namespace:
    """The options given; with `recipe_keys`, those that the parser lacks are keys of a recipe, in `overrides`."""
    options, rest = parser.parse_known_args() if recipe_keys else (parser.parse_args(), [])
    if recipe_keys:
        options.overrides = parse_overrides(rest)
    torch.set_num_threads(options.threads)
    gc.freeze()  # what the libraries made when they were imported is neither searched nor counted
    return options


def write(options: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Writes results, and how they came about, where the command line asks for it."""
    if options.json:
        settings = {key: _told(value) for key, value in vars(options).items() if key != "json"}
        write_json(options.json, {**results, "settings": settings, "environment": environment(0)})


def _told(value: Any) -> Any:
    """A setting as JSON; of a path its name, since folders differ from machine to machine."""
    return value.name if isinstance(value, Path) else value


# ---------------------------------------------------------------------- figures


def interleaved(ways: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What every way gives, `repeats` times, in turn and in turn backwards."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in list(ways)[:: -1 if repeat % 2 else 1]:
            began = time.perf_counter()
            found[name].append(ways[name]())
            print(f"{repeat + 1}/{repeats} {name}: {time.perf_counter() - began:.1f} s in all", flush=True)
    return found


def over(runs: Iterable[Figures], base: Iterable[Figures], key: str) -> list[float]:
    """The ratio within each repeat."""
    return [one[key] / other[key] for one, other in zip(runs, base, strict=True)]


def spread(values: Sequence[float]) -> Figures:
    """The median, the least and the largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def median(runs: Iterable[Mapping[str, float]], key: str) -> float:
    """Over the repeats; 0 for what a way does not have."""
    return statistics.median(run.get(key, 0.0) for run in runs)


def cell(found: Figures) -> str:
    """A spread, for a table."""
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---------------------------------------------------------------------- devices


def is_gpu(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str | torch.device) -> None:
    """Waits for what a GPU still has to do."""
    if is_gpu(device):
        torch.cuda.synchronize()


def peaks(device: str | torch.device) -> tuple[float, float] | None:
    """Operations and bytes a second that a device can reach at most; None where that is not known."""
    name = torch.cuda.get_device_name() if is_gpu(device) else ""
    return next((peak for kind, peak in PEAKS.items() if kind in name), None)


def free_memory() -> None:
    """Lets go of what the last run made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def peak_memory(device: str | torch.device) -> Iterator[list[int]]:
    """After the block the list holds the bytes that all tensors took up at most within it.

    On a GPU as its allocator counts them. On a CPU what is alive when the block begins, and every allocation that
    torch's profiler sees in it: the same in every run, as the process's resident size is not.
    """
    peak: list[int] = []
    gc.collect()
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.append(torch.cuda.max_memory_allocated())
    else:
        held = _held()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield peak
        peak.append(held + _growth(profiler))


def _held() -> int:
    """Bytes of all tensors that are alive in main memory."""
    tensors = (
        found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and type(found) is not FakeTensor
    )
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # views share theirs


def _growth(profiler: profile) -> int:
    """How far what was allocated under a profiler rose above its beginning, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))
