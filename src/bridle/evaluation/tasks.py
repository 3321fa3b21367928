"""What a model can do: MMLU and commonsense reasoning, by lm-eval's own evaluator and task definitions.

Prompts, choices, few-shot examples and metrics are lm-eval's; only where the documents come from can be
changed, to local JSON lines. Bridle adds the intervals, the missing and truncated counts, and the guide.
"""

import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval.tasks
import numpy as np
import torch
from datasets import Dataset, Value
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.data import ROW, DataSource
from bridle.errors import UserError, first_line
from bridle.evaluation.statistics import Estimate, wilson_interval
from bridle.models.guidance import NADOGuide
from bridle.utils.progress import Progress

COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The eight tasks whose unweighted mean is the group `commonsense`."""

# Where in lm-eval's folder of tasks each is defined: reading one takes milliseconds, indexing all of them 12 s.
_FOLDERS = {name: name for name in COMMONSENSE} | {
    "boolq": "super_glue/boolq",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "mmlu": "mmlu/default",
}
_LM_EVAL_NAMES = {"siqa": "social_iqa"}
_SHOTS = {"mmlu": 5}  # the others have none
_LABELS = {"boolq": "answer"}  # the published file's name for the column that lm-eval reads as `label`
_HUB_SECONDS = 5.0


@dataclass(frozen=True)
class TaskResult:
    """How many documents of a task a model answers correctly.

    Attributes:
        task: name of the task or group.
        metric: which accuracy is the figure: "acc_norm" (likelihood of a choice per character) where lm-eval's
            task reports it, "acc" otherwise; "mean" for a group.
        accuracy: the figure, with Wilson's interval; `missing` counts documents of which a choice has no
            likelihood, because it is NaN or the choice alone is longer than the context.
        accuracies: every accuracy that lm-eval's task reports, by name; empty for a group.
        parts: the figure of each subject of `mmlu`, of each task of `commonsense`; empty otherwise.
        shots: worked examples in front of each document.
        split: which split the documents are from.
        truncated: how many requests (a document with one of its choices) were cut on the left to fit into the
            context.
        version: lm-eval's version of the task; None for a group.
        correct: per document, in order, whether it counts as right under `metric`, None where missing; for
            paired tests between models. Not part of the JSON.
    """

    task: str
    metric: str
    accuracy: Estimate
    accuracies: dict[str, Estimate]
    parts: dict[str, Estimate]
    shots: int
    split: str
    truncated: int
    version: str | None
    correct: list[bool | None] = field(repr=False)

    @property
    def weights(self) -> list[float]:
        """How much each document counts in the figure, 1 on average: a group's tasks count alike, small or large."""
        if self.metric != "mean":
            return [1.0] * len(self.correct)
        sizes = [part.n + part.missing for part in self.parts.values()]
        return [len(self.correct) / (len(sizes) * size) for size in sizes for _ in range(size)]

    def to_json(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        fields = asdict(self)
        del fields["correct"]
        return fields

    def __str__(self) -> str:
        cut = f", {self.truncated} requests truncated" if self.truncated else ""
        return f"{self.metric} {self.accuracy} ({self.shots}-shot, {self.split}{cut})"


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_data: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    guide: NADOGuide | None = None,
) -> dict[str, TaskResult]:
    """Accuracy of a model on `boolq`, ..., `openbookqa`, `mmlu`, the group `commonsense`, or tasks of one's own.

    The commonsense figures are those of Touvron et al. (LLaMA, 2023) as far as lm-eval has them: the
    choice of the highest likelihood per character, where the task reports it. LLaMA divides BoolQ's and
    OpenBookQA's by an unconditional likelihood; lm-eval does not, so those are comparable within lm-eval only.
    `commonsense` is the unweighted mean of the eight; its interval puts theirs together by MOVER (Zou and
    Donner, Statistics in Medicine 2008). `mmlu` is the mean over all documents of its 57 subjects.

    Args:
        model: a causal language model; it is put into evaluation mode for the time of the call.
        tokenizer: the model's.
        tasks: names; a group brings its members along. Any other name is a task of one's own: an lm-eval definition
            NAME.yaml in `task_data`.
        task_data: folder of NAME.SPLIT.jsonl files with the columns of the published data sets, read in
            place of the hub's. The split that lm-eval evaluates is taken where its file is there,
            NAME.validation.jsonl otherwise (MMLU's documents are then its validation rows); examples come
            from the split lm-eval takes them from: mmlu.dev.jsonl, NAME.train.jsonl for the others.
        limit: only the first so many documents of each task, of each subject of `mmlu`.
        shots: examples in front of each document; 5 for `mmlu`, a task of one's own as many as its `num_fewshot`
            says, and 0 for the rest unless given.
        batch_size: sequences in one forward.
        seed: of the choice of examples, where lm-eval draws them; MMLU takes the first ones.
        guide: measure the model as guided by this (entered) guide: likelihoods are then those of q.

    Returns:
        Results by name: each task, and after its members the group `commonsense` where it was asked for.

    Raises:
        UserError: an unknown task; a local file that is missing or holds something else; a data set that
            cannot be had from the hub; a limit below 1 or shots below 0. Nothing was evaluated then.
    """
    _check_numbers(limit, shots)
    names = _expanded(tasks, task_data)
    was_training = model.training
    with _quiet() as terminal:
        loaded = [_load(name, task_data, shots) for name in names]
        for task in loaded:
            _check(task, limit)
        try:
            lm = _Scorer(model, tokenizer, batch_size, guide, terminal)
            results = {task.name: _evaluate(lm, task, limit, seed) for task in loaded}
        finally:
            model.train(was_training)
    if "commonsense" in tasks:
        results["commonsense"] = _commonsense([results[name] for name in COMMONSENSE])
    return results


