"""Scoring while more texts are drawn, where a constraint only waits for somebody else's machine."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from bridle.constraints.base import Constraint, Score
from bridle.constraints.reading import Given


class ScoringAhead:
    """Asks a constraint that `waits` about outputs as they come, in a thread; leaves every other constraint alone.

    What computes on this machine would only take from sampling what it gives to scoring. To be used as a context
    manager: on the way out it drops what has not been asked yet.

    Args:
        constraint: asked once about outputs of which it reads the same.
    """

    def __init__(self, constraint: Constraint):
        self.constraint = constraint
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._asked: set[str] = set()
        self._answers: list[Future[dict[str, Score]]] = []

    def ask(self, prompts: Sequence[Given], completions: Sequence[str]) -> None:
        """Begins to score outputs, behind those that came before; returns at once.

        Once the constraint has raised, which `scores` tells, it is not asked again.
        """
        if not self.constraint.waits:
            return
        outputs = {self.constraint.key(*output): output for output in zip(prompts, completions, strict=True)}
        new = {key: output for key, output in outputs.items() if key not in self._asked}
        raised = any(answer.done() and answer.exception() for answer in self._answers)
        if new and not raised:
            self._asked.update(new)
            self._answers.append(self._pool.submit(self._score, new))

    def scores(self) -> dict[str, Score]:
        """Waits for what has been asked: scores by the constraint's `key`.

        Raises:
            Exception: what the constraint raised.
        """
        return {key: score for answer in self._answers for key, score in answer.result().items()}

    def _score(self, outputs: dict[str, tuple[Given, str]]) -> dict[str, Score]:
        prompts, completions = zip(*outputs.values(), strict=True)
        return dict(zip(outputs, self.constraint.score(prompts, completions), strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
