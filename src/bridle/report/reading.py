"""Reads and checks the folder of a comparison or of one training run."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from bridle.errors import UserError
from bridle.report.data import (
    MOST_ROUNDS,
    Completion,
    Critics,
    Curve,
    Guidance,
    Method,
    Reached,
    Report,
    Rollout,
    Round,
    evenly_spaced,
)
from bridle.utils.files import checked, read_json, read_rows, read_text
from bridle.utils.progress import track

FORMAT = 1  # of a comparison's results.json
SHOWN_ROLLOUTS = 3  # per round and regulariser


def read_report(folder: Path) -> Report:
    """Reads the output folder of `bridle compare` or `bridle train`; absent parts stay empty.

    Raises:
        UserError: the folder is neither, or a file in it is broken, naming file, row and key.
    """
    if os.path.isfile(folder / "metrics.jsonl"):  # a model's own results.json may be beside it
        report = _read_training_run(folder)
    elif (results := results_of(folder)) is not None:
        report = _read_comparison(folder, results)
    else:
        raise UserError(f"{folder}: neither results.json nor metrics.jsonl; give the folder of a comparison or a run")
    recipe = folder / "recipe.yaml"
    return replace(report, recipe_text=read_text(recipe) if recipe.is_file() else "")


def results_of(folder: Path) -> Path | None:
    """The results of a comparison, or where it has not ended once those so far; None if the folder has neither."""
    paths = (folder / name for name in ("results.json", "unfinished.json"))
    return next(filter(os.path.isfile, paths), None)  # Path's own raises where a name is too long


def _read_comparison(folder: Path, path: Path) -> Report:
    found = read_json(path, dict[str, Any])
    if found.get("format") != FORMAT or "methods" not in found:
        raise UserError(f"{path}: not the results of a comparison in format {FORMAT}; write it with bridle compare")
    report = checked(Report, found, str(path))
    runs = list(_runs(report, folder))
    measured = [run for run in runs if report.methods[run[0]].seeds[run[1]].status == "complete"]
    report = replace(
        report,
        curves=[curve for run in runs if (curve := _curve(*run)).rounds],
        completions=[
            row for run in track(measured, "reading completions", unit="models") for row in _completions(*run)
        ],
        guidance=read_json(path, Guidance) if (path := folder / "guidance.json").is_file() else None,
    )
    return _main_first(report)


def _main_first(report: Report) -> Report:
    """The figures and tests of the main constraint in front of the others."""
    main = report.main.constraint if report.main else None

    def ordered(method: Method) -> Method:
        violation = {
            prompt_set: dict(sorted(by_constraint.items(), key=lambda item: item[0] != main))
            for prompt_set, by_constraint in method.figures.violation.items()
        }
        return replace(method, figures=replace(method.figures, violation=violation))

    return replace(
        report,
        methods={name: ordered(method) for name, method in report.methods.items()},
        comparisons=sorted(report.comparisons, key=lambda one: (one.figure != "violation", one.constraint != main)),
    )


def _read_training_run(folder: Path) -> Report:
    path = folder / "environment.json"
    environment = read_json(path, dict[str, Any]) if path.is_file() else {}
    seed = environment.get("seed", 0)
    name = folder.resolve().name
    return Report(
        recipe=name,
        seeds=[seed],
        environment=environment,
        curves=[_curve(name, str(seed), folder)],
        rollouts=list(_rollouts(folder / "rollouts")),
        critics=read_json(path, Critics) if (path := folder / "critic.json").is_file() else None,
    )


def _rollouts(folder: Path) -> Iterator[Rollout]:
    """Reads some rollouts of some rounds from `round-N.REGULARISER.jsonl`."""
    files: dict[int, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("round-*.*.jsonl")):
        number = path.name.removeprefix("round-").partition(".")[0]
        if number.isdecimal():
            files[int(number)].append(path)
    for index in evenly_spaced(sorted(files), MOST_ROUNDS):
        for path in files[index]:
            yield from (checked(Rollout, row, place) for place, row in evenly_spaced(list(_rows(path)), SHOWN_ROLLOUTS))


def _runs(report: Report, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Yields method, seed and folder of every run."""
    for name, method in report.methods.items():
        for seed, run in method.seeds.items():
            inner = PurePath(run.folder)
            if inner.is_absolute() or ".." in inner.parts:
                raise UserError(
                    f"{folder / 'results.json'}: methods.{name}.seeds.{seed}.folder: leads out of the folder"
                )
            yield name, seed, folder / inner


def _curve(method: str, seed: str, folder: Path) -> Curve:
    rows = list(_rows(folder / "metrics.jsonl", grows=True))
    rounds = [checked(Round, _round(row), place) for place, row in rows if "round" in row]
    warnings = [checked(list[str], row["warnings"], place) for place, row in rows if "warnings" in row]
    targets = {
        domain: checked(Reached, measured, place)
        for place, row in rows
        for domain, measured in _by_domain(row).items()
        if "violation_reached" in measured
    }
    return Curve(method, seed, rounds, list(chain.from_iterable(warnings)), targets)


def _round(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"number": record["round"], **record, "regularisers": _by_domain(record)}


def _by_domain(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups a record's keys, DOMAIN/NAME, kl/DOMAIN and kl_unreached/DOMAIN, by domain."""
    domains: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in record.items():
        domain, slash, name = key.rpartition("/")
        if domain in ("kl", "kl_unreached"):
            domain, name = name, domain
        if slash:
            domains[domain][name] = value
    return dict(domains)


def _completions(method: str, seed: str, folder: Path) -> Iterator[Completion]:
    for place, row in _rows(folder / "completions.jsonl"):
        yield checked(Completion, {**row, "method": method, "seed": seed}, place)


def _rows(path: Path, *, grows: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row with its place, as `read_rows`; none if the file is absent."""
    if path.is_file():
        yield from read_rows(path, grows=grows)
