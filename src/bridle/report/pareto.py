"""The trade-off of violation rate and utility, and its Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass

from bridle.report.data import Figure, Report
from bridle.report.measures import Measure, main_violation, measures, overview_tasks
from bridle.report.style import VALUE

ADAPTIVE = "constrained-adaptive"


@dataclass(frozen=True)
class Tradeoff:
    """The main violation rate against a utility, as pairs of known figures by method."""

    utility: Measure
    methods: dict[str, tuple[Figure, Figure]]

    @property
    def more_is_better(self) -> bool:
        """Whether a higher utility is better; false for perplexity."""
        return self.utility.arrow == "↑"

    @property
    def points(self) -> dict[str, tuple[float, float]]:
        """Both values by method."""
        return {name: (violation.known, utility.known) for name, (violation, utility) in self.methods.items()}

    @property
    def sweeps(self) -> dict[str, list[str]]:
        """Names of the methods that differ in a knob's value alone, as `wise-ft@0.5`, in the order of the values.

        Of `interleave@gap@0.5` the method is `interleave@gap`. `constrained-adaptive` itself has the factor 1.
        """
        swept = sorted(
            (match[1], float(match[2]), name)
            for name in self.methods
            if (match := VALUE.match(f"{name}@1" if name == ADAPTIVE else name))
        )
        families = {family: [name for one, _, name in swept if one == family] for family, *_ in swept}
        return {family: names for family, names in families.items() if len(names) > 1}

    @property
    def front(self) -> dict[str, tuple[float, float]]:
        """The points that no other dominates, by rising violation rate."""
        sign = -1 if self.more_is_better else 1
        points = list(self.points.items())
        return dict(points[index] for index in pareto_front([(x, sign * y) for _, (x, y) in points]))


def tradeoffs(report: Report) -> list[Tradeoff]:
    """Trade-offs that any method has: each held-out set's perplexity, the main one first, then the overview's tasks.

    Without those, single tasks take their place.
    """
    main = report.main
    if main is None:
        return []
    held_out = sorted(measures(report, "perplexity"), key=lambda measure: measure.on != main.held_out)
    tasks = measures(report, "tasks")
    summary = [task for task in tasks if task.on in overview_tasks(report)]
    violation = main_violation(main)
    found = [Tradeoff(utility, _pairs(report, violation, utility)) for utility in [*held_out, *(summary or tasks)]]
    return [one for one in found if one.methods]


def further_constraints(report: Report) -> list[Tradeoff]:
    """The main violation rate against that under each further constraint on the same prompts.

    The training oracle is left out: its rates stand beside the main ones.
    """
    main = report.main
    if main is None:
        return []
    first = main_violation(main)
    further = [
        one
        for one in measures(report, "violation")
        if one.on == main.prompt_set and one.within not in (main.constraint, main.trained_on)
    ]
    found = [Tradeoff(other, _pairs(report, first, other)) for other in further]
    return [one for one in found if one.methods]


def _pairs(report: Report, first: Measure, second: Measure) -> dict[str, tuple[Figure, Figure]]:
    pairs = {}
    for name, method in report.methods.items():
        one, other = first.of(method), second.of(method)
        if one and other and None not in (one.value, other.value):
            pairs[name] = one, other
    return pairs


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates, by rising first coordinate; lower is better in both.

    A point dominates another if it is as good in both coordinates and better in one.
    """

    def dominated(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    return sorted((i for i, point in enumerate(points) if not dominated(point)), key=lambda i: points[i])
