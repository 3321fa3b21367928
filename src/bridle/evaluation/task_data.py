"""The tasks of lm-eval, with their documents from the hub or from local JSON lines, checked row by row."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
from datasets import Dataset, Value

from bridle.data import ROW, DataSource
from bridle.errors import UserError, first_line
from bridle.utils.extras import needs_extra
from bridle.utils.settings import known_name

with needs_extra("eval", "tasks"):
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The eight commonsense tasks of Touvron et al. (LLaMA, 2023)."""

GROUPS = {
    "commonsense-4": ("boolq", "piqa", "hellaswag", "winogrande"),
    "commonsense-8": COMMONSENSE,
    "commonsense": COMMONSENSE,
}
"""Groups by name, each the unweighted mean of its tasks."""

# Their folders in lm-eval: reading one takes milliseconds, indexing all of them 12 s.
FOLDERS = {name: name for name in COMMONSENSE} | {
    "boolq": "super_glue/boolq",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "mmlu": "mmlu/default",
}
LM_EVAL_NAMES = {"siqa": "social_iqa"}
SHOTS = {"mmlu": 5}  # the others have none
LABELS = {"boolq": "answer"}  # the published file's name for the column that lm-eval reads as `label`
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class LoadedTask:
    """A task that is ready to be evaluated.

    Attributes:
        members: tasks of lm-eval by name: one, or the subjects of MMLU.
        shots: examples in front of each document.
        files: local files of the documents and, with shots, of the examples; empty if they come from the hub.
    """

    name: str
    members: dict[str, ConfigurableTask]
    shots: int
    split: str
    files: list[Path]


def expand(tasks: Sequence[str], task_data: Path | None) -> list[str]:
    """The tasks in the given order, each once, and groups as their members; an unknown one is a `UserError`."""
    own = sorted(file.stem for file in Path(task_data).glob("*.yaml")) if task_data else []
    for name in tasks:
        known_name(name, [*FOLDERS, *GROUPS, *own], "tasks", "task")
    return list(dict.fromkeys(one for name in tasks for one in GROUPS.get(name, [name])))


def load_task(name: str, task_data: Path | None, shots: int | None, limit: int | None) -> LoadedTask:
    """Loads a task, and checks the rows of local files, since lm-eval would score a null or a wrong label silently.

    Raises:
        UserError: as `bridle.evaluation.tasks.evaluate_tasks`.
    """
    folder = Path(lm_eval.tasks.__file__).parent / FOLDERS[name] if name in FOLDERS else Path(task_data or "")
    manager = TaskManager(include_defaults=False, include_path=folder)
    subjects = [member for member in manager.all_subtasks if member.startswith("mmlu_")]
    members = subjects if name == "mmlu" else [LM_EVAL_NAMES.get(name, name)]
    if members[0] not in manager.task_index:
        raise UserError(
            f"{folder / name}.yaml: not lm-eval's definition of a task called {name}; it needs `task: {name}`"
        )
    config = manager.task_index[members[0]].cfg or {}
    split = config.get("test_split") or config.get("validation_split") or "test"
    examples = config.get("fewshot_split") or config.get("training_split") or "train"
    if shots is None:
        shots = SHOTS.get(name, 0) if name in FOLDERS else int(config.get("num_fewshot") or 0)
    if task_data is None:
        return LoadedTask(name, _from_hub(manager, name, members, examples if shots else None), shots, split, [])
    files = {split: _find(task_data, name, split, "validation")}
    if shots:
        files[examples] = _find(task_data, name, examples)
    tasks = _from_files(manager, name, members, files, examples)
    loaded = LoadedTask(name, tasks, shots, files[split].name.split(".")[-2], list(files.values()))
    _check(loaded, limit)
    return loaded


def _from_hub(manager: TaskManager, name: str, members: list[str], examples: str | None) -> dict[str, ConfigurableTask]:
    try:
        with _offline_unless_the_hub_answers():
            return manager.load(members)["tasks"]
    except Exception as error:  # the hub's clients raise errors of several libraries with no common base
        files = f"{name}.validation.jsonl" + (f" and {name}.{examples}.jsonl" if examples else "")
        raise UserError(
            f"{name}: not read from the hub ({first_line(error)}); "
            f"without a network, give a task_data folder with {files}"
        ) from error


