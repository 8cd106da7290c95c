"""The sensitivity of layers as a page, a plot and a table; plain data in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from rich.table import Table
from rich.text import Text

from tersor.report.format import MISSING, count, human, scale_of, shorten
from tersor.report.page import fill
from tersor.report.plots import MOST_LAYERS, Plot
from tersor.report.skips import skip_lines
from tersor.report.svg import ACCENT, AFTER, BEFORE, inline, new_figure, quiet_axis, settings
from tersor.report.table import plain_table

_NAMED = 3  # layers that the verdict names on either side before it only counts


def sensitivity_table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, a row per layer): parameters, the metric at each sparsity or width, and those that follow.

    ``data``: as ``sensitivity.json`` has it.
    """
    levels = _levels(data["layers"])
    scale = scale_of(data["metric"]["value"], data["metric"]["unit"])
    header = ["layer", "numbers", *map(_label, levels), "within"]
    header += ["together"] if data["together"] else []
    budgets = [data[name] for name in ("within", "together") if data[name]]
    rows = []
    for layer in data["layers"]:
        at = {_level(point): point["metric"] for point in layer["points"]}
        told = [MISSING if at.get(level) is None else scale.bare(at[level]) for level in levels]
        chosen = [_chosen(budget, layer["place"]) for budget in budgets]
        rows.append([layer["place"].removesuffix(".weight"), count(layer["parameters"]), *told, *chosen])
    return header, rows


def _level(point: Mapping[str, Any]) -> float:
    """The sparsity that was asked for (counts of small layers fall a little below it), or bits as their negative: what
    is larger is harder."""
    return -int(point["bits"]) if "bits" in point else float(point["asked"])


def _levels(layers: Sequence[Mapping[str, Any]]) -> list[float]:
    """What was tried, the mildest first."""
    return sorted({_level(point) for layer in layers for point in layer["points"]})


def _label(level: float) -> str:
    return f"{-level:g} bits" if level < 0 else f"{100 * level:g} %"


def _chosen(budget: Mapping[str, Any], place: str) -> str:
    """What a budget gives to the layer whose weight is at ``place``."""
    if "sparsity" in budget:
        return _percent(budget["sparsity"][place])
    bits = budget["bits"][place.rpartition(".")[0]]
    return "float" if bits is None else f"{bits} bits"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def sensitivity_view(data: Mapping[str, Any]) -> Table:
    """The table for the terminal, and what was passed over."""
    header, rows = sensitivity_table(data)
    table = plain_table(header[0], *header[1:])
    for row in rows:
        table.add_row(*map(Text, row))
    table.caption = "\n".join([caption(data), *skip_lines(data["skips"], "places")])
    return table


def verdict(data: Mapping[str, Any]) -> str:
    """Which layers bear most and which least within the drop asked for, in a sentence."""
    ranked = _by_what_they_bear(data)
    if not ranked:
        return "How much each layer bears: nothing was measured."
    done = "quantised" if _has_bits(data) else "pruned"
    condition = f"within {data['max_drop']:g} {_points(data)}, each {done} alone"
    (most, strong), (least, weak) = ranked[0], ranked[-1]
    if len(ranked) == 1:
        everything = "The only layer bears" if len(strong) == 1 else f"All {len(strong)} layers bear"
        return f"{everything} {most} {condition}."
    return f"{_names(strong)} {_bear(strong)} most ({most}) and {_names(weak)} least ({least}) {condition}."


