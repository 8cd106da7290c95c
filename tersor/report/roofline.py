"""What fits where for people who were not there: memory, estimated time, and the layers under the roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from pydantic import BaseModel, ConfigDict

from tersor.core.document import parse_document
from tersor.core.measurement import Measurement
from tersor.report.behaviour.words import capital, counted
from tersor.report.format import MISSING, scale_of, shorten, value_of
from tersor.report.page import Document, Section, Table
from tersor.report.plots import Plot
from tersor.report.svg import ACCENT, AFTER, INK, MUTED, PAGE, inline, new_figure, quiet_axis, settings

VERSION = 1
_LAYERS, _NAME = 12, 30
_WORDS = {True: "yes", False: "no", None: "cannot run"}
_FITS = (
    "Whether the model's weights, its activations at their peak and, of a decoder, its cache of keys and values fit in "
    "the device's memory, and the least time that a pass can take there. The times are estimates by roofline, not "
    "measurements: kernels rarely come so far."
)
_ROOFLINE = (
    "A layer takes as long as its arithmetic or its traffic with memory does, whichever is longer. Layers bound by "
    "compute gain from fewer or narrower multiplications, layers bound by memory from fewer bytes; the other remedy "
    "does little."
)


class _Part(BaseModel):
    """A part of ``fits.json``; what the report does not show is not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Row(_Part):
    """The model in one kind of numbers on one device."""

    numbers: str
    weights: Measurement
    activations: Measurement
    cache: Measurement | None = None
    fits: bool | None
    latency: Measurement | None
    token_latency: Measurement | None = None
    memory_bound: float | None
    reason: str


class Way(_Part):
    """What would make it fit."""

    numbers: str
    keep_channels: float
    weight_sparsity: float


class Layer(_Part):
    """A layer under the roofline: operations per byte, the ridge above which arithmetic decides, and its time."""

    path: str
    operator: str
    macs: float
    intensity: float
    ridge: float | None
    bound: Literal["compute", "memory"]
    ms: float
    share: float
    advice: str


class Device(_Part):
    """All that is said of one device."""

    profile: str
    title: str
    fits: tuple[Row, ...]
    ways: tuple[Way, ...] = ()
    layers: tuple[Layer, ...] = ()
    cautions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its title without what stands in brackets."""
        return capital(shorten(self.title.partition(" (")[0], _NAME))


class Roof(_Part):
    """A device's peaks by precision, and its bandwidths from the nearest memory to the farthest."""

    peaks: Mapping[str, Measurement]
    bandwidths: tuple[Mapping[str, Any], ...]


class Fits(_Part):
    """`fits.json`, as `tersor fits -o` writes it."""

    model: str
    batch: int
    totals: Mapping[str, Measurement]
    devices: tuple[Device, ...]
    rooflines: Mapping[str, Roof] = {}
    tersor: str = ""


def parse_fits(data: Mapping[str, Any], where: str = "fits.json") -> Fits:
    """Raises ArtifactError for a file of another version, and with the path of what is wrong in it."""
    return parse_document(Fits, data, VERSION, what="the file of what fits", where=where, page="docs/hardware.md")


def fits_document(found: Fits, more: Sequence[Section] = ()) -> Document:
    """The page of what fits where; ``more``: sections of other measurements."""
    told = "; ".join(f"{each.name}: {_verdict(each)}" for each in found.devices)
    devices = tuple((each.profile, each.title) for each in found.devices)
    totals = tuple((capital(name), value_of(value)) for name, value in found.totals.items())
    return Document(
        title=f"{shorten(found.model, _NAME)} on devices", kicker=("Tersor fits", shorten(found.model, _NAME)),
        status="muted", word="", headline=f"{told}.", sections=(*fits_sections(found), *more), source="fits.json",
        tersor=found.tersor, skipped=None, facts=(*totals, ("Samples in a pass", f"{found.batch:,}"), *devices),
    )  # fmt: skip


def fits_sections(found: Fits) -> tuple[Section, ...]:
    """What fits where, and the layers under the rooflines."""
    says = [
        f"{device.name}: {line}"
        for device in found.devices
        for line in (*_ways(device), *device.cautions, *device.notes)
    ]
    sections = [Section("fits", "What fits where", _FITS, tuple(says), (_rows(found),))]
    plots = tuple(
        plot
        for number, device in enumerate(found.devices)
        if (plot := _plot(device, found.rooflines.get(device.profile), number)) is not None
    )
    tables = tuple(_layers(device) for device in found.devices if device.layers)
    if plots or tables:
        lines = tuple(_bound(device) for device in found.devices if device.layers)
        sections.append(Section("roofline", "What bounds each layer", _ROOFLINE, lines, tables, plots))
    return tuple(sections)


def _verdict(device: Device) -> str:
    first = device.fits[0] if device.fits else None
    if first is None:
        return MISSING
    if first.fits is None:
        return f"cannot run it as it is ({first.reason})"
    time = "" if first.latency is None else f", at least {value_of(first.latency)} a pass"
    return f"{'fits' if first.fits else 'does not fit'} ({first.reason}){time}"


def _ways(device: Device) -> list[str]:
    told = []
    for way in device.ways:
        kept = f" with {way.keep_channels:.0%} of its channels ({way.weight_sparsity:.0%} of the weights gone)"
        told.append(f"would fit in {way.numbers}{'' if way.keep_channels >= 1 else kept.replace('%', ' %')}")
    return told


