"""The roofline: each layer takes as long as its operations or its bytes do, whichever is longer; this machine measured.

Source: Williams, Waterman and Patterson 2009, Roofline: an insightful visual performance model.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from tersor.core.files import cache_folder, write_atomically
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.hardware.profile import FLOATS, Precision, Profile
from tersor.measure.fresh_process import run_fresh
from tersor.measure.onnx_cpu import default_threads
from tersor.measure.workload import LayerCost, Workload

VERSION = 1  # of what is kept
Bound = Literal["compute", "memory"]


@dataclass(frozen=True)
class Roofline:
    """``peaks``: precision → operations per second; ``bandwidths``: (largest working set in bytes, bytes per second),
    from the nearest memory to the farthest, whose working set is unlimited."""

    name: str
    peaks: Mapping[str, Measurement]
    bandwidths: tuple[tuple[float, Measurement], ...]

    def bandwidth(self, working_set: float) -> Measurement:
        """Bytes per second from the nearest memory that holds so many bytes."""
        return next(speed for size, speed in self.bandwidths if working_set <= size)

    def peak(self, compute: str, bits: float = 32) -> tuple[str, Measurement] | None:
        """The precision that products run in, and its operations per second; None where the device has none.

        ``compute`` "int8", or "float" of numbers of so many ``bits``: 16 run in float32 where there is no half type.
        """
        if compute == "int8":
            return ("int8", self.peaks["int8"]) if "int8" in self.peaks else None
        wanted = ["fp32"] if bits > 16 else [*FLOATS]
        known = [name for name in wanted if name in self.peaks]
        best = max(known, key=lambda name: self.peaks[name].value, default=None)
        return None if best is None else (best, self.peaks[best])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an unlimited working set is null."""
        return {
            "name": self.name,
            "peaks": {name: peak.to_json() for name, peak in self.peaks.items()},
            "bandwidths": [
                {"working_set_bytes": size if math.isfinite(size) else None, **speed.to_json()}
                for size, speed in self.bandwidths
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Roofline:
        """The inverse of ``to_json``."""
        speeds = []
        for entry in data["bandwidths"]:
            rest = {key: value for key, value in entry.items() if key != "working_set_bytes"}
            size = entry["working_set_bytes"]
            speeds.append((math.inf if size is None else float(size), Measurement.from_json(rest)))
        peaks = {name: Measurement.from_json(peak) for name, peak in data["peaks"].items()}
        return cls(data["name"], peaks, tuple(speeds))


def roofline_of(profile: Profile) -> Roofline:
    """The roofline that a profile's figures give; their sources are the measurements' conditions."""

    def told(figure: Any, unit: str) -> Measurement:
        said = {"basis": figure.basis, "source": figure.source}
        return Measurement(figure.value, unit, device=profile.name, conditions=said)

    peaks: dict[str, Measurement] = {name: told(figure, "operations/s") for name, figure in profile.compute.items()}
    speeds = [(math.inf, told(profile.bandwidth, "bytes/s"))]
    if profile.near is not None:
        speeds.insert(0, (profile.near.memory.value, told(profile.near.bandwidth, "bytes/s")))
    return Roofline(profile.name, peaks, tuple(speeds))


@dataclass(frozen=True)
class LayerTime:
    """A layer under a roofline. ``seconds``: the longer of ``compute_seconds`` and ``memory_seconds``; ``ridge``:
    operations per byte from which on a layer is compute-bound."""

    cost: LayerCost
    precision: Precision | str
    compute_seconds: float
    memory_seconds: float
    ridge: float

    @property
    def bound(self) -> Bound:
        """Which of the two limits it."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"

    @property
    def seconds(self) -> float:
        """How long the layer takes, at least."""
        return max(self.compute_seconds, self.memory_seconds)


def layer_times(workload: Workload, roofline: Roofline) -> tuple[LayerTime, ...] | None:
    """Each layer's time under the roofline, at least; None where the device lacks the precision of a product.

    The pass's weights and its peak of activations are the working set, which says from which memory it reads.
    """
    bandwidth = roofline.bandwidth(workload.weight_bytes + workload.activation_peak()).value
    bits = {op.layer: max((workload.bits.get(v, 32.0) for v in op.writes), default=32.0) for op in workload.operations}
    found = []
    for cost in workload.layers():
        peak = roofline.peak(cost.compute, bits[cost.path])
        if peak is None and cost.macs:
            return None
        precision, speed = (peak[0], peak[1].value) if peak is not None else ("none", math.inf)
        seconds = 2 * cost.macs / speed
        ridge = speed / bandwidth
        found.append(LayerTime(cost, precision, seconds, cost.bytes / bandwidth, ridge))
    return tuple(found)


def total_seconds(times: Sequence[LayerTime]) -> float:
    """Layers one after another."""
    return sum(time.seconds for time in times)


def counsel(time: LayerTime, share: float, integer_gain: float) -> str:
    """What a layer's place under the roofline says about pruning and quantisation.

    ``share``: of the pass's time; ``integer_gain``: int8's peak over that of floats.
    """
    cost = time.cost
    if share < 0.01:
        return "neither: under 1 % of the time"
    if time.bound == "compute":
        integers = f"int8 (peak {integer_gain:.1f}×), " if integer_gain >= 1.2 and time.precision != "int8" else ""
        return f"{integers}fewer channels; not single zeros, not smaller weights alone"
    if cost.weight_bytes > cost.activation_bytes:
        return "smaller weights: fewer bits (weights alone will do), fewer channels"
    return "smaller activations: 8 bits, fewer channels; not smaller weights alone"


def this_roofline(
    *, threads: int | None = None, again: bool = False, folder: Path | None = None, progress: Progress | None = None
) -> Roofline:
    """This machine's roofline, measured once (about 10 s) in a fresh process and kept in the cache folder.

    Peaks: products of square matrices, float32 and int8 in ONNX Runtime, bfloat16 in torch; bandwidth: reading arrays
    of several sizes, so that models that stay in the processor's cache are known. What others do on the machine can
    only slow it: the value is the best of the timings, its lower end their median. ``again``: measure even if it is
    kept; the machine, its threads and the versions that run name what is kept. Raises TersorError where the measuring
    process dies.
    """
    used = threads or default_threads()
    path = (folder or cache_folder()) / f"roofline-{_key(used)}.json"
    if not again and path.is_file():
        try:
            return Roofline.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            (progress or Progress()).say(f"note: the kept roofline cannot be read ({error}); measuring again")
    request = {"threads": used}
    found = run_fresh(
        "tersor.hardware.roofline_worker", request, progress=progress, description="measure the machine", ticks=8
    )
    measured = _measured(found, used)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(measured.to_json(), indent=1).encode())
    except OSError as error:
        (progress or Progress()).say(f"note: the roofline cannot be kept in {path} ({error.strerror or error})")
    return measured


def _key(threads: int) -> str:
    said = [VERSION, processor(), threads, version("onnxruntime"), version("torch"), version("tersor")]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def processor() -> str:
    """The processor's name, with the vector instructions that its kernels choose by."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    flags = facts.get("flags", facts.get("Features", "")).split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp")
             if flag in flags]  # fmt: skip
    return " ".join([facts.get("model name", platform.machine()), *known])


def _measured(found: Mapping[str, Any], threads: int) -> Roofline:
    def rate(amount: float, seconds: Sequence[float], unit: str, **conditions: Any) -> Measurement:
        said = {"threads": threads, "value": f"best of {len(seconds)}", "low": "their median", **conditions}
        return Measurement(amount / min(seconds), unit, amount / median(seconds), None, len(seconds), conditions=said)

    peaks = {
        name: rate(entry["operations"], entry["seconds"], "operations/s", through=entry["through"])
        for name, entry in found["peaks"].items()
    }
    speeds = [
        (float(entry["bytes"]), rate(entry["bytes"], entry["seconds"], "bytes/s", working_set_bytes=entry["bytes"]))
        for entry in found["bandwidths"]
    ]
    speeds[-1] = math.inf, speeds[-1][1]
    return Roofline("this", peaks, tuple(speeds))
