"""Whether a model fits on a device, in which numbers, about how fast, and what would make it fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tersor.core.measurement import Measurement
from tersor.hardware.profile import Profile
from tersor.hardware.roofline import LayerTime, Roofline, counsel, layer_times, roofline_of, total_seconds
from tersor.measure.kv_cache import KeyValueCache
from tersor.measure.workload import FLOAT_BITS, Workload

SMALLEST_KEEP = 0.1  # of the channels; below, nobody should count on an answer
SHORT_SECONDS = 20e-6  # seconds below which starting a layer's kernel weighs more than the layer
GROUP_BITS = 32 / 128  # a float32 scale for each 128 weights of 4 bits


@dataclass(frozen=True)
class Numbers:
    """How weights and activations are stored, and what products run in: "as it is", fp32, fp16, int8, int4 weights."""

    name: str
    weight_bits: float
    activation_bits: float
    compute: str  # "float" or "int8"


FP32, FP16 = Numbers("fp32", 32, 32, "float"), Numbers("fp16", 16, 16, "float")
INT8 = Numbers("int8", 8, 8, "int8")


@dataclass(frozen=True)
class Way:
    """What would make it fit: the numbers, the share of channels kept, and the sparsity of weights that follows.

    With a share k of all channels weights shrink to k², activations and the key-value cache to k.
    """

    numbers: str
    keep_channels: float
    weight_sparsity: float


@dataclass(frozen=True)
class Fit:
    """One model in one kind of numbers on one device. Bytes and seconds are measurements; times are estimates.

    ``fits``: None where the device does not compute in these numbers. ``near``: whether all of it stays in the near
    memory (None: there is none). ``latency``: an estimate by roofline, no faster than this; None where it cannot run.
    ``memory_bound``: the share of the time in layers that wait for memory.
    """

    device: str
    numbers: str
    weights: Measurement
    activations: Measurement
    cache: Measurement | None
    needed: Measurement
    available: float
    fits: bool | None
    near: bool | None
    latency: Measurement | None
    token_latency: Measurement | None
    memory_bound: float | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class DeviceFits:
    """Everything said of one device: a row for each kind of numbers, ways to make it fit, layers, what goes wrong."""

    profile: str
    title: str
    fits: tuple[Fit, ...]
    ways: tuple[Way, ...]
    layers: tuple[dict[str, Any], ...]
    cautions: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def fits_on(
    workload: Workload, profile: Profile, *, roofline: Roofline | None = None, cache: KeyValueCache | None = None
) -> DeviceFits:
    """How the model of ``workload`` fits on a device, as it is and in each of the numbers that the device offers.

    ``roofline``: measured, in place of the profile's figures. ``cache``: of a decoder, counted as activations are.
    """
    roof = roofline or roofline_of(profile)
    rows = tuple(fit(workload, numbers, profile, roof, cache) for numbers in numbers_of(workload, profile))
    best = next((row for row in rows if row.fits), rows[0])
    stored = workload if best.numbers == "as it is" else stored_as(workload, _named(best.numbers, workload, profile))
    times = layer_times(stored, roof)
    return DeviceFits(
        profile.name, profile.title, rows, _ways(workload, profile, cache, rows),
        _layer_rows(times, roof), _cautions(workload, profile, best, times), workload.notes,
    )  # fmt: skip


def numbers_of(workload: Workload, profile: Profile) -> list[Numbers]:
    """As the model is, and every narrower kind that the device stores."""
    usual = usual_bits(workload)
    found = [Numbers("as it is", usual, usual, workload.compute)]
    if usual > 16 and {"fp16", "bf16"} & set(profile.compute):
        found.append(FP16)
    if workload.compute != "int8" and 8 in profile.activation_bits:
        found.append(INT8)
    if usual > 8 and 4 in profile.weight_bits and profile.floating is not None:
        bits = 32 if profile.floating == "fp32" else 16
        found.append(Numbers("int4 weights", 4 + GROUP_BITS, bits, "float"))
    return found


def usual_bits(workload: Workload) -> float:
    """The bits of most weights: counters and tables of positions, which are wider, say nothing of the model."""
    found: Counter[float] = Counter()
    for name, count in workload.weights.items():
        found[workload.bits.get(name, FLOAT_BITS)] += count
    return max(found, key=lambda bits: found[bits], default=FLOAT_BITS)


def _named(name: str, workload: Workload, profile: Profile) -> Numbers:
    return next(numbers for numbers in numbers_of(workload, profile) if numbers.name == name)


def stored_as(workload: Workload, numbers: Numbers) -> Workload:
    """The workload in these numbers."""
    if numbers.name == "as it is":
        return workload
    return workload.stored_in(numbers.weight_bits, numbers.activation_bits, numbers.compute)


def fit(workload: Workload, numbers: Numbers, profile: Profile, roof: Roofline, cache: KeyValueCache | None) -> Fit:
    """The model in one kind of numbers on a device: memory it needs, and its time by roofline."""
    stored = stored_as(workload, numbers)
    weights, activations = stored.weight_bytes, stored.activation_peak()
    kept = 0.0 if cache is None else cache.bytes(numbers.activation_bits, workload.batch)
    needed = activations + kept + (0 if profile.storage else weights)
    available = profile.memory.value
    enough = needed <= available and (profile.storage is None or weights <= profile.storage.value)
    times = layer_times(stored, roof)
    seconds = None if times is None else total_seconds(times)
    waits = None if times is None or not seconds else sum(t.seconds for t in times if t.bound == "memory") / seconds
    near = None if profile.near is None else weights + activations + kept <= profile.near.memory.value
    said = {"batch": workload.batch, "numbers": numbers.name}
    return Fit(
        profile.name, numbers.name, Measurement(weights, "bytes", conditions=said),
        Measurement(activations, "bytes", device=profile.name, conditions={**said, "counts": "buffers alive at once"}),
        None if cache is None else Measurement(kept, "bytes", conditions={**said, "context": cache.context}),
        Measurement(needed, "bytes", device=profile.name, conditions=said), available,
        enough if times is not None else None, near,
        None if seconds is None else _estimate(seconds, profile, said),
        None if cache is None or times is None else _token(stored, kept, profile, roof, said),
        waits, _reason(profile, numbers, weights, needed, times is not None),
    )  # fmt: skip


def _estimate(seconds: float, profile: Profile, said: dict[str, Any]) -> Measurement:
    told = {**said, "estimate": "roofline: no faster than this"}
    return Measurement(1e3 * seconds, "ms", device=profile.name, conditions=told)


def _token(stored: Workload, kept: float, profile: Profile, roof: Roofline, said: dict[str, Any]) -> Measurement:
    """One more token of a full context: all weights and the cache are read once."""
    read = stored.weight_bytes + kept
    speed = roof.bandwidth(read).value
    return _estimate(read / speed, profile, {**said, "for": "one token, the cache full"})


def _reason(profile: Profile, numbers: Numbers, weights: float, needed: float, runs: bool) -> str:
    if not runs:
        return f"{profile.name} multiplies {', '.join(profile.compute)} only"
    if profile.storage is not None and weights > profile.storage.value:
        return f"weights are {weights / profile.storage.value:.1f}× its storage"
    if needed > profile.memory.value:
        return f"{needed / profile.memory.value:.1f}× its memory"
    share = needed / profile.memory.value
    return f"{100 * share:.0f} % of its memory" if share >= 0.01 else "under 1 % of its memory"


def _ways(workload: Workload, profile: Profile, cache: KeyValueCache | None, rows: Sequence[Fit]) -> tuple[Way, ...]:
    """For each kind of numbers that runs, the largest share of channels that would fit; () where it does as it is."""
    if rows[0].fits:
        return ()
    found = []
    for row, numbers in zip(rows, numbers_of(workload, profile), strict=True):
        if row.fits is None:
            continue
        stored = stored_as(workload, numbers)
        kept = 0.0 if cache is None else cache.bytes(numbers.activation_bits, workload.batch)
        keep = largest_keep(
            stored.weight_bytes, stored.activation_peak() + kept, profile.memory.value,
            None if profile.storage is None else profile.storage.value,
        )  # fmt: skip
        if keep >= SMALLEST_KEEP:
            found.append(Way(numbers.name, keep, 1 - keep**2))
    return tuple(found)


def largest_keep(weights: float, activations: float, memory: float, storage: float | None = None) -> float:
    """The largest share k of channels with weights · k² + activations · k within memory, or weights · k² in storage.

    Widths scale all activations and both sides of every weight; inputs and outputs, which do not shrink, are neglected.
    """
    if storage is not None:
        return min(1.0, math.sqrt(storage / max(weights, 1e-9)), memory / max(activations, 1e-9))
    return min(1.0, 2 * memory / max(activations + math.sqrt(activations**2 + 4 * weights * memory), 1e-9))


def _layer_rows(times: Sequence[LayerTime] | None, roof: Roofline) -> tuple[dict[str, Any], ...]:
    if times is None:
        return ()
    total = total_seconds(times) or 1.0
    floats = roof.peak("float", 32) or roof.peak("float", 16)
    integers = roof.peak("int8")
    gain = integers[1].value / floats[1].value if integers and floats else 1.0
    return tuple(
        {
            "path": time.cost.path, "operator": time.cost.operator, "macs": time.cost.macs,
            "weight_bytes": time.cost.weight_bytes, "activation_bytes": time.cost.activation_bytes,
            "intensity": time.cost.intensity, "ridge": time.ridge if math.isfinite(time.ridge) else None,
            "bound": time.bound, "ms": 1e3 * time.seconds, "share": time.seconds / total,
            "advice": counsel(time, time.seconds / total, gain),
        }
        for time in times
    )  # fmt: skip


def _cautions(workload: Workload, profile: Profile, fit: Fit, times: Sequence[LayerTime] | None) -> tuple[str, ...]:
    """What commonly goes wrong on such a device, as far as it concerns this model."""
    operators = {operation.operator.lower() for operation in workload.operations}
    seconds = sorted(time.seconds for time in times or () if time.cost.macs)
    near = profile.near.memory.value if profile.near is not None else math.inf
    holds = {
        "always": True,
        "float": workload.compute == "float",
        "int8": 8 in profile.activation_bits,
        "depthwise": any(name.startswith("depthwise") for name in operators),
        "attention": any("attention" in name or "softmax" in name for name in operators),
        "memory-bound": (fit.memory_bound or 0) > 0.5,
        "small layers": bool(seconds) and seconds[len(seconds) // 2] < SHORT_SECONDS,
        "many weights": fit.weights.value > near,
    }
    return tuple(caution.what for caution in profile.cautions if holds[caution.when])
