"""The plots of a report, for its page and as PNG, SVG and PDF files; without pyplot and its global state."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from bridle.report import data, pareto
from bridle.report.data import MOST_ROUNDS, RegulariserRound, Report, evenly_spaced
from bridle.report.labels import label_points
from bridle.report.measures import PERCENT, display_name
from bridle.report.pareto import Tradeoff, tradeoffs
from bridle.report.style import DPI, INK, PAPER, STYLE, MethodStyle, method_style, shown
from bridle.utils.files import atomic_file, writing
from bridle.utils.progress import track

CURVES = {
    "compliance": "rollouts that comply",
    "kl": "KL(q‖p), nats per prefix",
    "ce": "CE of the corpus, nats per token",
    "weight": "weight λ",
    "violation": "violation that λ is steered by",
}
"""Panels of the training curves, by the name in `Round` or `RegulariserRound`."""

PANEL = (3.8, 2.8)  # inches
LARGE = (7.6, 4.2)
DASHES: tuple[Literal["-", "--", "-."] | tuple[float, tuple[float, ...]], ...]
DASHES = ("-", "--", "-.", (0, (5, 1.5, 1, 1.5, 1, 1.5)))
TARGET: Literal[":"] = ":"  # of no regulariser


SAVED: dict[str, dict[str, Any]] = {
    "png": {"dpi": DPI},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
"""Formats of the files, with the options of `Figure.savefig` that give the same bytes at any time."""


@dataclass(frozen=True)
class Line:
    """A quantity of a training run, as pairs of round and figure."""

    method: str
    domain: str | None
    points: list[tuple[int, data.Figure]]


@rc_context(STYLE)
def tradeoff(report: Report) -> Figure | None:
    """Draws violation rate against the main utility, with 95% intervals and the Pareto front; None without data.

    Up and left is better: perplexity's axis is inverted. A target is a vertical line. The values of one knob are a
    curve; where there is one, the intervals are the rates' alone.
    """
    return _tradeoffs(report, tradeoffs(report)[:1], LARGE)


@rc_context(STYLE)
def other_tradeoffs(report: Report) -> Figure | None:
    """Draws the same for each further utility, as small multiples."""
    return _tradeoffs(report, tradeoffs(report)[1:], PANEL)


@rc_context(STYLE)
def further_constraints(report: Report) -> Figure | None:
    """Draws the main violation rate against that under each further constraint; None without one."""
    panels = pareto.further_constraints(report)
    return _tradeoffs(report, panels, LARGE if len(panels) == 1 else PANEL)


def _tradeoffs(report: Report, panels: list[Tradeoff], size: tuple[float, float]) -> Figure | None:
    if not panels:
        return None
    figure, axes = _panels(len(panels), size)
    targets = {
        reached.target
        for curve in report.curves
        for reached in curve.targets.values()
        if reached.mean_score_reached is None  # the axis is a rate
    }
    for ax, panel in zip(axes, panels, strict=True):
        _draw_tradeoff(ax, panel)
        for target in targets:
            ax.axvline(target, color=INK, linestyle=TARGET, linewidth=1, alpha=0.6, zorder=1)
        ax.set_xlabel(_violation_label(report, panel))
    front = Line2D([], [], color=INK, linestyle="--", linewidth=1, alpha=0.6, label="Pareto front")
    interval = Line2D([], [], color=INK, linewidth=1, label="95% interval")
    handles = [front, interval]
    if targets:
        handles.append(
            Line2D([], [], color=INK, linestyle=TARGET, linewidth=1, alpha=0.6, label="target of a regulariser")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.draw_without_rendering()  # labels need the final layout
    for ax, panel in zip(axes, panels, strict=True):
        label_points(ax, list(panel.points.values()), _labels(panel), _obstacles(ax, panel))
    return figure


@rc_context(STYLE)
def training_curves(report: Report) -> Figure | None:
    """Draws compliance with Wilson's interval, KL, CE and λ by round, one line per run; None without data.

    If λ follows a target, a further panel has the violation beside it.
    """
    panels = {name: lines for name in CURVES if (lines := list(_lines(report, name)))}
    if not panels:
        return None
    domains = dict.fromkeys(line.domain for lines in panels.values() for line in lines if line.domain is not None)
    dashes = dict(zip(domains, cycle(DASHES)))
    figure, axes = _panels(len(panels))
    for ax, (name, lines) in zip(axes, panels.items(), strict=True):
        _draw_lines(ax, lines, dashes)
        ax.set_ylabel(CURVES[name])
        if name == "violation":
            _draw_targets(ax, report)
    _set_scales(dict(zip(panels, axes, strict=True)), panels)
    handles = [_method_handle(method) for method in dict.fromkeys(curve.method for curve in report.curves)]
    handles += [
        Line2D([], [], color=INK, linestyle=dashes[name], label=f"regulariser of {shown(name)}") for name in domains
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    return figure


@rc_context(STYLE)
def reliability(report: Report) -> Figure | None:
    """Draws reliability diagrams of R, one panel per round; None without data.

    A marker's area grows with its bin's share of the prefixes; the legend has the seeds' ECE.
    """
    found = _reliabilities(report)
    if not found:
        return None
    drawn = evenly_spaced(sorted(found), MOST_ROUNDS)
    figure, axes = _panels(len(drawn), size=(3.7, 3.5))
    for ax, number in zip(axes, drawn, strict=True):
        _draw_reliability(ax, number, found[number])
    return figure


PLOTS: dict[str, Callable[[Report], Figure | None]] = {
    "tradeoff": tradeoff,
    "other_tradeoffs": other_tradeoffs,
    "further_constraints": further_constraints,
    "training_curves": training_curves,
    "reliability": reliability,
}


@rc_context(STYLE)
def draw_plots(report: Report) -> dict[str, Figure]:
    """Draws the plots that the report has data for, by name."""
    plots = track(PLOTS.items(), "drawing plots", len(PLOTS), "plots")
    figures = {name: figure for name, draw in plots if (figure := draw(report)) is not None}
    for figure in figures.values():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # else it is laid out again for the page and each file
    return figures


@rc_context(STYLE)
def write_plots(figures: Mapping[str, Figure], folder: Path) -> None:
    """Writes each plot as NAME.png (200 dpi), NAME.svg and NAME.pdf; the same report gives the same bytes.

    Raises:
        UserError: a file cannot be written.
    """
    for name, figure in track(figures.items(), "writing plots", len(figures), "plots"):
        for suffix, options in SAVED.items():
            path = folder / f"{name}.{suffix}"
            with writing(path), atomic_file(path) as temporary:
                figure.savefig(temporary, format=suffix, **options)


def _panels(n: int, size: tuple[float, float] = PANEL) -> tuple[Figure, list[Axes]]:
    """Creates a figure with n panels, three in a row, or four in a square."""
    columns = 2 if n == 4 else min(n, 3)
    rows = -(-n // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.3), layout=ConstrainedLayoutEngine(w_pad=0.1))
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in axes[n:]:
        spare.remove()
    return figure, axes[:n]


def _violation_label(report: Report, panel: Tradeoff) -> str:
    """Labels the axis, with the names of methods that were not measured."""
    assert report.main is not None, "without a main constraint there is no panel"
    label = f"violation rate on {shown(report.main.prompt_set)} ({shown(report.main.constraint)})"
    absent = [shown(name) for name in report.methods if name not in panel.methods]
    return "\n".join([label, *wrap(f"not measured: {', '.join(absent)}", 60)]) if absent else label


def _utility_label(panel: Tradeoff) -> str:
    name, policy = shown(display_name(panel.utility.on)), panel.utility.within
    if policy is not None:
        return f"violation rate on {name} ({shown(policy)}, inverted)"
    return f"accuracy on {name}" if panel.more_is_better else f"perplexity of {name} (inverted)"


def _draw_tradeoff(ax: Axes, panel: Tradeoff) -> None:
    points, curves = panel.points, panel.sweeps
    ax.margins(0.16)
    for family, names in curves.items():
        ax.plot(*zip(*(points[name] for name in names), strict=True), color=method_style(family).color, linewidth=1)
    ax.plot(*zip(*panel.front.values(), strict=True), color=INK, linestyle="--", linewidth=1, alpha=0.6, zorder=2)
    for name, point in points.items():
        ax.plot(*point, linestyle="", zorder=3, **method_style(name).line)
    for name, (x, y) in panel.methods.items():
        # Beside curves the utility's interval, which all methods have from the same texts, would hide them.
        color, alpha, up = method_style(name).color, 0.4 if curves else 1, None if curves else _bar(y)
        ax.errorbar(x.known, y.known, up, _bar(x), fmt="none", ecolor=color, elinewidth=1, alpha=alpha)
    ax.set_xlim(left=max(ax.get_xlim()[0], -0.03 * ax.get_xlim()[1]))  # rates are not negative
    ax.set_ylabel(_utility_label(panel))
    ax.xaxis.set_major_formatter(_percent)
    if panel.utility.unit == PERCENT:
        ax.yaxis.set_major_formatter(_percent)
    if not panel.more_is_better:
        ax.invert_yaxis()
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
    ax.annotate(
        "better", (0.015, 0.985), (12, -13), "axes fraction", "offset points", arrow, style="italic", fontsize=8
    )


def _labels(panel: Tradeoff) -> list[str]:
    """The methods' names; along a curve the first is whole, and the others are its knob's values alone."""
    short = {name: name[name.rindex("@") :] for names in panel.sweeps.values() for name in names[1:] if "@" in name}
    return [short.get(name) or shown(name) for name in panel.methods]


def _percent(share: float, _: float) -> str:
    return f"{100 * share:.6g}%"


def _bar(figure: data.Figure) -> list[list[float]] | None:
    """The interval's reach below and above the value, for `Axes.errorbar`."""
    if figure.low is None or figure.high is None:
        return None
    return [[max(0.0, figure.known - figure.low)], [max(0.0, figure.high - figure.known)]]


