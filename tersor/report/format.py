"""Numbers as people read them: 1.94 MB, 0.51 M, 98.3 % [97.1, 99.0], 2.3× [2.1, 2.5]."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tersor.core.measurement import Measurement

MISSING = "–"
_COUNTS = {"", "count", "parameters", "params", "weights", "nonzeros", "non-zeros", "macs", "operations", "elements"}
_WORDS = {
    "macs": "MACs",
    "nonzeros": "non-zeros",
    "size_bytes": "file size",
    "state_bytes": "weights and buffers",
}
_TIMES = {"x", "×", "times", "ratio"}
_POINTS = {"points", "percentage points", "pp"}
_UNIT_INTERVAL = {"probability", "squared probability", "auroc", "correlation", "kappa", "cosine"}


@dataclass(frozen=True)
class Scale:
    """How the numbers of one quantity are shown: times ``factor``, with ``decimals``, followed by ``suffix``."""

    factor: float
    decimals: int
    suffix: str

    def bare(self, value: float) -> str:
        """The number without its suffix."""
        text = f"{value * self.factor:.{self.decimals}f}"
        if float(text) == 0:
            text = text.lstrip("-")
        return text.replace("-", "−")

    def full(self, value: float) -> str:
        """The number with its suffix."""
        return self.bare(value) + self.suffix


def scale_of(value: float, unit: str) -> Scale:
    """The scale at which ``value`` reads well; use the same for everything that stands beside it."""
    size = abs(value) if math.isfinite(value) else 0.0
    kind = unit.strip().lower()
    if kind == "fraction":
        return Scale(100, 1, " %")
    if kind in _POINTS:
        return Scale(1, 2 if 0 < size < 0.1 else 1, " points")
    if kind in _TIMES:
        return Scale(1, 2 if size < 2 else 1, "×")
    if kind in {"bytes", "byte", "b"}:
        return _stepped(size, ((1e9, " GB"), (1e6, " MB"), (1e3, " kB")), " B")
    if kind in _COUNTS:
        return _stepped(size, ((1e9, " G"), (5e5, " M"), (1e3, " k")), "")
    if kind in _UNIT_INTERVAL:
        return Scale(1, 4 if 0 < size < 0.00095 else 3, f" {unit}")
    if kind in {"ms", "milliseconds"}:
        return Scale(1, _decimals(size), " ms")
    if kind in {"s", "seconds"}:
        return Scale(1, _decimals(size), " s")
    if size >= 1e5:
        scale = _stepped(size, ((1e9, " G"), (1e5, " M")), "")
        return Scale(scale.factor, scale.decimals, f"{scale.suffix} {unit}")
    return Scale(1, _decimals(size), f" {unit}")


def _stepped(size: float, steps: tuple[tuple[float, str], ...], plain: str) -> Scale:
    for start, suffix in steps:
        if size >= start:
            by = 1e6 if suffix == " M" else start
            return Scale(1 / by, 2 if size < by else _decimals(size / by), suffix)
    return Scale(1, 0 if size == int(size) else 1, plain)


def _decimals(size: float) -> int:
    """Decimals for three significant digits, between 0 and 6."""
    if size == 0:
        return 0
    return max(0, min(6, 2 - math.floor(math.log10(size))))


def value_of(measurement: Measurement | None) -> str:
    """The value with its unit; a dash where there is none."""
    if measurement is None:
        return MISSING
    return scale_of(measurement.value, measurement.unit).full(measurement.value)


def interval_of(measurement: Measurement | None) -> str:
    """The 95 % interval at the value's scale, "[97.1, 99.0]"; empty where there is none."""
    if measurement is None or measurement.low is None or measurement.high is None:
        return ""
    scale = scale_of(measurement.value, measurement.unit)
    return f"[{scale.bare(measurement.low)}, {scale.bare(measurement.high)}]"


def both_of(measurement: Measurement | None) -> str:
    """Value and interval: "98.3 % [97.1, 99.0]"."""
    return f"{value_of(measurement)} {interval_of(measurement)}".strip()


def bare_of(measurement: Measurement | None) -> str:
    """Value and interval without the words for units between 0 and 1, which the name beside them says."""
    text = both_of(measurement)
    if measurement is not None and measurement.unit.strip().lower() in _UNIT_INTERVAL:
        text = text.replace(f" {measurement.unit}", "", 1)
    return text


def turned(measurement: Measurement) -> Measurement:
    """The measurement with its sign turned, its interval too: a loss as a gain."""
    low = None if measurement.high is None else -measurement.high
    high = None if measurement.low is None else -measurement.low
    return replace(measurement, value=-measurement.value, low=low, high=high)


def p_of(value: float) -> str:
    """A p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float) -> str:
    """A plain number of things."""
    return scale_of(value, "count").full(value)


def duration(seconds: float) -> str:
    """ "0.4 s", "42 s", "3 min 5 s", "2 h 4 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def human(name: str) -> str:
    """A field's name as a label: "latency_ms_batch_1_p95" → "latency, batch 1, p95"."""
    text = _WORDS.get(name, name)
    for unit in ("_bytes", "_ms", "_points"):
        text = text.removesuffix(unit).replace(f"{unit}_", "_")
    text = text.replace("speedup_", "speed-up_").replace("_batch_", ", batch ").replace("_p95", ", p95")
    return text.replace("_", " ").strip()


def shorten(text: str, width: int, *, keep_end: bool = False) -> str:
    """At most ``width`` characters on one line, control characters gone; what is cut is shown by an ellipsis."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    if len(clean) <= width:
        return clean
    return "…" + clean[len(clean) - width + 1 :] if keep_end else clean[: width - 1] + "…"


def tight(text: str) -> str:
    """The text with its numbers and units held together by no-break spaces."""
    return re.sub(r"(\d) (%|[kMG]?B|ms|s|min|points|[kMG])(?!\w)", "\\1\u00a0\\2", text)


def shape_of(shape: object) -> str:
    """A tensor's shape, "64×32×3×3"."""
    return "×".join(map(str, shape)) if isinstance(shape, (list, tuple)) else str(shape or MISSING)


def plain(value: object) -> str:
    """A JSON value as people read it."""
    if isinstance(value, Mapping) and {"value", "unit"} <= value.keys():
        return both_of(Measurement.from_json(value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or MISSING
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
