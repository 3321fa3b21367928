"""The observations behind the figures: texts with their scores, likelihoods and answers.

Paired tests, reports and judges need them; `results.json` holds the figures only.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridle.constraints import Score
from bridle.data import Prompt
from bridle.evaluation.generation import GenerationResult
from bridle.evaluation.utility import TextLikelihood
from bridle.utils.files import checked, read_rows, write_text

if TYPE_CHECKING:
    from bridle.evaluation.tasks import TaskResult

Row = dict[str, Any]


@dataclass
class _Scored:
    value: float | None
    complies: bool | None


COLUMNS: dict[str, list[tuple[str, Any] | tuple[str, Any, Any]]] = {
    "completions": [
        *(("prompt_set", str), ("index", int), ("sample", int), ("prompt", str), ("completion", str)),
        ("scores", dict[str, _Scored]),
        ("prompt_scores", dict[str, _Scored], field(default_factory=dict)),
        ("messages", list[Row] | None, None),
    ],
    "likelihoods": [("held_out", str), ("index", int), ("nll", float), ("tokens", int)],
    "answers": [("task", str), ("index", int), ("correct", bool | None), ("weight", float)],
    "classified": [("index", int), ("score", float | None), ("label", int)],
}
"""The columns of each kind of row, with a default where a row may lack it."""

KINDS = {name: make_dataclass(name, columns) for name, columns in COLUMNS.items()}


@dataclass
class Observations:
    """All observations of one model, as rows ready for JSON lines.

    Attributes:
        completions: prompt_set, index (of the prompt, from 0), sample, prompt, completion, and `scores`: by
            constraint its value (1 complies .. 0 violates), complies, and the reason where both are null;
            `prompt_scores`: the same of the prompt; `messages`: of a chat, the turns before the completion.
        likelihoods: held_out, index (of the text), nll in nats, tokens and bytes.
        answers: task, index (of the document), correct (null where missing), and the weight of the document in the
            task's figure, 1 on average.
        classified: index (of the row), score and label.
    """

    completions: list[Row] = field(default_factory=list)
    likelihoods: list[Row] = field(default_factory=list)
    answers: list[Row] = field(default_factory=list)
    classified: list[Row] = field(default_factory=list)

    def add_completions(
        self,
        prompt_set: str,
        prompts: Sequence[Prompt],
        drawn: Sequence[Sequence[str]],
        results: Mapping[str, GenerationResult],
        prompt_scores: Mapping[str, Sequence[Score]],
    ) -> None:
        """Adds [prompts, samples] completions, with their scores and their prompts' under each constraint."""
        for index, (prompt, texts) in enumerate(zip(prompts, drawn, strict=True)):
            of_prompt = {name: asdict(scores[index]) for name, scores in prompt_scores.items()}
            for sample, text in enumerate(texts):
                scores = {name: asdict(result.scores[index][sample]) for name, result in results.items()}
                self.completions.append(
                    {
                        "prompt_set": prompt_set,
                        "index": index,
                        "sample": sample,
                        "prompt": prompt.text,
                        "completion": text,
                        "scores": scores,
                        "prompt_scores": of_prompt,
                        **({"messages": prompt.messages} if prompt.messages else {}),
                    }
                )

    def add_likelihoods(self, held_out: str, texts: Iterable[TextLikelihood]) -> None:
        """Adds the likelihoods of the texts of a held-out file."""
        for index, text in enumerate(texts):
            row = {"held_out": held_out, "index": index, "nll": text.nll, "tokens": text.tokens, "bytes": text.bytes}
            self.likelihoods.append(row)

    def add_answers(self, task: str, result: "TaskResult") -> None:
        """Adds the answers to the documents of a task."""
        for index, (right, weight) in enumerate(zip(result.correct, result.weights, strict=True)):
            self.answers.append({"task": task, "index": index, "correct": right, "weight": weight})

    def add_classified(self, scores: Sequence[float | None], labels: Sequence[int]) -> None:
        """Adds classified rows."""
        for index, (score, label) in enumerate(zip(scores, labels, strict=True)):
            self.classified.append({"index": index, "score": score, "label": label})

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes a file NAME.jsonl for each kind with observations, and removes that of a kind without any."""
        for name, rows in vars(self).items():
            file = Path(folder) / f"{name}.jsonl"
            if rows:
                write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
            else:
                file.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Observations":
        """Reads the files of `write`; a kind without a file is empty.

        Raises:
            UserError: a row is malformed, or lacks a column.
        """
        return cls(**{name: list(_rows(Path(folder) / f"{name}.jsonl", kind)) for name, kind in KINDS.items()})


def _rows(path: Path, kind: type) -> Iterator[Row]:
    if path.is_file():
        for place, row in read_rows(path):
            checked(kind, row, place)
            yield row
