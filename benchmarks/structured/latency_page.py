"""The page of accuracy against latency, and its plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.structured.page import DOCS, table, write
from tersor.core.measurement import Measurement

NAME = "structured-latency"
FASTER, POINTS = 3.0, 1.0  # the goal: so many times faster, at most so many points lost
PRUNED, WHOLE, MUTED = "#1f6fb4", "#444444", "#999999"


@dataclass(frozen=True)
class Row:
    """A network: times fewer MACs; accuracy; points lost to the original, and to the original trained on; latency."""

    name: str
    ratio: float
    accuracy: Measurement
    drop: Measurement
    fair_drop: Measurement
    latency: Measurement
    speedup: Measurement | None

    @property
    def pruned(self) -> bool:
        """Whether channels went."""
        return not self.name.startswith("original")


def write_page(rows: Sequence[Row], epochs: int, lr: float, batch: int) -> None:
    """docs/benchmarks/structured-latency.md and .svg; the first row is the original."""
    draw(rows, batch).savefig(DOCS / f"{NAME}.svg", metadata={"Date": None})
    header = ["network", "MACs", "accuracy", "points lost", "… to the original trained on"]
    header += [f"ms, batch {batch}", "faster"]
    body = "\n\n".join([
        "The built-in residual network (32, 64 and 128 channels) loses the given fraction of the channels of every "
        f"layer, then trains for {epochs} epochs (SGD, peak learning rate {lr:g}); the last epoch counts. Accuracy is "
        f"of the ONNX file on the 10,000 test images; latency is ONNX Runtime's on the CPU in batches of {batch}, all "
        "files in turns, the median over sittings. 95 % intervals in brackets; points lost are paired image by image.",
        f"![Accuracy against latency]({NAME}.svg)",
        table(header, [_cells(row) for row in rows]),
        _verdict(rows),
    ])  # fmt: skip
    title = "Fashion-MNIST: accuracy against latency, from channels alone"
    write(NAME, title, body, "benchmarks/structured/latency.py")


def _verdict(rows: Sequence[Row]) -> str:
    pruned = [(row, row.speedup.value) for row in rows if row.pruned and row.speedup is not None]
    good = [(row, faster) for row, faster in pruned if row.drop.value <= POINTS]
    if not good:
        return f"None loses at most {POINTS:g} point."
    best, faster = max(good, key=lambda pair: pair[1])
    reached = "reached" if faster >= FASTER else "missed"
    return (
        f"Fastest with at most {POINTS:g} point lost: {best.name}, {faster:.2f}× faster, {best.drop.value:.2f} points "
        f"lost. The goal of {FASTER:g}× is {reached}."
    )


def _cells(row: Row) -> list[str]:
    accuracy, latency = row.accuracy, row.latency
    return [
        row.name,
        f"{row.ratio:.2f}× fewer" if row.ratio != 1 else "1",
        f"{100 * accuracy.value:.2f} % ({_range(accuracy, 100)})",
        f"{row.drop.value:.2f} ({_range(row.drop)})" if row.speedup else "",
        f"{row.fair_drop.value:.2f} ({_range(row.fair_drop)})" if row.pruned else "",
        f"{latency.value:.2f} ({_range(latency)})",
        f"{row.speedup.value:.2f}× ({_range(row.speedup)})" if row.speedup else "1",
    ]


def _range(found: Measurement, scale: float = 1) -> str:
    low, high = _ends(found)
    return f"{scale * low:.2f} to {scale * high:.2f}"


def _ends(found: Measurement) -> tuple[float, float]:
    assert found.low is not None and found.high is not None, "ten thousand images and six sittings bound it"
    return found.low, found.high


def draw(rows: Sequence[Row], batch: int) -> Figure:
    """Accuracy with its interval over latency with its interval, a point for each network."""
    with mpl.rc_context({"svg.hashsalt": NAME, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4.2), layout="constrained", facecolor="white")
        axes = figure.subplots()
        original = rows[0]
        floor = 100 * original.accuracy.value - POINTS
        goal = original.latency.value / FASTER
        axes.axhline(floor, color=MUTED, linewidth=0.8, linestyle="--")
        axes.axvline(goal, color=MUTED, linewidth=0.8, linestyle="--")
        for row in rows:
            _point(axes, row)
        axes.set_xlim(left=0)
        axes.annotate(f"{POINTS:g} point below the original", (axes.get_xlim()[1], floor), (0, -4),
                      textcoords="offset points", ha="right", va="top", color=MUTED, fontsize=8)  # fmt: skip
        axes.annotate(f"{FASTER:g}× faster", (goal, axes.get_ylim()[0]), (4, 4), textcoords="offset points",
                      color=MUTED, fontsize=8)  # fmt: skip
        axes.text(0.98, 0.04, "blue: fraction of channels removed from every layer", transform=axes.transAxes,
                  ha="right", color=PRUNED, fontsize=9)  # fmt: skip
        axes.set_xlabel(f"ONNX Runtime latency, batch {batch} (ms)")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(True, color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def _point(axes: Axes, row: Row) -> None:
    x, y = row.latency.value, 100 * row.accuracy.value
    (left, right), (low, high) = _ends(row.latency), _ends(row.accuracy)
    colour = PRUNED if row.pruned else WHOLE
    axes.errorbar(
        [x], [y], xerr=[[x - left], [right - x]], yerr=[[y - 100 * low], [100 * high - y]], fmt="o", color=colour,
        markersize=5, elinewidth=1, capsize=2,
    )  # fmt: skip
    text, side = row.name.replace(" of channels removed", ""), 1 if row.pruned else -1
    axes.annotate(
        text, (x, y), (7 * side, -11), textcoords="offset points", ha="left" if side > 0 else "right", color=colour,
        fontsize=9,
    )  # fmt: skip