def _obstacles(ax: Axes, panel: Tradeoff) -> list[Bbox]:
    """Boxes in pixels around the arrow, the intervals and the front."""
    boxes = [Bbox.from_extents(ax.bbox.x0, ax.bbox.y1 - 25, ax.bbox.x0 + 65, ax.bbox.y1)]
    for x, y in panel.methods.values():
        across = [(x.known if end is None else end, y.known) for end in (x.low, x.high)]
        along = [(x.known, y.known if end is None else end) for end in (y.low, y.high)]
        boxes += [Bbox(ax.transData.transform(ends)).padded(1) for ends in (across, along)]
    front = ax.transData.transform(list(panel.front.values()))
    for start, end in pairwise(front):
        boxes += [Bbox([place, place]).padded(3) for place in np.linspace(start, end, 30)]
    return boxes


def _lines(report: Report, name: str) -> Iterator[Line]:
    """Yields the lines of a quantity, with intervals if there are any: of the run for CE, else of each domain."""
    for curve in report.curves:
        points: dict[str | None, list[tuple[int, data.Figure]]] = defaultdict(list)
        for found in curve.rounds:
            sources: Mapping[Any, object] = {None: found} if name == "ce" else found.regularisers
            for domain, source in sources.items():
                value, low, high = (getattr(source, name + end, None) for end in ("", "_low", "_high"))
                if value is not None:
                    points[domain].append((found.number, data.Figure(value, low, high, n=1)))
        yield from (Line(curve.method, domain, measured) for domain, measured in points.items())


