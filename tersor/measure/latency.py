"""Latency of ONNX files, measured in turns with a baseline so that what slows the machine slows all of them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.measure.fresh_process import run_fresh
from tersor.measure.latency_worker import SITTINGS
from tersor.measure.onnx_cpu import BACKEND, default_threads
from tersor.tensor.statistics import Estimate, quantile_interval, ratio_interval

Times = NDArray[np.float64]  # [sittings, rounds, calls] seconds
FEWEST_CALLS_FOR_P95 = 20


def compare_latency(
    files: Mapping[str, Path],
    inputs: tuple[Tensor, ...],
    *,
    batch_sizes: tuple[int, ...] = (1, 32),
    threads: int | None = None,
    seconds: float = 2.0,
    progress: Progress | None = None,
) -> dict[str, dict[str, Measurement]]:
    """Time ONNX files in turns (A B A B …) in a fresh process; the first file is the baseline of the others.

    ``inputs``: a batch of samples, batch first, repeated to each of ``batch_sizes``. ``seconds``: about how long each
    batch size takes after warm-up, in 9 sittings (slow files: 6 sittings of one call, however long). Each sitting
    opens the files afresh, and intervals are those of the median over sittings. Returns name → measurement:
    latency_ms_batch_B, latency_ms_batch_B_p95, throughput_batch_B, and speedup_batch_B for all but the baseline.

    Raises InputError where a file's inputs do not fit (a fixed batch dimension, for instance), ArtifactError where it
    cannot be loaded.
    """
    if not files or not inputs or any(size < 1 for size in batch_sizes) or seconds <= 0:
        raise InputError(
            "nothing to time", where="compare_latency",
            got=f"{len(files)} files, {len(inputs)} inputs, {batch_sizes=}, {seconds=}",
            expected="at least one file and input, batch sizes and seconds above zero",
        )  # fmt: skip
    used = threads or default_threads()
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "inputs.safetensors"
        save_file({str(n): value.detach().cpu().contiguous().numpy() for n, value in enumerate(inputs)}, stored)
        request = {
            "files": {name: str(Path(path).absolute()) for name, path in files.items()}, "inputs": str(stored),
            "batch_sizes": list(batch_sizes), "threads": used, "seconds": seconds,
        }  # fmt: skip
        timed = run_fresh(
            "tersor.measure.latency_worker", request, progress=progress, description="measure latency",
            ticks=SITTINGS * len(batch_sizes),
        )  # fmt: skip
    return _measurements(timed, used)


def _measurements(timed: Mapping[str, Mapping[str, Any]], threads: int) -> dict[str, dict[str, Measurement]]:
    found: dict[str, dict[str, Measurement]] = {}
    for batch, by_name in timed.items():
        baseline = np.array(next(iter(by_name.values())))
        for number, (name, seconds) in enumerate(by_name.items()):
            conditions = {"batch": int(batch), "threads": threads, "backend": BACKEND}
            times = np.array(seconds)
            here = found.setdefault(name, {})
            here |= _of_one(times, int(batch), conditions)
            if number > 0:
                here[f"speedup_batch_{batch}"] = _speedup(baseline, times, conditions)
    return found


def _of_one(times: Times, batch: int, conditions: dict[str, Any]) -> dict[str, Measurement]:
    # Calls of one sitting resemble each other: the interval is that of the median over sittings.
    medians = _medians(times)
    median = float(np.median(medians))
    low, high = quantile_interval(medians, 0.5)
    p95 = _percentile_95(times)
    conditions = {**conditions, "sittings": len(times)}

    def measurement(value: float, unit: str, low: float, high: float) -> Measurement:
        return Measurement(value, unit, _known(low), _known(high), times.size, conditions=conditions)

    return {
        f"latency_ms_batch_{batch}": measurement(1e3 * median, "ms", 1e3 * low, 1e3 * high),
        f"latency_ms_batch_{batch}_p95": measurement(1e3 * p95.value, "ms", 1e3 * p95.low, 1e3 * p95.high),
        f"throughput_batch_{batch}": measurement(batch / median, "samples/s", batch / high, batch / low),
    }


def _medians(times: Times) -> NDArray[np.float64]:
    """The median call of each sitting."""
    return np.median(times.reshape(len(times), -1), axis=1)


def _percentile_95(times: Times) -> Estimate:
    """The 95 % percentile of a typical sitting; of all calls where sittings have too few calls for one of their own."""
    calls = times.reshape(len(times), -1)
    if calls.shape[1] < FEWEST_CALLS_FOR_P95:
        return Estimate(float(np.quantile(calls, 0.95)), *quantile_interval(calls.ravel(), 0.95))
    each = np.quantile(calls, 0.95, axis=1)
    return Estimate(float(np.median(each)), *quantile_interval(each, 0.5))


def _speedup(baseline: Times, times: Times, conditions: dict[str, Any]) -> Measurement:
    ratio = ratio_interval(_medians(baseline), _medians(times))
    n = len(times)
    return Measurement(
        ratio.value, "×", _known(ratio.low), _known(ratio.high), n, conditions={**conditions, "sittings": n}
    )


def _known(end: float) -> float | None:
    return end if math.isfinite(end) else None
