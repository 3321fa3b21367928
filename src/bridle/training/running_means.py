"""Running sums of an update's values, so that means do not depend on how batches are cut."""

import time
from collections import defaultdict

import torch
from torch import Tensor

from bridle.utils.distributed import all_gather, is_main

Totals = dict[str, list[float]]
Kept = dict[str, Tensor]  # by name [2]: sum and count


class RunningMeans:
    """Sums and counts by name, since the last log and since the start of the round.

    They stay on the device until read, so that adding never waits. Each process adds its own values; reading combines
    all processes, and all must call it.
    """

    def __init__(self) -> None:
        self._log: Kept = {}
        self._update: Kept = {}
        self._round: Kept = {}
        self._logged_at = 0.0

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Adds a sum over `count` items; both are scalars."""
        pair = (torch.as_tensor(part, dtype=torch.float64, device=total.device) for part in (total, count))
        found = {name: torch.stack(list(pair))}
        _add(self._log, found)
        _add(self._update, found)

    def end_update(self, *, skipped: bool) -> None:
        """Adds this update's values to the round's, unless it was skipped."""
        if not skipped:
            _add(self._round, self._update)
        self._update = {}

    def since_last_log(self, start_time: float | None = None) -> dict[str, float]:
        """Means by name since the last call, and the corpus's tokens a second.

        Args:
            start_time: when training began, in seconds of `time.time`; without it there is no speed.
        """
        sums, self._log = _of_all(self._log), {}
        now, means = time.time(), _means(sums)
        if start_time is not None and "ce" in means:
            means["tokens_per_second"] = sums["ce"][1] / max(now - max(start_time, self._logged_at), 1e-9)
        self._logged_at = now
        return means

    def of_round(self) -> dict[str, float]:
        """Means by name and trained corpus tokens of the round; starts the next one."""
        sums, self._round = _of_all(self._round), {}
        return _means(sums) | {"tokens_trained": int(sums["ce"][1])}

    def state(self) -> Totals:
        """The round's sums, for a checkpoint."""
        return _of_all(self._round)

    def restore(self, sums: Totals) -> None:
        """Resumes from a checkpoint's sums, which count once."""
        if is_main():
            self._round = {name: torch.tensor(pair, dtype=torch.float64) for name, pair in sums.items()}


def _of_all(kept: Kept) -> Totals:
    """The sums over all processes; some may lack a name."""
    together: Totals = defaultdict(lambda: [0.0, 0.0])
    for part in all_gather({name: pair.tolist() for name, pair in kept.items()}):
        for name, (total, count) in part.items():
            together[name][0] += total
            together[name][1] += count
    return together


def _add(sums: Kept, more: Kept) -> None:
    for name, pair in more.items():
        sums[name] = sums[name].to(pair.device) + pair if name in sums else pair


def _means(sums: Totals) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count}