class _Scorer(HFLM):
    """lm-eval's interface to a model in memory, guided or not. It counts the requests that the context cut."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, guide: NADOGuide | None, terminal: Any):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.guide, self.terminal = guide, terminal
        self.description, self.truncated = "", 0

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """[batch, time] -> logits, or log q, [batch, time, vocabulary]."""
        logits = super()._model_call(inps, attn_mask, labels)
        # Rows are padded on the right, where nothing that is scored can see it.
        return logits if self.guide is None else self.guide.log_probs(logits, inps, torch.ones_like(inps))

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each (texts, context, continuation); NaN of one that cannot fit."""
        fits = [len(continuation) <= self.max_length for _, _, continuation in requests]
        readable = [request for request, fit in zip(requests, fits, strict=True) if fit]
        # The last token is predicted, not read.
        self.truncated = sum(len(context) + len(rest) > self.max_length + 1 for _, context, rest in readable)
        with redirect_stderr(self.terminal), Progress(self.description, len(readable), "requests") as progress:
            self.set_cache_hook(_Counter(progress))
            answers = iter(super()._loglikelihood_tokens(readable, disable_tqdm=True, override_bs=override_bs))
        return [next(answers) if fit else (math.nan, False) for fit in fits]


class _Counter:
    """Stands where lm-eval keeps a cache, which is told of every request that is done."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.progress.update()


@dataclass(frozen=True)
class _Loaded:
    name: str
    members: dict[str, ConfigurableTask]  # by lm-eval's names: one, or the subjects of MMLU
    shots: int
    split: str
    files: list[Path]  # of the documents and, with shots, of the examples; empty where they are the hub's


def _load(name: str, task_data: Path | None, asked: int | None) -> _Loaded:
    shipped = Path(lm_eval.tasks.__file__).parent
    folder = shipped / _FOLDERS[name] if name in _FOLDERS else Path(task_data or "")
    manager = TaskManager(include_defaults=False, include_path=folder)
    members = _members(name, manager)
    if members[0] not in manager.task_index:
        raise UserError(
            f"{folder / name}.yaml: not lm-eval's definition of a task called {name}; it needs `task: {name}`"
        )
    config = manager.task_index[members[0]].cfg or {}
    evaluated = config.get("test_split") or config.get("validation_split") or "test"
    examples = config.get("fewshot_split") or config.get("training_split") or "train"
    shots = _shots(name, config) if asked is None else asked
    if task_data is None:
        return _Loaded(name, _load_from_hub(manager, name, members, examples, shots), shots, evaluated, [])
    files = {evaluated: _find(task_data, name, evaluated, "validation")}
    if shots:
        files[examples] = _find(task_data, name, examples)
    tasks = _load_from_files(manager, name, members, files, examples)
    return _Loaded(name, tasks, shots, files[evaluated].name.split(".")[-2], list(files.values()))


def _shots(name: str, config: Mapping[str, Any]) -> int:
    return _SHOTS.get(name, 0) if name in _FOLDERS else int(config.get("num_fewshot") or 0)


def _members(name: str, manager: TaskManager) -> list[str]:
    """lm-eval's names of what makes up a task."""
    if name == "mmlu":
        return [member for member in manager.all_subtasks if member.startswith("mmlu_")]
    return [_LM_EVAL_NAMES.get(name, name)]


def _build(manager: TaskManager, name: str, changes: Mapping[str, dict[str, Any]]) -> dict[str, ConfigurableTask]:
    """lm-eval's tasks as shipped, with changes to their configurations."""
    # As members of a group, since lm-eval merges changes into a shipped task only there.
    group = {"group": f"bridle_{name}", "task": [{"task": member, **change} for member, change in changes.items()]}
    return manager.load(group)["tasks"]


