"""Differences with their intervals below one another, beside a line at zero."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl

from tersor.core.measurement import Measurement
from tersor.report.format import both_of, scale_of, shorten
from tersor.report.plots import MOST_LAYERS, Plot, errors, name_rows
from tersor.report.svg import ACCENT, AFTER, MUTED, inline, new_figure, quiet_axis, settings


@mpl.rc_context(settings())
def forest(
    key: str, title: str, caption: str, rows: Sequence[tuple[str, Measurement]], *, limit: float | None = None,
    line: float = 0.0, hint: str = "right of the line is worse",
) -> Plot | None:  # fmt: skip
    """A dot with its interval for each (name, difference), in the order given; None without rows.

    ``limit``: drawn as a dashed line, in the measurements' unit (``caption`` says what it holds for); ``line``: where
    there is no difference; ``hint``: what is right of it. Of very many rows the first.
    """
    shown = rows[:MOST_LAYERS]
    if not shown:
        return None
    found = [measured for _, measured in shown]
    scale = scale_of(max((abs(m.value) for m in found), key=float), found[0].unit)
    values = [m.value * scale.factor for m in found]
    figure = new_figure(52 + 21 * len(shown))
    axes = figure.subplots()
    places = list(range(len(shown)))
    axes.axvline(line * scale.factor, color=MUTED, linewidth=1, zorder=1)
    if limit is not None:
        axes.axvline(limit * scale.factor, color=ACCENT, linewidth=1.2, linestyle=(0, (3, 2)), zorder=1)
    axes.errorbar(
        values, places, xerr=errors(found, scale.factor), fmt="none", ecolor=AFTER, elinewidth=1.4, capsize=2.5
    )
    axes.plot(values, places, "o", markersize=6.5, color=AFTER, markeredgewidth=0, zorder=3)
    name_rows(axes, [shorten(name, 24) for name, _ in shown])
    quiet_axis(axes, grid="x")
    axes.margins(x=0.05)
    axes.set_xlabel(f"{scale.suffix.strip() or found[0].unit}; {hint}")
    told = "; ".join(f"{name} {both_of(measured)}" for name, measured in shown)
    left_out = len(rows) - len(shown)
    more = f" The first {len(shown)}; {left_out} more are in the table." if left_out else ""
    return Plot(key, title, f"{caption}{more}", inline(figure, key, f"{title}. {told}"))
