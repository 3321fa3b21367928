"""Benchmarks: MMLU and commonsense reasoning, by lm-eval's own evaluator and task definitions.

Prompts, choices, few-shot examples and metrics are lm-eval's; `bridle.evaluation.task_data` may read the documents from
local files. Bridle adds intervals, the counts of missing and truncated requests, and guidance.
"""

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.core.tokens import pad_right
from bridle.errors import UserError
from bridle.evaluation.statistics import Estimate, Result, estimate_proportion
from bridle.evaluation.task_data import GROUPS, LoadedTask, expand, load_task
from bridle.models.forward import policy_forward
from bridle.models.guidance import NADOGuide
from bridle.models.hidden import evaluation_mode, project
from bridle.utils.extras import needs_extra
from bridle.utils.progress import Progress
from bridle.utils.quiet import only_errors
from bridle.utils.settings import known_name

with needs_extra("eval", "tasks"):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

TOKENS_AT_ONCE = 2**13  # of a batch: the longest prompts of MMLU are ten times as long as most


@dataclass(frozen=True)
class TaskResult(Result):
    """The accuracy of a model on a task.

    Attributes:
        metric: the accuracy that is the figure: "acc_norm" (likelihood of a choice per character) where lm-eval's task
            reports it, "acc" otherwise; "mean" for a group.
        accuracy: the figure, with Wilson's interval; `missing` counts documents with a choice without likelihood, which
            is NaN or longer than the context.
        accuracies: all accuracies of lm-eval's task by name; empty for a group.
        parts: the figure of each subject of `mmlu` or of each task of a group; empty otherwise.
        shots: examples in front of each document.
        truncated: number of requests (a document with one of its choices) cut on the left to fit into the context.
        version: lm-eval's version of the task; None for a group.
        correct: whether each document is right under `metric`, None where missing; not part of the JSON.
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
        """The weight of each document in the figure, 1 on average: the tasks of a group weigh the same."""
        if self.metric != "mean":
            return [1.0] * len(self.correct)
        sizes = [part.n + part.missing for part in self.parts.values()]
        return [len(self.correct) / (len(sizes) * size) for size in sizes for _ in range(size)]

    def __str__(self) -> str:
        cut = f", {self.truncated} requests truncated" if self.truncated else ""
        return f"{self.metric} {self.accuracy} ({self.shots}-shot, {self.split}{cut})"


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_data: Path | None = None,
    limit: int | Mapping[str, int] | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    guide: NADOGuide | None = None,
) -> dict[str, TaskResult]:
    """Accuracy of a model on `boolq`, ..., `openbookqa`, `mmlu`, groups of them, or custom tasks.

    The commonsense figures are those of Touvron et al. (LLaMA, 2023) as far as lm-eval has them: the choice of the
    highest likelihood per character, where the task reports it. LLaMA normalises BoolQ's and OpenBookQA's likelihoods
    by unconditional ones; lm-eval does not, so those are comparable within lm-eval only. A group is an unweighted mean,
    with an interval by MOVER (Zou and Donner, Statistics in Medicine 2008): `commonsense-8`, also called `commonsense`,
    of the eight; `commonsense-4` of BoolQ, PIQA, HellaSwag and WinoGrande. `mmlu` is the mean over all documents of its
    57 subjects.

    Args:
        tasks: names; a group includes its members. Any other name is an lm-eval definition NAME.yaml in `task_data`.
        task_data: folder of NAME.SPLIT.jsonl files with the columns of the published data sets, instead of the hub.
            SPLIT is the split that lm-eval evaluates or else `validation` (also for MMLU), and for examples the one
            that lm-eval draws them from: mmlu.dev.jsonl, NAME.train.jsonl for the others.
        limit: only the first documents of each task, of each subject of `mmlu`; or this by the names in `tasks`.
        shots: examples in front of each document; by default 5 for `mmlu`, `num_fewshot` for an own task, 0 otherwise.
        seed: of the choice of examples, where lm-eval draws them; MMLU takes the first ones.
        guide: an (entered) guide; the guided model is measured, by the likelihoods of q.

    Returns:
        Results by name: each task, and each group that was requested.

    Raises:
        UserError: before any evaluation: an unknown task, a local file that is missing or malformed, a data set that
            the hub does not provide, a limit below 1 or of a task that is not evaluated, or shots below 0.
    """
    loaded, limits, terminal = load_tasks(tasks, task_data, limit, shots), _limits(limit, tasks), sys.stderr
    with _quiet(), evaluation_mode(model), torch.inference_mode():
        lm = _Scorer(model, tokenizer, batch_size, guide, terminal)
        results = {task.name: _evaluate(lm, task, limits.get(task.name), seed) for task in loaded}
    groups = {name: _mean(name, [results[one] for one in GROUPS[name]]) for name in tasks if name in GROUPS}
    return results | groups


def load_tasks(
    tasks: Sequence[str],
    task_data: Path | None = None,
    limit: int | Mapping[str, int] | None = None,
    shots: int | None = None,
) -> list[LoadedTask]:
    """The tasks, ready to be evaluated; arguments are those of `evaluate_tasks`.

    Raises:
        UserError: as `evaluate_tasks`.
    """
    if shots is not None and shots < 0:
        raise UserError(f"shots is {shots}; it cannot be below 0")
    names, limits = expand(tasks, task_data), _limits(limit, tasks)
    with _quiet():
        return [load_task(name, task_data, shots, limits.get(name)) for name in names]


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and `datasets` show bars for milliseconds of work, and warn of each request."""
    with (
        only_errors("lm_eval", "transformers.tokenization_utils_base"),
        open(os.devnull, "w") as nowhere,
        redirect_stderr(nowhere),
    ):
        yield