def _load_from_hub(
    manager: TaskManager, name: str, members: list[str], examples: str, shots: int
) -> dict[str, ConfigurableTask]:
    try:
        with _offline_unless_the_hub_answers():
            return _build(manager, name, {member: {} for member in members})
    except Exception as error:  # the hub's clients raise errors of several libraries with no common base
        files = f"{name}.validation.jsonl" + (f" and {name}.{examples}.jsonl" if shots else "")
        reason = first_line(error)
        raise UserError(
            f"{name}: not read from the hub ({reason}); without a network, give a task_data folder with {files}"
        ) from error


def _load_from_files(
    manager: TaskManager, name: str, members: list[str], files: dict[str, Path], examples: str
) -> dict[str, ConfigurableTask]:
    rows = {split: _read(name, file, members) for split, file in files.items()}
    changes = {}
    for member in members:
        splits = {split: of_member[member] for split, of_member in rows.items()}
        # lm-eval looks for the examples even where it takes none.
        splits.setdefault(examples, next(iter(splits.values())).select([]))
        changes[member] = {"custom_dataset": _giving(splits)}
    try:
        return _build(manager, name, changes)
    except Exception as error:  # whatever lm-eval's templates and functions raise on a document of another kind
        raise _not_documents(name, " or ".join(map(str, files.values())), error) from error


def _read(name: str, file: Path, members: list[str]) -> dict[str, Dataset]:
    """The rows of a file for each member."""
    rows = DataSource(str(file)).read()
    label = _LABELS.get(name)
    if label in rows.column_names and "label" not in rows.column_names:
        rows = rows.rename_column(label, "label").cast_column("label", Value("int64"))
    return _by_subject(rows, file, members) if name == "mmlu" else {members[0]: rows}


def _by_subject(rows: Dataset, file: Path, members: Collection[str]) -> dict[str, Dataset]:
    if "subject" not in rows.column_names:
        raise UserError(f"{file} has no column 'subject', which says where in MMLU a row belongs")
    indices = defaultdict(list)
    for index, subject in enumerate(rows["subject"]):
        indices[f"mmlu_{subject}"].append(index)
    for unknown in indices.keys() - set(members):
        row = rows[indices[unknown][0]]
        raise UserError(f"{file} row {row[ROW]}: MMLU has no subject {row['subject']!r}")
    for member in members:
        if member not in indices:
            raise UserError(f"{file} has no row of MMLU's subject {member.removeprefix('mmlu_')!r}")
    return {member: rows.select(indices[member]) for member in members}


def _giving(splits: dict[str, Dataset]) -> Callable[..., dict[str, Dataset]]:
    return lambda **metadata: splits


def _find(folder: Path, name: str, *splits: str) -> Path:
    """The file of the first split that there is one of."""
    files = [Path(folder) / f"{name}.{split}.jsonl" for split in splits]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        wanted = " or ".join(dict.fromkeys(file.name for file in files))
        raise UserError(f"{name}: {folder} has no {wanted}; add it, with the columns of the published data set")
    return found


def _check(loaded: _Loaded, limit: int | None) -> None:
    """Sees that lm-eval can read every row, since it would score a null, or a wrong label, in silence."""
    for task in loaded.members.values():
        for file, rows in zip(loaded.files, (islice(task.eval_docs, limit), task.fewshot_docs()), strict=False):
            for row in rows:
                _check_row(row, task, loaded.name, file)
        if loaded.files and loaded.shots:
            _check_examples(task, loaded.files[-1], loaded.shots)


def _check_row(row: dict[str, Any], task: ConfigurableTask, name: str, file: Path) -> None:
    filled = {key: value for key, value in row.items() if value is not None}
    try:
        text, choices = task.doc_to_text(filled), task.doc_to_choice(filled)
        # Where the choices are what comes before the text that is scored, lm-eval's "text" is the answer's index.
        answer = text if task.multiple_input else task.doc_to_target(filled)
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"its answer is {answer!r}, of {len(choices)} choices counted from 0")
    except Exception as error:
        raise _not_documents(name, f"{file} row {row[ROW]}", error) from error


def _check_examples(task: ConfigurableTask, file: Path, shots: int) -> None:
    # lm-eval draws one more where the examples might hold the document itself.
    needed = shots + (task.fewshot_cfg.split == task.config.test_split)
    found = len(task.fewshot_docs())
    if found < needed:
        raise UserError(f"{file} holds {found} rows for {task.task_name}; {shots} shots need {needed}")


