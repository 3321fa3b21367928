"""Places labels beside the points of a scatter plot so that they cover neither each other nor the points."""

from collections.abc import Iterable, Sequence
from math import hypot

import numpy as np
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
    centres = np.array([axes.transData.transform(point) for point in points])  # [n, 2]
    others, labels = _extents(obstacles), _extents(())
    shifts, ways = _places()
    # From left to right: in another order the lines would cross.
    for centre, point, text in sorted(zip(map(tuple, centres), points, texts, strict=True)):
        margins = np.where((centres == centre).all(1), MARKER, OTHERS)[:, None] * pixels
        markers = np.hstack([centres - margins, centres + margins])
        size = _size(axes, text)
        low = centre + shifts * pixels + (ways - 1) / 2 * size
        boxes = np.hstack([low, low + size])
        covered = _common(boxes, np.vstack([others, markers])).sum(1)
        outside = size.prod() - _common(boxes, _extents([axes.bbox]))[:, 0]
        distances = np.hypot(*shifts.T)
        cost = covered + 10 * outside + LABEL * _common(boxes, labels).sum(1) + FAR * distances
        best = int(cost.argmin())
        _write(axes, point, shifts[best], ways[best], text)
        labels = np.vstack([labels, boxes[best]])


def _extents(boxes: Iterable[Bbox]) -> np.ndarray:
    """[boxes, 4]: the lower left and the upper right corner of each, in pixels."""
    return np.array([box.extents for box in boxes]).reshape(-1, 4)


def _places() -> tuple[np.ndarray, np.ndarray]:
    """Shifts from the marker, in points, and their directions, in order of preference: [places, 2] each."""
    ways = np.array(DIRECTIONS)
    steps = ways / np.linalg.norm(ways, axis=1, keepdims=True)
    return np.concatenate([distance * steps for distance in DISTANCES]), np.tile(ways, (len(DISTANCES), 1))


def _common(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Square pixels that each box shares with each other: [boxes, 4], [others, 4] -> [boxes, others]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(-1)


def _size(axes: Axes, text: str) -> np.ndarray:
    """[2]: width and height of a label, in pixels."""
    probe = axes.text(0, 0, text, fontsize=8)
    extent = probe.get_window_extent()
    probe.remove()
    return np.array([extent.width, extent.height])


def _write(axes: Axes, point: Point, shift: np.ndarray, way: np.ndarray, text: str) -> None:
    nearest = (1 - way[0]) / 2, (1 - way[1]) / 2  # the line starts from this part of the label
    lead = {"arrowstyle": "-", "color": INK, "alpha": 0.75, "linewidth": 0.7, "shrinkB": 3, "relpos": nearest}
    label = axes.annotate(
        text,
        point,
        tuple(shift),
        textcoords="offset points",
        fontsize=8,
        ha=HORIZONTAL[int(way[0])],
        va=VERTICAL[int(way[1])],
        arrowprops=lead if hypot(*shift) > LED_FROM else None,
    )
    label.set_in_layout(False)
