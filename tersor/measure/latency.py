"""Latency of ONNX files, measured in turns with a baseline so that what slows the machine slows all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.measure.contender import file_spec, store_inputs
from tersor.measure.fresh_process import run_fresh
from tersor.measure.latency_worker import SITTINGS
from tersor.measure.onnx_cpu import BACKEND, default_threads
from tersor.tensor.statistics import Estimate, mean_interval, quantile_interval, ratio_interval

Times = NDArray[np.float64]  # [sittings, rounds, calls] seconds


def compare_latency(
    files: Mapping[str, Path],
    inputs: tuple[Tensor, ...],
    *,
    batch_sizes: tuple[int, ...] = (1, 32),
    threads: int | None = None,
    seconds: float = 2.0,
    progress: Progress | None = None,
) -> dict[str, dict[str, Measurement]]:
    """Time ONNX files in turns (A B B A …) in a fresh process; the first file is the baseline of the others.

    ``inputs``: a batch of samples, batch first, repeated to each of ``batch_sizes``. ``seconds``: about how long each
    batch size takes after warm-up, in 10 sittings (slow files: 6 sittings of one call, however long). Each sitting
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
        stored = store_inputs(inputs, Path(folder))
        request = {
            "models": {name: file_spec(path, stored) for name, path in files.items()},
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
        baseline = np.array(next(iter(by_name.values()))["times"])
        for number, (name, seen) in enumerate(by_name.items()):
            conditions = {"batch": int(batch), "threads": threads, "backend": BACKEND}
            times = np.array(seen["times"])
            here = found.setdefault(name, {})
            here |= _of_one(times, int(batch), conditions)
            if number > 0:
                here[f"speedup_batch_{batch}"] = _speedup(baseline, times, conditions)
    return found


def _of_one(times: Times, batch: int, conditions: dict[str, Any]) -> dict[str, Measurement]:
    p50, p95 = median_call(times), percentile(times, 0.95)
    conditions = {**conditions, "sittings": len(times)}
    rates = Estimate(*(batch / value for value in (p50.value, p50.high, p50.low)))
    return {
        f"latency_ms_batch_{batch}": Measurement.of(p50, "ms", times.size, scale=1e3, **conditions),
        f"latency_ms_batch_{batch}_p95": Measurement.of(p95, "ms", times.size, scale=1e3, **conditions),
        f"throughput_batch_{batch}": Measurement.of(rates, "samples/s", times.size, **conditions),
    }


def medians(times: Times) -> NDArray[np.float64]:
    """The median call of each sitting."""
    return np.median(_by_sitting(times), axis=1)


def median_call(times: Times) -> Estimate:
    """The median call of a typical sitting.

    Calls of one sitting resemble each other, so that the interval is that of the median over sittings.
    """
    each = medians(times)
    return Estimate(float(np.median(each)), *quantile_interval(each, 0.5))


def mean_call(times: Times) -> Estimate:
    """The mean call, with the interval of the mean over sittings."""
    each = _by_sitting(times).mean(axis=1)
    low, high = mean_interval(each)
    return Estimate(float(each.mean()), max(low, 0.0), high)


def percentile(times: Times, q: float) -> Estimate:
    """The ``q``-quantile of a typical sitting; of all calls where sittings have too few calls for one of their own."""
    calls = _by_sitting(times)
    if calls.shape[1] < round(1 / (1 - q)):
        return Estimate(float(np.quantile(calls, q)), *quantile_interval(calls.ravel(), q))
    each = np.quantile(calls, q, axis=1)
    return Estimate(float(np.median(each)), *quantile_interval(each, 0.5))


def _by_sitting(times: Times) -> Times:
    return times.reshape(len(times), -1)


def _speedup(baseline: Times, times: Times, conditions: dict[str, Any]) -> Measurement:
    ratio = ratio_interval(medians(baseline), medians(times))
    return Measurement.of(ratio, "×", len(times), **{**conditions, "sittings": len(times)})