def _from_files(
    manager: TaskManager, name: str, members: list[str], files: Mapping[str, Path], examples: str
) -> dict[str, ConfigurableTask]:
    rows = {split: _read(name, file, members) for split, file in files.items()}
    changes = []
    for member in members:
        splits = {split: by_member[member] for split, by_member in rows.items()}
        # lm-eval needs the split of the examples also without shots.
        splits.setdefault(examples, next(iter(splits.values())).select([]))
        changes.append({"task": member, "custom_dataset": lambda splits=splits, **_: splits})
    try:
        # As members of a group, since lm-eval merges changes into a shipped task only there.
        return manager.load({"group": f"bridle_{name}", "task": changes})["tasks"]
    except Exception as error:  # raised by lm-eval's templates and functions on other documents
        raise _unreadable(name, " or ".join(map(str, files.values())), error) from error


def _read(name: str, file: Path, members: list[str]) -> dict[str, Dataset]:
    """The rows of a file by member."""
    rows = DataSource(str(file)).read()
    label = LABELS.get(name)
    if label in rows.column_names and "label" not in rows.column_names:
        rows = rows.rename_column(label, "label").cast_column("label", Value("int64"))
    return _by_subject(rows, file, members) if name == "mmlu" else {members[0]: rows}


def _by_subject(rows: Dataset, file: Path, members: Collection[str]) -> dict[str, Dataset]:
    if "subject" not in rows.column_names:
        raise UserError(f"{file} has no column 'subject', which names the subject of MMLU")
    subjects, known = np.array(rows["subject"], dtype=object), [member.removeprefix("mmlu_") for member in members]
    for row, subject in zip(rows[ROW], subjects, strict=True):
        if subject not in known:
            raise UserError(f"{file} row {row}: MMLU has no subject {subject!r}")
    for subject in known:
        if subject not in subjects:
            raise UserError(f"{file} has no row of MMLU's subject {subject!r}")
    return {f"mmlu_{subject}": rows.select(np.flatnonzero(subjects == subject)) for subject in known}


def _find(folder: Path, name: str, *splits: str) -> Path:
    """The file of the first split that has one."""
    files = [Path(folder) / f"{name}.{split}.jsonl" for split in dict.fromkeys(splits)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        wanted = " or ".join(file.name for file in files)
        raise UserError(f"{name}: {folder} has no {wanted}; add it, with the columns of the published data set")
    return found


def _check(loaded: LoadedTask, limit: int | None) -> None:
    for task in loaded.members.values():
        for file, rows in zip(loaded.files, (islice(task.eval_docs, limit), task.fewshot_docs()), strict=False):
            for row in rows:
                _check_row(row, task, loaded.name, file)
        if loaded.shots:
            # lm-eval draws one more where the examples may include the document itself.
            needed = loaded.shots + (task.fewshot_cfg.split == task.config.test_split)
            if (found := len(task.fewshot_docs())) < needed:
                raise UserError(
                    f"{loaded.files[-1]} holds {found} rows for {task.task_name}; {loaded.shots} shots need {needed}"
                )


def _check_row(row: dict[str, Any], task: ConfigurableTask, name: str, file: Path) -> None:
    filled = {key: value for key, value in row.items() if value is not None}
    try:
        text, choices = task.doc_to_text(filled), task.doc_to_choice(filled)
        # Where the choices precede the text that is scored, lm-eval's "text" is the answer's index.
        answer = text if task.multiple_input else task.doc_to_target(filled)
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"its answer is {answer!r}, of {len(choices)} choices counted from 0")
    except Exception as error:
        raise _unreadable(name, f"{file} row {row[ROW]}", error) from error


def _unreadable(name: str, place: str, error: Exception) -> UserError:
    return UserError(f"{place}: not what lm-eval reads as {name}: {type(error).__name__}: {first_line(error)}")


@contextmanager
def _offline_unless_the_hub_answers() -> Iterator[None]:
    """Without a network, the hub's client would retry each data set for half a minute before it reads its cache."""
    before = datasets.config.HF_HUB_OFFLINE
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # no name, no route, a timeout, a proxy's refusal, offline mode
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
