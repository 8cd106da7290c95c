"""Models side by side: latency in turns, throughput, energy, load time and memory, each in fresh processes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, final

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.measure.behaviour.schema import Skipped
from tersor.measure.benchmark_schema import BenchmarkModel, Comparison, Timing
from tersor.measure.benchmark_timing import TOO_WIDE, comparison, timing, typical
from tersor.measure.contender import Contender
from tersor.measure.energy import find_meter
from tersor.measure.fresh_process import run_fresh
from tersor.measure.latency_worker import SITTINGS
from tersor.measure.memory import METHOD
from tersor.measure.onnx_cpu import default_threads

FILE_WORKERS = {"time": "tersor.measure.latency_worker", "start": "tersor.measure.memory_worker"}
PAUSE = 0.005  # seconds, longer than the threads of either runtime spin after a call


@final
@dataclass(frozen=True)
class Conditions:
    """Under which conditions models are measured.

    Args:
        batch_sizes: samples in a call.
        threads: numbers of threads within an operator; default: the physical cores that this process may use.
        seconds: about how long each batch size is timed for, all models together.
        window: for how long throughput is counted at each batch size, for each model; 0: not at all.
        starts: fresh processes in which load time and peak memory are taken; 0: not at all; below 6 without intervals.
        patience: seconds without a sign of life after which a measuring process is ended (a file may never end);
            infinite: none is.
    """

    batch_sizes: tuple[int, ...] = (1, 32)
    threads: tuple[int, ...] = ()
    seconds: float = 2.0
    window: float = 1.0
    starts: int = 6
    patience: float = 600.0

    def __post_init__(self) -> None:
        check_fields(self)
        counts = (*self.batch_sizes, *self.threads)
        if (
            not self.batch_sizes
            or min(counts) < 1
            or not 0 < self.seconds < math.inf
            or not 0 <= self.window < math.inf
            or self.starts < 0
            or not self.patience > 0
        ):
            raise InputError(
                "no conditions to measure under", where="Conditions", got=self,
                expected="batch sizes and threads from 1 on; seconds and patience above 0, window and starts not below",
            )  # fmt: skip
        object.__setattr__(self, "batch_sizes", tuple(dict.fromkeys(self.batch_sizes)))
        object.__setattr__(self, "threads", tuple(dict.fromkeys(self.threads)) or (default_threads(),))


@dataclass(frozen=True)
class Measured:
    """What was measured of all models."""

    models: tuple[BenchmarkModel, ...]
    timings: tuple[Timing, ...]
    comparisons: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


def measure_contenders(
    contenders: Sequence[Contender],
    conditions: Conditions,
    *,
    worker: str | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measure models of different names side by side.

    ``worker``: the module of a process that opens more than ONNX files. Raises InputError where inputs do not fit,
    ArtifactError for files that cannot be loaded, TersorError where a measuring process dies.
    """
    progress = progress or Progress()
    timings: list[Timing] = []
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as folder:
        specs = {each.name: each.stored(Path(folder)) for each in contenders}
        for threads in conditions.threads:
            seen = _timed(specs, conditions, threads, worker, progress)
            for batch, by_name in seen.items():
                for each in contenders:
                    timings.append(timing(each.name, int(batch), threads, by_name[each.name], each.facts))
                for base, other in combinations(contenders, 2):
                    comparisons.append(comparison(base.name, other.name, int(batch), threads, by_name))
        started = _started(specs, conditions, worker, progress)
    models = tuple(_model(each, started[each.name], conditions) for each in contenders)
    skipped = _skipped(contenders, conditions, models)
    return Measured(models, tuple(timings), tuple(comparisons), skipped, _notes(timings, comparisons))


def _is_file(spec: Mapping[str, Any]) -> bool:
    return spec["kind"] == "onnx"


def _worker(specs: Sequence[Mapping[str, Any]], work: str, other: str | None) -> str:
    """Files alone are measured without torch in the process."""
    if all(map(_is_file, specs)):
        return FILE_WORKERS[work]
    assert other is not None, "models that are no files come with a worker that opens them"
    return other


def _timed(
    specs: Mapping[str, Mapping[str, Any]], conditions: Conditions, threads: int, other: str | None, progress: Progress
) -> Any:
    """batch size → name → what the worker saw."""
    kinds = {_is_file(spec) for spec in specs.values()}
    request = {
        "work": "time", "models": {name: {**spec, "threads": threads} for name, spec in specs.items()},
        "batch_sizes": list(conditions.batch_sizes), "threads": threads, "seconds": conditions.seconds,
        "window": conditions.window, "pause": PAUSE if len(kinds) > 1 and threads > 1 else 0.0,
    }  # fmt: skip
    return run_fresh(
        _worker(list(specs.values()), "time", other), request, progress=progress,
        description=f"time {len(specs)} models, {threads} threads", ticks=SITTINGS * len(conditions.batch_sizes),
        patience=conditions.patience,
    )  # fmt: skip


