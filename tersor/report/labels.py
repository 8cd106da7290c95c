"""Labels beside points, placed so that they cover neither points nor each other."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from tersor.report.svg import INK, MUTED

_NEAR, _FAR = 9.0, 26.0
_OFFSETS = [
    (dx * reach, dy * reach)
    for reach in (_NEAR, 1.8 * _NEAR, _FAR, 1.6 * _FAR, 2.4 * _FAR)
    for dx, dy in ((1, 0.8), (1, -0.8), (-1, 0.8), (-1, -0.8), (0.3, 1), (0.3, -1), (-0.3, 1), (-0.3, -1))
]


def place_labels(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's text near it: the first of a spiral of offsets at which it covers nothing and stays inside.

    Greedy, in the order given; where no offset is free, the one that covers least is taken.
    """
    figure = axes.figure
    figure.canvas.draw()
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    marks = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in centres]
    marks += [bar.get_window_extent(renderer) for bar in axes.collections]
    taken: list[Bbox] = []
    for x, y, text in points:
        best: tuple[float, tuple[float, float]] | None = None
        for dx, dy in _OFFSETS:
            label = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=_side(dx), va="center")
            box = label.get_window_extent(renderer).padded(1.5)
            label.remove()
            cost = sum(_overlap(box, other) for other in (*marks, *taken)) + 4 * _outside(box, frame)
            if best is None or cost < best[0]:
                best = cost, (dx, dy)
            if cost == 0:
                break
        assert best is not None
        dx, dy = best[1]
        leader = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
        arrow = leader if max(abs(dx), abs(dy)) > 12 else None
        label = axes.annotate(
            text, (x, y), (dx, dy), textcoords="offset points", ha=_side(dx), va="center", color=INK, arrowprops=arrow
        )
        label.set_in_layout(False)
        taken.append(label.get_window_extent(renderer).padded(1.5))


def _side(dx: float) -> str:
    return "left" if dx > 0 else "right"


def _overlap(first: Bbox, second: Bbox) -> float:
    common = Bbox.intersection(first, second)
    return 0.0 if common is None else common.width * common.height + 0.01


def _outside(box: Bbox, frame: Bbox) -> float:
    beyond = (frame.x0 - box.x0, box.x1 - frame.x1, frame.y0 - box.y0, box.y1 - frame.y1)
    return sum(max(0.0, distance) for distance in beyond)