def _by_what_they_bear(data: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What is borne, in words, with the layers that bear it; the most first.

    Shares that read alike are alike: counts of small layers fall a little below what was asked for.
    """
    groups: dict[str, list[str]] = {}
    ranks: dict[str, float] = {}
    for layer in data["layers"]:
        place, within = layer["place"], data["within"]
        if _has_bits(data):
            bits = within["bits"][place.rpartition(".")[0]]
            rank, said = (-math.inf, "float alone") if bits is None else (-float(bits), f"{bits} bits")
        else:
            rank = float(within["sparsity"][place])
            said = f"{_percent(rank)} zeros"
        groups.setdefault(said, []).append(place.removesuffix(".weight"))
        ranks[said] = rank
    return sorted(groups.items(), key=lambda group: -ranks[group[0]])


def _names(layers: Sequence[str]) -> str:
    named = [shorten(name, 40, keep_end=True) for name in layers[:_NAMED]]
    if len(layers) > _NAMED:
        named.append(f"{len(layers) - _NAMED} more")
    return " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))


def _bear(layers: Sequence[str]) -> str:
    return "bears" if len(layers) == 1 else "bear"


def caption(data: Mapping[str, Any]) -> str:
    """What the numbers of the table are, in a few sentences."""
    metric = data["metric"]
    scale = scale_of(metric["value"], metric["unit"])
    done, most = ("quantised", "fewest bits") if _has_bits(data) else ("pruned", "largest sparsity")
    text = (
        f"{human(metric['name']).capitalize()} of the whole model with one layer {done}, on {data['samples']} "
        f"validation samples; as it is: {scale.full(metric['value'])}. within: the {most} that "
        f"{'cost' if _has_bits(data) else 'costs'} at most {data['max_drop']:g} {_points(data)} by {_itself(data)}."
    )
    if data["together"]:
        text += f" together: {_total(data)} at the least predicted loss (+{data['together']['loss_increase']:.3g})."
    if data["left_out"]:
        text += f" There was no time for {data['left_out']} of the measurements."
    return text


def _points(data: Mapping[str, Any]) -> str:
    unit = data["metric"]["unit"]
    return ("point" if data["max_drop"] == 1 else "points") if unit == "fraction" else str(unit)


def _has_bits(data: Mapping[str, Any]) -> bool:
    return "bits" in data["within"]


def _itself(data: Mapping[str, Any]) -> str:
    return "themselves" if _has_bits(data) else "itself"


def _total(data: Mapping[str, Any]) -> str:
    budget = data["together"]
    if "sparsity" in budget:
        return f"{_percent(budget['overall'])} of all these weights"
    size = f"{scale_of(budget['size_bytes'], 'bytes').full(budget['size_bytes'])} of weights and scales"
    timed = data.get("milliseconds") is not None
    return f"{scale_of(budget['cost'], 'ms').full(budget['cost'])} of kernels, {size}" if timed else size


@mpl.rc_context(settings())
def sensitivity_plot(data: Mapping[str, Any]) -> Plot | None:
    """The metric at each sparsity or width, a row per layer; None where nothing was measured. Of many the largest."""
    largest = sorted(data["layers"], key=lambda layer: -layer["parameters"])[:MOST_LAYERS]
    layers = [layer for layer in data["layers"] if layer in largest]
    levels = _levels(layers)
    if not levels:
        return None
    scale = scale_of(data["metric"]["value"], data["metric"]["unit"])
    names = [layer["place"].removesuffix(".weight") for layer in layers]
    figure = new_figure(74 + 20 * len(layers))
    axes = figure.subplots()
    axes.axvline(data["metric"]["value"] * scale.factor, color=BEFORE, linewidth=1.2, zorder=1)
    for number, level in enumerate(levels):
        found = _at(layers, level, scale.factor)
        last = number == len(levels) - 1
        axes.plot(
            [value for _, value in found], [row for row, _ in found], "o", markersize=6, markeredgewidth=0,
            color=ACCENT if last else AFTER, alpha=0.25 + 0.75 * (number + 1) / len(levels),
            label=_label(level), zorder=2 + number,
        )  # fmt: skip
    axes.set_yticks(range(len(layers)), labels=[shorten(name, 24, keep_end=True) for name in names])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    quiet_axis(axes, grid="x")
    unit, done = scale.suffix.strip(), "quantised" if _has_bits(data) else "pruned"
    axes.set_xlabel(f"{human(data['metric']['name'])}{', ' + unit if unit else ''}, with this layer alone {done}")
    figure.legend(loc="outside upper left", ncols=len(levels), handletextpad=0.1, columnspacing=0.9)
    title = "How much each layer bears"
    told = "; ".join(f"{row[0]}: {', '.join(row[2:])}" for row in sensitivity_table(data)[1])
    text = f"Each dot is the whole model with one layer {done}; the line is the model as it is."
    return Plot("sensitivity", title, text, inline(figure, "sensitivity", f"{title}. {told}"))


def _at(layers: Sequence[Mapping[str, Any]], level: float, factor: float) -> list[tuple[int, float]]:
    """(row, value) of each layer that was measured at a level."""
    return [
        (row, point["metric"] * factor)
        for row, layer in enumerate(layers)
        for point in layer["points"]
        if _level(point) == level and point["metric"] is not None
    ]


def render(data: Mapping[str, Any]) -> str:
    """The page: plot, table, caption, skips; needs no network."""
    plot = sensitivity_plot(data)
    header, rows = sensitivity_table(data)
    return fill(
        "sensitivity.html", data=data, plot=plot, header=header, rows=rows, caption=caption(data), verdict=verdict(data)
    )
