"""Matplotlib figures as SVG that stands inline in a page and takes its colours from the page, in light and in dark."""

from __future__ import annotations

import logging
import re
import warnings
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Colours that stand for the page's own: matplotlib draws with the first, the page reads the second.
INK, MUTED, GRID, BEFORE, AFTER, ACCENT, PAGE = (f"#01020{n}" for n in range(3, 10))
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", BEFORE: "--before", AFTER: "--after", ACCENT: "--accent",
    PAGE: "--panel",
}  # fmt: skip
FONT = 12  # in the figure's own pixels; figures are WIDTH wide and shown at about that size
WIDTH = 420
_SETTINGS = {
    "svg.fonttype": "none", "font.size": FONT, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.linewidth": 0.8,
    "grid.color": GRID, "grid.linewidth": 0.7, "axes.grid": True, "axes.axisbelow": True, "axes.titlesize": FONT,
    "axes.titlelocation": "left", "axes.titlecolor": MUTED, "axes.labelsize": FONT, "xtick.labelsize": FONT,
    "ytick.labelsize": FONT, "legend.fontsize": FONT, "legend.frameon": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 72, "savefig.dpi": 72,
    "path.simplify": True, "axes.unicode_minus": True, "text.parse_math": False,
}  # fmt: skip


def settings() -> dict[Any, Any]:
    """Matplotlib settings for every figure of the report; the user's own matplotlibrc has no say."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    return {key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith("backend")} | _SETTINGS


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure of ``width`` × ``height`` of its own pixels; call it within ``mpl.rc_context(settings())``."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def quiet_axis(axes: Axes, *, grid: str) -> None:
    """Grid lines along one axis only ("x" or "y"), no tick marks."""
    axes.grid(False)
    axes.grid(True, axis=grid)  # type: ignore[arg-type]
    axes.tick_params(length=0)


def inline(figure: Figure, key: str, label: str) -> str:
    """The figure as one ``<svg>`` element: every id begins with ``key``, colours and fonts are the page's.

    ``label``: what a screen reader says in its place; it is escaped here.
    """
    text = StringIO()
    with warnings.catch_warnings():  # glyphs that matplotlib's font lacks are drawn by the browser's
        warnings.simplefilter("ignore", UserWarning)
        with mpl.rc_context({"svg.hashsalt": key, "svg.fonttype": "none"}):
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _adopt(text.getvalue(), key, label)


def _adopt(svg: str, key: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"font-family:[^;\"]*;?", "", svg)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{key}-\1)", svg)
    svg = re.sub(r'href="#([^"]*)"', rf'href="#{key}-\1"', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    opening = f'<svg class="plot" viewBox="{box[1]}" role="img" aria-label="{_escape(label)}" xmlns="http://www.w3.org/2000/svg">'
    return opening + svg[svg.index(">") + 1 :].strip()


def _escape(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))