def _draw_lines(ax: Axes, lines: list[Line], dashes: dict[str, Any]) -> None:
    step = min(0.04, 0.5 / len(lines))  # in rounds, so that the intervals of several runs do not overlap
    for index, line in enumerate(lines):
        shift = step * (index - (len(lines) - 1) / 2) if any(_bar(figure) for _, figure in line.points) else 0.0
        rounds, values = [number + shift for number, _ in line.points], [figure.known for _, figure in line.points]
        style = {**method_style(line.method).line, "markersize": 4.5, "linestyle": dashes.get(line.domain or "", "-")}
        ax.plot(rounds, values, linewidth=1.1, **style)
        for place, (_, figure) in zip(rounds, line.points, strict=True):
            ax.errorbar(place, figure.known, yerr=_bar(figure), color=style["color"], elinewidth=0.9)
    numbers = [number for line in lines for number, _ in line.points]
    ax.set_xlim(min(numbers) - 0.4, max(numbers) + 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("round")


def _draw_targets(ax: Axes, report: Report) -> None:
    ends = []
    for line in _lines(report, "target"):
        rounds, values = [number for number, _ in line.points], [figure.known for _, figure in line.points]
        ax.plot(rounds, values, linewidth=1.1, linestyle=TARGET, color=method_style(line.method).color)
        ends.append((rounds[-1], values[-1]))
    for end in ends[:1]:  # the same label at every line would only cover it
        ax.annotate("target", end, (0, 3), textcoords="offset points", ha="right", fontsize=8)
    ax.set_ylim(bottom=0)


def _set_scales(axes: dict[str, Axes], panels: dict[str, list[Line]]) -> None:
    for name in {"compliance", "violation"} & axes.keys():
        axes[name].yaxis.set_major_formatter(_percent)
    if "weight" in axes:
        axes["weight"].set_ylim(bottom=0)
    values = [figure.known for line in panels.get("kl", []) for _, figure in line.points]
    # The KLs of a retained and of a constrained domain can differ by a factor of a hundred.
    if values and 0 < 10 * min(values) < max(values):
        axes["kl"].set_yscale("log")
        axes["kl"].yaxis.set_major_formatter("{x:g}")


def _method_handle(method: str) -> Line2D:
    return Line2D([], [], linestyle="", label=shown(method), **method_style(method).line)


def _reliabilities(report: Report) -> dict[int, dict[tuple[str, str], list[RegulariserRound]]]:
    """The seeds' figures by round, method and domain."""
    rounds: dict[int, dict[tuple[str, str], list[RegulariserRound]]] = defaultdict(lambda: defaultdict(list))
    for curve in report.curves:
        for found in curve.rounds:
            for domain, regulariser in found.regularisers.items():
                if regulariser.r_reliability:
                    rounds[found.number][curve.method, domain].append(regulariser)
    return rounds


def _draw_reliability(ax: Axes, number: int, found: dict[tuple[str, str], list[RegulariserRound]]) -> None:
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", zorder=1)
    handles = []
    for (method, domain), regularisers in found.items():
        style = method_style(method)
        for regulariser in regularisers:
            _draw_bins(ax, style, regulariser.r_reliability)
        errors = ", ".join(f"{r.r_ece:.3f}" for r in regularisers if r.r_ece is not None)
        handles.append(_method_handle(method))
        handles[-1].set_label(f"{shown(method)} on {shown(domain)}\nECE {errors or 'missing'}")
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", title=f"round {number}")
    ax.set(xlabel="R's mean prediction", ylabel="share that complied")
    ax.legend(handles=handles, loc="lower right", fontsize=7.5, handletextpad=0.1)


def _draw_bins(ax: Axes, style: MethodStyle, bins: list[tuple[float, float, int]]) -> None:
    predicted, observed, counts = np.array(bins).T
    line = style.line | {"marker": ""}
    ax.plot(predicted, observed, linewidth=0.9, alpha=0.7, zorder=2, **line)
    face = style.color if style.filled else PAPER
    areas = 8 + 240 * counts / counts.sum()
    ax.scatter(predicted, observed, s=areas, c=face, marker=style.marker, edgecolors=style.color, alpha=0.85, zorder=3)
