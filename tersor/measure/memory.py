"""Peak memory of an ONNX file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from tersor.core.measurement import Measurement
from tersor.measure.contender import file_spec, store_inputs
from tersor.measure.fresh_process import run_fresh
from tersor.measure.onnx_cpu import BACKEND, default_threads

METHOD = "peak resident size after loading and three runs, minus the resident size before loading"


def peak_memory(path: Path, inputs: tuple[Tensor, ...], batch: int = 32, *, threads: int | None = None) -> Measurement:
    """Bytes that loading an ONNX file and running it adds to a fresh process, at the peak.

    The peak resident size after three runs minus the resident size before loading, ONNX Runtime and the inputs
    (samples, batch first, repeated to ``batch``) being there already. Raises InputError and ArtifactError as
    ``compare_latency`` does.
    """
    used = threads or default_threads()
    with tempfile.TemporaryDirectory() as folder:
        model = file_spec(path, store_inputs(inputs, Path(folder)))
        found = run_fresh("tersor.measure.memory_worker", {"model": model, "batch": batch, "threads": used})
    conditions = {"batch": batch, "threads": used, "backend": BACKEND, "method": METHOD}
    return Measurement(max(0, found["peak"] - found["before"]), "bytes", n=1, conditions=conditions)