def _not_documents(name: str, place: str, error: Exception) -> UserError:
    return UserError(f"{place}: not what lm-eval reads as {name}: {type(error).__name__}: {first_line(error)}")


def _evaluate(lm: _Scorer, loaded: _Loaded, limit: int | None, seed: int) -> TaskResult:
    lm.description = loaded.name
    for task in loaded.members.values():
        task.set_config("num_fewshot", loaded.shots)
        task.set_fewshot_seed(seed)
    # No bootstrap: the intervals are Wilson's.
    samples = evaluate(lm, {"tasks": loaded.members}, limit=limit, bootstrap_iters=0)["samples"]
    task, every = next(iter(loaded.members.values())), list(chain.from_iterable(samples.values()))
    metrics = every[0]["metrics"]
    metric = "acc_norm" if "acc_norm" in metrics else "acc"
    subjects = samples if len(samples) > 1 else {}
    return TaskResult(
        task=loaded.name,
        metric=metric,
        accuracy=_accuracy(every, metric),
        accuracies={name: _accuracy(every, name) for name in metrics},
        parts={member.removeprefix("mmlu_"): _accuracy(rows, metric) for member, rows in subjects.items()},
        shots=loaded.shots,
        split=loaded.split,
        truncated=lm.truncated,
        version=str(task.VERSION),
        correct=_outcomes(every, metric),
    )


def _outcomes(samples: Iterable[dict[str, Any]], metric: str) -> list[bool | None]:
    """Per document whether it is right; None where NaN, which `argmax` would pass off as the answer."""
    return [bool(sample[metric]) if _has_likelihoods(sample) else None for sample in samples]


def _has_likelihoods(sample: dict[str, Any]) -> bool:
    # One choice that is ruled out (-inf) can be compared with the others; if all are, none is preferred.
    return bool(np.isfinite(np.max([likelihood for likelihood, _ in sample["filtered_resps"]])))


def _accuracy(samples: Iterable[dict[str, Any]], metric: str) -> Estimate:
    outcomes = _outcomes(samples, metric)
    scored = [outcome for outcome in outcomes if outcome is not None]
    low, high = wilson_interval(sum(scored), len(scored)) or (None, None)
    value = sum(scored) / len(scored) if scored else None
    return Estimate(value, low, high, len(scored), len(outcomes) - len(scored))


def _commonsense(results: Sequence[TaskResult]) -> TaskResult:
    return TaskResult(
        task="commonsense",
        metric="mean",
        accuracy=_mean_of([result.accuracy for result in results]),
        accuracies={},
        parts={result.task: result.accuracy for result in results},
        shots=results[0].shots,
        split=", ".join(sorted({result.split for result in results})),
        truncated=sum(result.truncated for result in results),
        version=None,
        correct=list(chain.from_iterable(result.correct for result in results)),
    )


def _mean_of(rates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent rates; the distances to their limits add up as squares (MOVER)."""
    n, missing = sum(rate.n for rate in rates), sum(rate.missing for rate in rates)
    known = [(rate.value, rate.low, rate.high) for rate in rates if rate.value is not None]
    if len(known) < len(rates):
        return Estimate(None, None, None, n, missing)
    values, lows, highs = np.array(known, dtype=float).T
    mean, below, above = values.mean(), np.linalg.norm(values - lows), np.linalg.norm(highs - values)
    return Estimate(float(mean), float(mean - below / len(rates)), float(mean + above / len(rates)), n, missing)


def _expanded(tasks: Sequence[str], task_data: Path | None) -> list[str]:
    """The tasks in the order given, groups as their members, each once."""
    own = sorted(file.stem for file in Path(task_data).glob("*.yaml")) if task_data else []
    known = (*_FOLDERS, "commonsense", *own)
    for name in tasks:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0)[0]
            raise UserError(f"tasks: unknown task {name!r}; nearest: {nearest!r}; known: {', '.join(known)}")
    return list(dict.fromkeys(chain.from_iterable(COMMONSENSE if name == "commonsense" else [name] for name in tasks)))


def _check_numbers(limit: int | None, shots: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; at least 1 document is needed")
    if shots is not None and shots < 0:
        raise UserError(f"shots is {shots}; it cannot be below 0")


@contextmanager
def _quiet() -> Iterator[Any]:
    """Keeps back what lm-eval and `datasets` print: bars for work of milliseconds, a warning for each request.

    Yields:
        The stream that progress goes to.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere:
            terminal = sys.stderr
            with redirect_stderr(nowhere):
                yield terminal
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _offline_unless_the_hub_answers() -> Iterator[None]:
    """Without a network, its client would try for half a minute for each data set before it looks at its cache."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not _hub_answers()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # no name, no route, no time, a proxy's refusal
        return False
    return True