def _started(
    specs: Mapping[str, Mapping[str, Any]], conditions: Conditions, other: str | None, progress: Progress
) -> dict[str, list[Any]]:
    """name → what each fresh process saw that opened this model alone; the models take turns."""
    turns = [name for number in range(conditions.starts) for name in list(specs)[:: -1 if number % 2 else 1]]
    threads, batch = conditions.threads[0], max(conditions.batch_sizes)
    found: dict[str, list[Any]] = {name: [] for name in specs}
    for name in progress.track(turns, "start afresh", len(turns)):
        spec = {**specs[name], "threads": threads}
        request = {"work": "start", "model": spec, "batch": batch, "threads": threads}
        found[name].append(run_fresh(_worker([spec], "start", other), request, patience=conditions.patience))
    return found


def _model(contender: Contender, started: Sequence[Mapping[str, Any]], conditions: Conditions) -> BenchmarkModel:
    batch, threads = max(conditions.batch_sizes), conditions.threads[0]

    def of(values: Sequence[float | None], unit: str, scale: float = 1.0, **more: Any) -> Measurement | None:
        known = [value for value in values if value is not None]
        if not known:
            return None
        return Measurement.of(typical(known), unit, len(known), scale=scale, batch=batch, threads=threads, **more)

    peaks = [max(0, each["peak"] - each["before"]) for each in started]
    return BenchmarkModel(
        name=contender.name, size_bytes=contender.size, **contender.facts,
        load_ms=of([each["load"] for each in started], "ms", 1e3),
        first_call_ms=of([each["first"] for each in started], "ms", 1e3),
        peak_memory_bytes=of(peaks, "bytes", method=METHOD),
        device_memory_bytes=of([each["device_peak"] for each in started], "bytes", method="peak of torch's allocator"),
    )  # fmt: skip


def _skipped(
    contenders: Sequence[Contender], conditions: Conditions, models: Sequence[BenchmarkModel]
) -> tuple[Skipped, ...]:
    found = []
    devices = dict.fromkeys(each.facts["device"] for each in contenders)
    if not conditions.window:
        found.append(Skipped(what="throughput and energy", why="not asked for (window 0)"))
    else:
        found += [
            Skipped(what="energy" if len(devices) == 1 else f"energy on {device}", why=why)
            for device in devices
            if (why := find_meter(device)[1])
        ]
    if not conditions.starts:
        found.append(Skipped(what="load time and peak memory", why="not asked for (starts 0)"))
    else:
        found += [
            Skipped(what=f"load time of {model.name}", why="it comes with the data, and nothing is read for it alone")
            for model in models
            if model.load_ms is None
        ]
    return tuple(found)


def _notes(timings: Sequence[Timing], comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    notes = []
    noisy = [each for each in comparisons if each.verdict == "too noisy to tell"]
    wide = {
        each.model
        for each in timings
        if each.p50_ms.low is None or each.p50_ms.high is None or each.p50_ms.high > TOO_WIDE * each.p50_ms.low
    }
    if noisy or wide:
        times = f"the times of {', '.join(sorted(wide))} vary by more than a quarter" if wide else "intervals are wide"
        said = f"{len(noisy)} of {len(comparisons)} comparisons cannot be told; " if noisy else ""
        fewer = "take one thread, " if any(each.threads > 1 for each in timings) else ""
        notes.append(f"the machine is noisy: {said}{times}. Quiet it, {fewer}or measure for longer")
    unsteady = sorted({each.model for each in timings if each.steady < 0.5})
    if unsteady:
        notes.append(f"calls of {', '.join(unsteady)} were mostly not alike yet when warm-up ended: measure for longer")
    shapes: dict[tuple[tuple[int, ...], ...], str] = {}
    for each in timings:
        if each.batch == timings[0].batch and each.threads == timings[0].threads:
            shapes.setdefault(each.outputs, each.model)
    if len(shapes) > 1:
        said = "; ".join(f"{name} {' '.join(map(str, map(list, outputs)))}" for outputs, name in shapes.items())
        notes.append(f"the outputs differ in shape, so the models may not do the same work: {said}")
    return tuple(notes)
