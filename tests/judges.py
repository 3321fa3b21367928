"""A judge in the place of a language model."""

from bridle.evaluation.judges import Verdict


class FunctionJudge:
    """A judge that is a function of the two texts; it remembers what it was asked."""

    name = "function"

    def __init__(self, function):
        self.function, self.asked = function, []

    def compare(self, items):
        self.asked += items
        verdicts = [self.function(item.first, item.second) for item in items]
        return [verdict if isinstance(verdict, Verdict) else Verdict(verdict) for verdict in verdicts]
