"""Shows a run in progress, from the `metrics.jsonl` in its folder, or where a comparison is: `bridle watch`."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from bridle.errors import UserError, plain
from bridle.recipes.metrics import evaluation_line, number, regularisers_of, round_line, target_lines
from bridle.recipes.records import Record, Run
from bridle.utils.files import is_locked, read_json

POLL = 1.0  # seconds between two looks at the file
OF_COMPARISON = ("unfinished.json", "results.json")  # in its folder
AROUND_ROUNDS = 12  # lines of a terminal for all but the table of rounds


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
        new = run.read()
        for row, record in enumerate(new, len(run.records) - len(new) + 1):
            _check(record, f"{run.path} row {row}")
        yield new
        if goes_on is False or (goes_on is None and run.has_ended):
            return
        sleep(POLL)


def _check(record: Record, place: str) -> None:
    """Refuses a record with figures that cannot be shown."""
    alone = Run(Path(), [record])
    try:
        view(alone)
        list(lines_of(record, alone))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: not a record that bridle train writes") from error


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


def _of(part: int, whole: int) -> str:
    return f"{part:,}/{whole:,}"
