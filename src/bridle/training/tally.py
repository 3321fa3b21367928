"""Running sums of what the update computes, so that means do not depend on how batches are cut."""

from collections import defaultdict

from torch import Tensor

from bridle.ranks import gathered, is_main

Sums = dict[str, list[float]]


class Tally:
    """Sums and counts by name, kept since the last log and since the round began.

    Each process adds its own; what is asked for is of all of them, and must be asked for by all.
    """

    def __init__(self) -> None:
        self._log, self._update, self._round = _none(), _none(), _none()

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        """Adds a sum over `count` items; both are scalars."""
        found = {name: [float(total), float(count)]}
        _add(self._log, found)
        _add(self._update, found)

    def end_update(self, *, skipped: bool) -> None:
        """What was added since the last update counts for the round, unless this one was skipped."""
        if not skipped:
            _add(self._round, self._update)
        self._update = _none()

    def since_last_log(self) -> dict[str, float]:
        """Means by name since this was last asked."""
        sums, self._log = _of_all(self._log), _none()
        return _means(sums)

    def of_round(self) -> dict[str, float]:
        """Means by name, and the corpus tokens trained on, since the round began; begins the next."""
        sums, self._round = _of_all(self._round), _none()
        return _means(sums) | {"tokens_trained": int(sums["ce"][1])}

    def state(self) -> Sums:
        """The sums since the round began, for a checkpoint."""
        return _of_all(self._round)

    def restore(self, sums: Sums) -> None:
        """Goes on from a checkpoint's sums, which count once."""
        if is_main():
            self._round.update(sums)


def _none() -> Sums:
    return defaultdict(lambda: [0.0, 0.0])


def _of_all(sums: Sums) -> Sums:
    """The sums of all processes together; a name may be known to some of them only."""
    together = _none()
    for part in gathered(dict(sums)):
        _add(together, part)
    return together


def _add(sums: Sums, more: Sums) -> None:
    for name, (total, count) in more.items():
        sums[name][0] += total
        sums[name][1] += count


def _means(sums: Sums) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count}
