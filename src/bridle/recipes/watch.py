"""Shows a run in progress, from the `metrics.jsonl` in its folder, or where a comparison is: `bridle watch`."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import median_low
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from bridle.errors import UserError, plain
from bridle.recipes.metrics import Stamp, evaluation_line, number, regularisers_of, round_line, target_lines
from bridle.utils.files import checked, is_locked, parse, read_json

POLL = 1.0  # seconds between two looks at the file
OF_COMPARISON = ("unfinished.json", "results.json")  # in its folder
AROUND_ROUNDS = 12  # lines of a terminal for all but the table of rounds

Record = dict[str, Any]


@dataclass
class Run:
    """A run's records, read from its folder as they come.

    Attributes:
        folder: of `bridle train`, or one seed of a method of `bridle compare`.
        records: those read so far.
    """

    folder: Path
    records: list[Record] = field(default_factory=list)
    _file: tuple[int, int, float] = (0, 0, 0.0)  # its inode, the bytes that were read, and when it was written to

    @property
    def path(self) -> Path:
        """The file that the run appends to."""
        return self.folder / "metrics.jsonl"

    def read(self) -> list[Record]:
        """Reads what was added, and returns it; of a file that a resumed run has rewritten, what differs.

        Raises:
            UserError: a row is not a record of a run.
        """
        inode, start, _ = self._file
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != inode or found.st_size < start:
                    start = 0
                file.seek(start)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        self._file = found.st_ino, start + len(whole) + bool(whole), found.st_mtime
        before = self.records if start == 0 else []
        kept = [] if start == 0 else self.records
        rows = whole.decode("utf-8", errors="replace").split("\n") if whole else []
        new = [_record(row, f"{self.path} row {number}") for number, row in enumerate(rows, len(kept) + 1)]
        self.records = kept + new
        return new[len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before, new, strict=False)))) :]

    # ------------------------------------------------------------------ where the run is

    @property
    def last(self) -> Record:
        """The last training record; empty before the first."""
        return next((record for record in reversed(self.records) if "loss" in record), {})

    @property
    def step(self) -> int:
        """The policy's last update that is recorded."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def steps(self) -> int:
        """How many updates the run makes; 0 before the first record."""
        return self.records[-1]["max_steps"] if self.records else 0

    @property
    def rounds(self) -> int:
        """How many rounds the run has; 0 before the first record."""
        return self.records[-1]["rounds"] if self.records else 0

    @property
    def seconds(self) -> float:
        """The time since training began, up to the last record."""
        return self.records[-1]["seconds"] if self.records else 0.0

    @property
    def age(self) -> float | None:
        """Seconds since the file was written to; None before it is there."""
        return max(0.0, time.time() - self._file[2]) if self._file[2] else None

    @property
    def has_ended(self) -> bool:
        """Whether the records of the last update have one that ends a run."""
        keys = {key for record in self._of_last_update() for key in record}
        return bool(keys & {"train_runtime", "best_step"}) or any(key.endswith("/violation_reached") for key in keys)

    @property
    def best_step(self) -> int | None:
        """The update whose weights were kept at the end by `eval.best`; None without one."""
        return next((record["best_step"] for record in self._of_last_update() if "best_step" in record), None)

    def _of_last_update(self) -> Iterator[Record]:
        return takewhile(lambda record: record["step"] == self.step, reversed(self.records))

    @property
    def seconds_left(self) -> float | None:
        """An estimate: the updates to come at the low median time of one, and the rounds to come at the mean of one."""
        timed = self._timed()
        if not timed or not self.steps or not self.rounds:
            return None
        step, seconds = timed[-1]
        paces = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(timed) if b[0] > a[0]]
        pace = median_low(paces) if paces else seconds / step
        begun = min(self.rounds, (step - 1) * self.rounds // self.steps + 1)
        between = max(0.0, seconds - pace * step) / begun
        return pace * (self.steps - step) + between * (self.rounds - begun)

    def _timed(self) -> list[tuple[int, float]]:
        """Step and seconds of each training record."""
        return [(record["step"], record["seconds"]) for record in self.records if "loss" in record and record["step"]]


def watch(folder: Path, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Shows a run until it ends: on a terminal as a view that changes, elsewhere as plain lines.

    Of a comparison it shows once how far each of its runs is.

    Args:
        folder: of the run, or of the comparison.
        sleep: waits between two looks at the file.

    Raises:
        UserError: the folder holds no run, or a row of its `metrics.jsonl` is not a record of a run.
    """
    run = Run(Path(folder))
    if not run.path.is_file():
        if cells := runs_of(run.folder):
            for line in cell_lines(cells):
                print(plain(line), flush=True)
            return
        if not is_locked(run.folder):
            raise UserError(f"{folder}: no metrics.jsonl; give the folder of a run of bridle train or compare")
    console = Console(highlight=False, markup=False, emoji=False)
    if not sys.stdout.isatty():
        for new in _until_it_ends(run, sleep):
            for record in new:
                if "loss" not in record or record is run.last:  # of several updates at one look, the last
                    for line in lines_of(record, run):
                        print(plain(line), flush=True)
        print(plain(ending(run)), flush=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        for _ in _until_it_ends(run, sleep):
            live.update(view(run, console.height), refresh=True)
        live.update(Group(view(run, console.height), Text(ending(run))), refresh=True)


def _until_it_ends(run: Run, sleep: Callable[[float], None]) -> Iterator[list[Record]]:
    """Yields the new records, if there are any, at each look; ends with the process that writes them."""
    while True:
        goes_on = is_locked(run.folder)  # before the file is read, so that no last record is missed
        yield run.read()
        if goes_on is False or (goes_on is None and run.has_ended):
            return
        sleep(POLL)


def lines_of(record: Record, run: Run) -> Iterator[str]:
    """A record in plain lines."""
    if "round" in record:
        yield round_line(record, run.rounds)
    elif "loss" in record:
        yield f"step {_of(record['step'], run.steps)}  {_progress(record, run)}"
    elif "eval_loss" in record or "eval_completions" in record:
        yield evaluation_line(record)
    yield from target_lines(record)
    yield from (f"warning: {warning}" for warning in record.get("warnings", ()))


def ending(run: Run) -> str:
    """How the run ended, in a sentence."""
    if run.best_step is not None:  # also where `eval.best.patience` left updates out
        return f"The run is over: {run.step} steps; the model is that of step {run.best_step}."
    if run.step < run.steps:
        return f"The run ended at step {_of(run.step, run.steps)}; {_resuming(run.folder)}"
    return f"The run is over: {run.step} steps." if run.has_ended else f"The run stopped after step {run.step}."


def _resuming(folder: Path) -> str:
    """The command that resumes a run, and where that starts."""
    above = folder.parent.parent
    if any((above / name).is_file() for name in OF_COMPARISON):
        return f"bridle compare RECIPE --output_dir {shlex.quote(str(above))} --resume makes the rest."
    start = "continues from its last checkpoint" if any(folder.glob("checkpoint-*")) else "starts over"
    return f"bridle train RECIPE --output_dir {shlex.quote(str(folder))} --resume {start}."


def cell_lines(cells: Sequence[Path]) -> Iterator[str]:
    """How far each run of a comparison is, a line each, and how to follow those that train."""
    for cell in cells:
        yield f"{cell.parent.name}, {cell.name}: {_state(cell)}"
    for cell in cells:
        if is_locked(cell):
            yield f"Follow it with: bridle watch {shlex.quote(str(cell))}"


def runs_of(folder: Path) -> list[Path]:
    """The folders of a comparison's runs, also of those that have not begun; none if it is not a comparison."""
    for name in OF_COMPARISON:
        if (folder / name).is_file():
            found = read_json(folder / name, _Listed)
            return [folder / method / f"seed-{seed}" for method in found.methods for seed in found.seeds]
    return []


@dataclass
class _Listed:
    methods: dict[str, Any]
    seeds: list[int]


def _state(cell: Path) -> str:
    if not cell.is_dir():
        return "not begun"
    if is_locked(cell):
        return "training"
    if (cell / "results.json").is_file():
        return "measured"
    if (cell / "failed.json").is_file():
        return f"failed: {read_json(cell / 'failed.json', dict[str, Any]).get('reason')}"
    return "made, not measured" if (cell / "candidate.json").is_file() else "begun"


def view(run: Run, height: int = 25) -> RenderableType:
    """The run on one screen of a terminal.

    Args:
        run: what is shown.
        height: lines of the terminal; of the rounds, the last ones that fit are shown.
    """
    parts: list[RenderableType] = [Text(plain(f"{run.folder}"), style="bold", overflow="ellipsis", no_wrap=True)]
    if run.steps:
        now = min(run.rounds, run.step * run.rounds // run.steps + 1)
        parts.append(Text(f"round {_of(now, run.rounds)}  step {_of(run.step, run.steps)}"))
        parts.append(ProgressBar(total=run.steps, completed=run.step))
    parts.append(Text(plain(_progress(run.last, run)) if run.last else "no update is recorded yet"))
    if run.age is not None and not run.has_ended:
        parts.append(Text(f"last record {tqdm.format_interval(run.age)} ago", style="dim"))
    if any("round" in record for record in run.records):
        parts += ["", _rounds(run, max(3, height - AROUND_ROUNDS))]
    evaluated = [record for record in run.records if "eval_loss" in record or "eval_completions" in record]
    parts += [Text(plain(evaluation_line(record))) for record in evaluated[-1:]]
    parts += [Text(plain(line)) for record in run.records[-1:] for line in target_lines(record)]
    warnings = [warning for record in run.records for warning in record.get("warnings", ())]
    counted = "warning" if len(warnings) == 1 else f"{len(warnings)} warnings, the last"
    parts += [Text(plain(f"{counted}: {warning}"), style="yellow") for warning in warnings[-1:]]
    return Group(*parts)


def _rounds(run: Run, most: int) -> Table:
    """A line for each regulariser of a round."""
    rows = [cells for record in run.records if "round" in record for cells in _cells(record)]
    steered = any(cells[4] for cells in rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    headings = ("round", "regulariser", "CE", "complies, %", "violation\n(target), %", "λ", "KL", "R’s skill")
    shown = [place for place in range(len(headings)) if steered or place != 4]
    for place in shown:
        table.add_column(headings[place], justify="left" if place == 1 else "right", no_wrap=True, overflow="ellipsis")
    for cells in rows[-most:]:
        table.add_row(*(Text(plain(cells[place])) for place in shown))
    return table


def _cells(record: Record) -> Iterator[list[str]]:
    """The figures of a round; a figure that was not measured is a dash."""
    for place, name in enumerate(regularisers_of(record) or [""]):
        measured = {key: record.get(f"{name}/{key}") for key in ("compliance", "violation", "lambda", "r_skill")}
        rate = ""
        if measured["compliance"] is not None:
            low, high = (record.get(f"{name}/compliance_{end}") for end in ("low", "high"))
            rate = f"{measured['compliance']:.1%} [{low:.1%}, {high:.1%}]".replace("%", "")
        steered = ""
        if measured["violation"] is not None:
            steered = f"{measured['violation']:.1%} ({record[f'{name}/target']:.1%})".replace("%", "")
        yield [
            "" if place else str(record["round"]),
            name,
            "" if place else number(record.get("ce"), ".3f"),
            rate or "–",
            steered,
            number(measured["lambda"], ".3g"),
            number(record.get(f"kl/{name}"), ".2g"),
            number(measured["r_skill"], ".2f"),
        ]


def _progress(record: Record, run: Run) -> str:
    """CE, each KL, the speed, the time so far and the time left."""
    parts = [f"CE {number(record.get('ce', record.get('loss')), '.3f')}"]
    parts += [
        f"KL {key.removeprefix('kl/')} {number(value, '.2g')}" for key, value in record.items() if key.startswith("kl/")
    ]
    if "tokens_per_second" in record:
        parts.append(f"{number(record['tokens_per_second'], ',.0f')} tokens/s")
    parts.append(f"{tqdm.format_interval(run.seconds)} so far")
    if run.seconds_left is not None and not run.has_ended:
        parts.append(f"{tqdm.format_interval(run.seconds_left)} left")
    return "  ".join(parts)


def _record(row: str, place: str) -> Record:
    """A row as a record, whose figures can be shown."""
    record = checked(dict[str, Any], parse(row, place), place)
    checked(Stamp, record, place)
    try:
        view(Run(Path(), [record]))
        list(lines_of(record, Run(Path(), [record])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: not a record that bridle train writes") from error
    return record


def _of(part: int, whole: int) -> str:
    return f"{part:,}/{whole:,}"