def _limits(limit: int | Mapping[str, int] | None, tasks: Sequence[str]) -> dict[str, int]:
    """The limit of each task that has one; a task's own goes before its group's."""
    by_name = limit if isinstance(limit, Mapping) else {} if limit is None else dict.fromkeys(tasks, limit)
    for name, documents in by_name.items():
        known_name(name, tasks, "limit", "task among those evaluated")
        if documents < 1:
            raise UserError(f"limit is {documents}; at least 1 document is needed")
    groups_first = sorted(by_name, key=lambda name: name not in GROUPS)
    return {one: by_name[name] for name in groups_first for one in GROUPS.get(name, [name])}


class _Scorer(HFLM):
    """lm-eval's interface to a model in memory, guided or not. It counts the requests that the context cut."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, guide: NADOGuide | None, terminal: Any):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.guide, self.terminal = guide, terminal
        self.description, self.truncated = "", 0

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each (texts, context, continuation); NaN of one that cannot fit.

        As lm-eval has it, but only a continuation's positions enter the output layer. lm-eval computes the log-softmax
        of every position: gigabytes for a few examples of MMLU.
        """
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        rows: dict[tuple[int, ...], list[int]] = {}  # requests that differ in their last token share a row
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) <= self.max_length:
                # The last token is predicted, not read.
                row = tuple((context + continuation)[-(self.max_length + 1) : -1])
                self.truncated += len(context) + len(continuation) > self.max_length + 1
                rows.setdefault(row, []).append(index)
        rest = sorted(rows, key=len, reverse=True)
        with redirect_stderr(self.terminal), Progress(self.description, len(requests), "requests") as progress:
            while rest:
                size = max(1, min(self.batch_size, TOKENS_AT_ONCE // len(rest[0])))
                batch, rest = rest[:size], rest[size:]
                counts = [max(len(requests[index][2]) for index in rows[row]) for row in batch]
                for row, log_probs in zip(batch, self._last_log_probs(batch, counts), strict=True):
                    for index in rows[row]:
                        answers[index] = _likelihood(log_probs, requests[index][2])
                        progress.update()
        return answers

    def _last_log_probs(self, rows: Sequence[tuple[int, ...]], counts: Sequence[int]) -> Iterator[Tensor]:
        """log p, or log q, of the next tokens at the last positions of each row: [count, vocabulary]."""
        input_ids, mask = (part.to(self.device) for part in pad_right([list(row) for row in rows], 0))
        states = policy_forward(self.model, input_ids, mask)
        first = torch.tensor([len(row) - count for row, count in zip(rows, counts, strict=True)], device=self.device)
        begins = torch.arange(input_ids.shape[1], device=self.device) == first[:, None]
        features = None if self.guide is None else self.guide.auxiliary.features(states, input_ids, mask, begins)
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            last = slice(len(row) - count, len(row))
            logits = project(self.model, states[number, last]).float()
            if self.guide is None or features is None:
                yield F.log_softmax(logits, dim=-1)
            else:
                yield self.guide.auxiliary.log_q(features[number, last], logits, self.guide.guidance_scale)


def _likelihood(log_probs: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """The log-likelihood of the tokens at the last positions, and whether each is the likeliest."""
    own, chosen = log_probs[-len(tokens) :], torch.tensor(tokens, device=log_probs.device)
    return float(own.gather(1, chosen[:, None]).sum()), bool((own.argmax(-1) == chosen).all())


def _evaluate(lm: _Scorer, loaded: LoadedTask, limit: int | None, seed: int) -> TaskResult:
    lm.description, lm.truncated = loaded.name, 0
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
        correct=_correct(every, metric),
    )


def _accuracy(samples: Sequence[dict[str, Any]], metric: str) -> Estimate:
    correct = _correct(samples, metric)
    return estimate_proportion([one for one in correct if one is not None], missing=correct.count(None))


def _correct(samples: Sequence[dict[str, Any]], metric: str) -> list[bool | None]:
    """Whether each document is right; None where a likelihood is NaN, which `argmax` would choose as the answer.

    A choice that is ruled out (-inf) can be compared with the others; if all are, none is preferred.
    """
    known = (np.isfinite(np.max([likelihood for likelihood, _ in sample["filtered_resps"]])) for sample in samples)
    return [bool(sample[metric]) if likely else None for sample, likely in zip(samples, known, strict=True)]


def _mean(group: str, results: Sequence[TaskResult]) -> TaskResult:
    return TaskResult(
        task=group,
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
    """Unweighted mean of independent rates; the squared distances to their limits add up (MOVER)."""
    n, missing = sum(rate.n for rate in rates), sum(rate.missing for rate in rates)
    known = [(rate.value, rate.low, rate.high) for rate in rates if rate.value is not None]
    if len(known) < len(rates):
        return Estimate(None, None, None, n, missing)
    values, lows, highs = np.array(known, dtype=float).T
    mean, below, above = values.mean(), np.linalg.norm(values - lows), np.linalg.norm(highs - values)
    return Estimate(float(mean), float(mean - below / len(rates)), float(mean + above / len(rates)), n, missing)
