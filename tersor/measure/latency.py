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
from tersor.measure.latency_worker import TICKS
from tersor.measure.onnx_cpu import BACKEND, default_threads
from tersor.tensor.statistics import block_quantile, quantile_interval, ratio_interval

Blocks = NDArray[np.float64]  # [rounds, calls] seconds


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
    batch size takes after warm-up (a file slow enough to need more gets 7 calls). Returns name → measurement:
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
            ticks=TICKS * len(batch_sizes),
        )  # fmt: skip
    return _measurements(timed, used)


def _measurements(
    timed: Mapping[str, Mapping[str, list[list[float]]]], threads: int
) -> dict[str, dict[str, Measurement]]:
    found: dict[str, dict[str, Measurement]] = {}
    for batch, by_name in timed.items():
        baseline = np.array(next(iter(by_name.values())))
        for number, (name, seconds) in enumerate(by_name.items()):
            conditions = {"batch": int(batch), "threads": threads, "backend": BACKEND}
            blocks = np.array(seconds)
            here = found.setdefault(name, {})
            here |= _of_one(blocks, int(batch), conditions)
            if number > 0:
                here[f"speedup_batch_{batch}"] = _speedup(baseline, blocks, conditions)
    return found


def _of_one(blocks: Blocks, batch: int, conditions: dict[str, Any]) -> dict[str, Measurement]:
    typical = np.median(blocks, axis=1)  # of each round: calls of one round resemble each other, rounds less so
    median = float(np.median(typical))
    low, high = quantile_interval(typical, 0.5)
    p95 = block_quantile(blocks, 0.95)
    conditions = {**conditions, "rounds": len(blocks)}
    n = blocks.size
    return {
        f"latency_ms_batch_{batch}": Measurement(
            1e3 * median, "ms", _known(1e3 * low), _known(1e3 * high), n, conditions=conditions
        ),
        f"latency_ms_batch_{batch}_p95": Measurement(
            1e3 * p95.value, "ms", _known(1e3 * p95.low), _known(1e3 * p95.high), n, conditions=conditions
        ),
        f"throughput_batch_{batch}": Measurement(
            batch / median, "samples/s", _known(batch / high), _known(batch / low), n, conditions=conditions
        ),
    }


def _speedup(baseline: Blocks, blocks: Blocks, conditions: dict[str, Any]) -> Measurement:
    ratio = ratio_interval(np.median(baseline, axis=1), np.median(blocks, axis=1))
    n = len(blocks)
    return Measurement(
        ratio.value, "×", _known(ratio.low), _known(ratio.high), n, conditions={**conditions, "rounds": n}
    )


def _known(end: float) -> float | None:
    return end if math.isfinite(end) else None
