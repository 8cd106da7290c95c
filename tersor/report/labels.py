"""Labels beside points, placed so that they cover neither points nor intervals nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from tersor.report.svg import INK, MUTED

# Offsets from the point, in pixels: near ones first, beside before above.
_OFFSETS = [
    (dx * reach, dy * reach)
    for reach in (9, 16, 26, 42, 62)
    for dx, dy in ((1, 0.8), (1, -0.8), (-1, 0.8), (-1, -0.8), (0.3, 1), (0.3, -1), (-0.3, 1), (-0.3, -1))
]
_LEADER = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
_MARK = 6  # half a marker's width with its edge, in pixels
_BAR = 3.5  # half an interval's cap


@dataclass(frozen=True)
class Point:
    """A labelled point with its interval [``low``, ``high``], in the axes' data coordinates; [``left``, ``right``] is
    that across, None where there is none."""

    x: float
    y: float
    low: float
    high: float
    text: str
    left: float | None = None
    right: float | None = None


def place_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's text near it, at the first offset where it covers nothing and stays inside the axes.

    Greedy, in the order given; where no offset is free, the one that covers least is taken.
    """
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg), "extents are measured by Agg"
    canvas.draw()
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [box for point in points for box in _obstacles(axes, point)]
    for point in points:
        costs: dict[tuple[float, float], float] = {}
        for offset in _OFFSETS:
            label = _write(axes, point, offset)
            box = label.get_window_extent(renderer).padded(1.5)
            label.remove()
            costs[offset] = sum(_overlap(box, other) for other in taken) + 4 * _outside(box, frame)
            if costs[offset] == 0:
                break
        label = _write(axes, point, min(costs, key=lambda offset: costs[offset]))
        label.set_in_layout(False)
        taken.append(label.get_window_extent(renderer).padded(1.5))


def _obstacles(axes: Axes, point: Point) -> tuple[Bbox, ...]:
    x, y = axes.transData.transform((point.x, point.y))
    low, high = (axes.transData.transform((point.x, end))[1] for end in (point.low, point.high))
    mark = Bbox.from_extents(x - _MARK, y - _MARK, x + _MARK, y + _MARK)
    upright = Bbox.from_extents(x - _BAR, low, x + _BAR, high)
    if point.left is None or point.right is None:
        return mark, upright
    left, right = (axes.transData.transform((end, point.y))[0] for end in (point.left, point.right))
    return mark, upright, Bbox.from_extents(left, y - _BAR, right, y + _BAR)


def _write(axes: Axes, point: Point, offset: tuple[float, float]) -> Annotation:
    far = max(map(abs, offset)) > 12
    return axes.annotate(
        point.text, (point.x, point.y), offset, textcoords="offset points", color=INK, va="center",
        ha="left" if offset[0] > 0 else "right", arrowprops=_LEADER if far else None,
    )  # fmt: skip


def _overlap(first: Bbox, second: Bbox) -> float:
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Bbox, frame: Bbox) -> float:
    beyond = (frame.x0 - box.x0, box.x1 - frame.x1, frame.y0 - box.y0, box.y1 - frame.y1)
    return sum(max(0.0, distance) for distance in beyond)
