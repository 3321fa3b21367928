"""Running sums of what the update computes, so that means do not depend on how batches are cut."""

from collections import defaultdict

from torch import Tensor


class Tally:
    """Sums and counts by name, kept since the last log and since the round began.

    Attributes:
        round: since the round began, for a checkpoint.
    """

    def __init__(self) -> None:
        self._log: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.round: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        """Adds a sum over `count` items; both are scalars."""
        for sums in (self._log[name], self.round[name]):
            sums[0] += float(total)
            sums[1] += float(count)

    def since_last_log(self) -> dict[str, float]:
        """Means by name since this was last asked."""
        means, self._log = _means(self._log), defaultdict(lambda: [0.0, 0.0])
        return means

    def of_round(self) -> dict[str, float]:
        """Means by name, and the corpus tokens trained on, since the round began; begins the next."""
        means = _means(self.round) | {"tokens_trained": int(self.round["ce"][1])}
        self.round = defaultdict(lambda: [0.0, 0.0])
        return means


def _means(sums: dict[str, list[float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count}
