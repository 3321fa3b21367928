"""Labels beside the points of a scatter plot, which cover neither each other nor the points."""

from collections.abc import Iterable, Iterator, Sequence
from math import hypot

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from bridle.report.style import INK

Point = tuple[float, float]

DISTANCES = (8.0, 13.0, 18.0, 26.0, 36.0, 48.0)  # points from the marker to its label
LED_FROM = 12.0  # from this distance on a thin line leads from the label to its marker
FAR = 4.0  # square pixels that a label may cover to be one point nearer: one thin line, not another label
MARKER = 5.0  # half the side of a marker with room about it, in points
OTHERS = 11.0  # the same for the other markers: beside one of them a label would seem to be its
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
HORIZONTAL = {1: "left", 0: "center", -1: "right"}
VERTICAL = {1: "bottom", 0: "center", -1: "top"}


def label_points(axes: Axes, points: Sequence[Point], texts: Sequence[str], obstacles: Iterable[Bbox] = ()) -> None:
    """Writes each text beside its point, near by and where it covers little.

    The limits and the layout of the axes have to be final.

    Args:
        axes: where to write.
        points: [n] data coordinates.
        texts: [n] labels.
        obstacles: boxes in pixels that labels keep clear of, beside the markers.
    """
    pixels = axes.figure.dpi / 72
    centres = [(float(x), float(y)) for x, y in map(axes.transData.transform, points)]
    taken = list(obstacles)
    # From left to right, since lines to labels placed in another order would cross.
    for centre, point, text in sorted(zip(centres, points, texts, strict=True)):
        markers = [Bbox([c, c]).padded((MARKER if c == centre else OTHERS) * pixels) for c in centres]
        width, height = _size(axes, text)
        places = [(shift, way, _box(centre, shift, way, width, height, pixels)) for shift, way in _places()]
        shift, way, box = min(
            places, key=lambda place: _covered(place[2], taken + markers, axes.bbox) + FAR * hypot(*place[0])
        )
        _write(axes, point, shift, way, text)
        taken.append(box)


def _places() -> Iterator[tuple[Point, tuple[int, int]]]:
    """Shifts from the marker in points with their directions; of equally good places the first is taken."""
    for distance in DISTANCES:
        for x, y in DIRECTIONS:
            length = distance / (x * x + y * y) ** 0.5
            yield (x * length, y * length), (x, y)


def _box(centre: Point, shift: Point, way: tuple[int, int], width: float, height: float, pixels: float) -> Bbox:
    left = centre[0] + shift[0] * pixels + (way[0] - 1) / 2 * width
    bottom = centre[1] + shift[1] * pixels + (way[1] - 1) / 2 * height
    return Bbox.from_bounds(left, bottom, width, height)


def _covered(box: Bbox, taken: Iterable[Bbox], inside: Bbox) -> float:
    """Square pixels of the box that something else has; what lies outside, across an axis, counts tenfold."""
    return sum(_common(box, other) for other in taken) + 10 * (box.width * box.height - _common(box, inside))


def _common(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return both.width * both.height if both else 0.0


def _size(axes: Axes, text: str) -> tuple[float, float]:
    probe = axes.text(0, 0, text, fontsize=8)
    extent = probe.get_window_extent()
    probe.remove()
    return extent.width, extent.height


def _write(axes: Axes, point: Point, shift: Point, way: tuple[int, int], text: str) -> None:
    nearest = (1 - way[0]) / 2, (1 - way[1]) / 2  # the part of the label that the line starts from
    lead = {"arrowstyle": "-", "color": INK, "alpha": 0.75, "linewidth": 0.7, "shrinkB": 3, "relpos": nearest}
    label = axes.annotate(
        text,
        point,
        shift,
        textcoords="offset points",
        fontsize=8,
        ha=HORIZONTAL[way[0]],
        va=VERTICAL[way[1]],
        arrowprops=lead if hypot(*shift) > LED_FROM else None,
    )
    label.set_in_layout(False)