def _rows(found: Fits) -> Table:
    """A row for each device and kind of numbers; of decoders their cache too, and the time of one more token."""
    decodes = any(row.cache for device in found.devices for row in device.fits)
    rows = tuple(
        (
            f"{device.name}, {row.numbers}", f"{_WORDS[row.fits]}: {row.reason}", value_of(row.weights),
            value_of(row.activations), *((value_of(row.cache),) if decodes else ()), value_of(row.latency),
            *((value_of(row.token_latency),) if decodes else ()),
            MISSING if row.memory_bound is None else value_of(Measurement(row.memory_bound, "fraction")),
        )
        for device in found.devices
        for row in device.fits
    )  # fmt: skip
    cache, token = (("Cache",), ("A token, at least",)) if decodes else ((), ())
    header = (
        "Device, numbers", "Fits", "Weights", "Activations", *cache, "Time, at least", *token, "Waits for memory",
    )  # fmt: skip
    return Table(header, rows, "Waits for memory: the share of the time in layers that memory bounds.")


def _bound(device: Device) -> str:
    share = sum(layer.share for layer in device.layers if layer.bound == "memory")
    told = value_of(Measurement(share, "fraction"))
    return f"{device.name}: {told} of the time goes to layers that wait for memory, the rest to arithmetic."


def _layers(device: Device) -> Table:
    longest = sorted(device.layers, key=lambda layer: -layer.ms)[:_LAYERS]
    rows = tuple(
        (
            shorten(layer.path or "<model>", _NAME, keep_end=True), scale_of(layer.macs, "macs").full(layer.macs),
            f"{layer.intensity:.1f}", MISSING if layer.ridge is None else f"{layer.ridge:.1f}", layer.bound,
            value_of(Measurement(layer.share, "fraction")), layer.advice,
        )
        for layer in longest
    )  # fmt: skip
    left = len(device.layers) - len(longest)
    caption = "Ridge: operations a byte above which arithmetic decides."
    caption += f" {left} shorter ones are left out." if left else ""
    header = ("Layer", "MACs", "Operations a byte", "Ridge", "Bound by", "Share", "What helps")
    return Table(header, rows, caption, f"{device.name}: {counted(len(rows), 'layer')}")


@mpl.rc_context(settings())
def _plot(device: Device, roof: Roof | None, number: int) -> Plot | None:
    """Layers that multiply, under the roof; None where there are none or the roof is not known."""
    shown = [layer for layer in device.layers if layer.macs > 0 and layer.ms > 0 and layer.intensity > 0]
    if not shown or roof is None or not roof.peaks or not roof.bandwidths:
        return None
    figure = new_figure(300)
    axes = figure.subplots()
    speeds = [float(each["value"]) for each in roof.bandwidths]
    top = max(peak.value for peak in roof.peaks.values())
    at = [layer.intensity for layer in shown]
    reach = np.geomspace(min(*at, top / max(speeds)) / 4, max(*at, top / min(speeds)) * 4, 200)
    for speed, style in {speeds[0]: "-", speeds[-1]: (0, (4, 3))}.items():
        axes.plot(reach, np.minimum(speed * reach, top) / 1e9, color=MUTED, linewidth=1.2, linestyle=style, zorder=1)
    for name, peak in roof.peaks.items():
        start = peak.value / max(speeds)
        axes.plot([start, reach[-1]], [peak.value / 1e9] * 2, color=MUTED, linewidth=1, zorder=1)
        axes.annotate(name, (reach[-1], peak.value / 1e9), (0, 3), textcoords="offset points", ha="right", color=INK)
    for bound, colour in (("compute", AFTER), ("memory", ACCENT)):
        those = [layer for layer in shown if layer.bound == bound]
        sizes = [20 + 500 * layer.share for layer in those]
        reached = [2 * layer.macs / (1e6 * layer.ms) for layer in those]
        axes.scatter(
            [layer.intensity for layer in those], reached, s=sizes, color=colour, edgecolors=PAGE, linewidths=1,
            alpha=0.85, zorder=3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    heights = axes.get_ylim()
    _plain_log(axes.xaxis, reach[0], reach[-1])
    _plain_log(axes.yaxis, *heights)
    axes.set_xlim(reach[0], reach[-1])
    axes.set_ylim(heights)
    quiet_axis(axes, grid="both")
    axes.set_xlabel("operations a byte")
    axes.set_title("billion operations a second")
    title = f"Roofline: {device.name}"
    told = "; ".join(f"{layer.path}: {layer.intensity:.3g} a byte, {layer.bound}" for layer in shown)
    caption = (
        "Each dot is a layer, as large as its share of the estimated time, on the roof that bounds it: teal where "
        "arithmetic does, orange where memory does. Slopes: the nearest memory (solid) and the farthest (dashed). "
        "Flat: peaks by precision."
    )
    return Plot(f"roofline-{number}", title, caption, inline(figure, f"roofline-{number}", f"{title}. {told}"))


def _plain_log(axis: Any, low: float, high: float) -> None:
    """A few powers of ten as plain numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = max(1, len(powers) // 5)
    axis.set_ticks([10.0**p for p in powers if p % step == 0], [f"{10.0**p:,g}" for p in powers if p % step == 0])
    axis.set_ticks([], minor=True)
