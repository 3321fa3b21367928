"""Scoring in the background while more texts are sampled."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from bridle.constraints.base import Constraint, Score
from bridle.constraints.reading import Given


class AsyncScoring:
    """Scores outputs in a thread, once each, if the constraint `waits` for another host; otherwise does nothing.

    A constraint that computes on this host would only slow down sampling. Leaving the context drops the batches that
    have not started.
    """

    def __init__(self, constraint: Constraint):
        self.constraint = constraint
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._submitted: set[str] = set()
        self._futures: list[Future[dict[str, Score]]] = []

    def submit(self, prompts: Sequence[Given], completions: Sequence[str]) -> None:
        """Queues outputs and returns at once; does nothing once the constraint has raised, which `scores` reports."""
        outputs = {self.constraint.key(*output): output for output in zip(prompts, completions, strict=True)}
        new = {key: output for key, output in outputs.items() if key not in self._submitted}
        failed = any(future.done() and future.exception() for future in self._futures)
        if self.constraint.waits and new and not failed:
            self._submitted.update(new)
            self._futures.append(self._pool.submit(self._score, new))

    def scores(self) -> dict[str, Score]:
        """Waits for all scores, by the constraint's `key`; raises what the constraint raised."""
        return {key: score for future in self._futures for key, score in future.result().items()}

    def _score(self, outputs: dict[str, tuple[Given, str]]) -> dict[str, Score]:
        return dict(zip(outputs, self.constraint.score(*zip(*outputs.values(), strict=True)), strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)
