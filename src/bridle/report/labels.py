"""Places labels beside the points of a scatter plot so that they cover neither each other nor the points."""

from collections.abc import Iterable, Iterator, Sequence
from math import hypot

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from bridle.report.style import INK

Point = tuple[float, float]

DISTANCES = (8.0, 13.0, 18.0, 26.0, 36.0, 48.0, 64.0, 84.0, 110.0)  # points from the marker to its label
LED_FROM = 12.0  # from this distance a thin line joins label and marker
FAR = 4.0  # square pixels: the cost of one point of distance; a label may cross a thin line
LABEL = 1000.0  # the cost of a square pixel of another label, which no label may cover
MARKER = 5.0  # half the side of a marker with its margin, in points
OTHERS = 11.0  # the same for other points' markers, which a label must not seem to belong to
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
HORIZONTAL = {1: "left", 0: "center", -1: "right"}
VERTICAL = {1: "bottom", 0: "center", -1: "top"}


def label_points(axes: Axes, points: Sequence[Point], texts: Sequence[str], obstacles: Iterable[Bbox] = ()) -> None:
    """Writes each text near its point where it covers least; limits and layout of the axes must be final.

    Args:
        axes: axes with the points.
        points: [n] data coordinates.
        texts: [n] labels.
        obstacles: boxes in pixels to avoid besides the markers.
    """
    pixels = axes.figure.dpi / 72
    centres = [(float(x), float(y)) for x, y in map(axes.transData.transform, points)]
    obstacles, labels = list(obstacles), list[Bbox]()
    # From left to right: in another order the lines would cross.
    for centre, point, text in sorted(zip(centres, points, texts, strict=True)):
        markers = [Bbox([c, c]).padded((MARKER if c == centre else OTHERS) * pixels) for c in centres]
        width, height = _size(axes, text)
        places = [(shift, way, _box(centre, shift, way, width, height, pixels)) for shift, way in _places()]

        def cost(place: tuple[Point, tuple[int, int], Bbox], markers: list[Bbox] = markers) -> float:
            shift, _, box = place
            covered = _covered(box, [*obstacles, *markers], axes.bbox)
            return covered + LABEL * sum(_common(box, other) for other in labels) + FAR * hypot(*shift)

        shift, way, box = min(places, key=cost)
        _write(axes, point, shift, way, text)
        labels.append(box)


def _places() -> Iterator[tuple[Point, tuple[int, int]]]:
    """Yields shifts from the marker, in points, with their directions, in order of preference."""
    for distance in DISTANCES:
        for x, y in DIRECTIONS:
            length = distance / (x * x + y * y) ** 0.5
            yield (x * length, y * length), (x, y)


def _box(centre: Point, shift: Point, way: tuple[int, int], width: float, height: float, pixels: float) -> Bbox:
    left = centre[0] + shift[0] * pixels + (way[0] - 1) / 2 * width
    bottom = centre[1] + shift[1] * pixels + (way[1] - 1) / 2 * height
    return Bbox.from_bounds(left, bottom, width, height)


def _covered(box: Bbox, taken: Iterable[Bbox], inside: Bbox) -> float:
    """Square pixels of the box that are taken, plus ten times those outside the axes."""
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
    nearest = (1 - way[0]) / 2, (1 - way[1]) / 2  # the line starts from this part of the label
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
