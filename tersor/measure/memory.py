"""Peak memory of an ONNX file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.numpy import save_file
from torch import Tensor

from tersor.core.measurement import Measurement
from tersor.measure.fresh_process import run_fresh
from tersor.measure.onnx_cpu import BACKEND, default_threads


def peak_memory(path: Path, inputs: tuple[Tensor, ...], batch: int = 32, *, threads: int | None = None) -> Measurement:
    """Bytes that loading an ONNX file and running it adds to a fresh process, at the peak.

    The peak resident size after three runs minus the resident size before loading, ONNX Runtime and the inputs
    (samples, batch first, repeated to ``batch``) being there already. Raises InputError and ArtifactError as
    ``compare_latency`` does.
    """
    used = threads or default_threads()
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "inputs.safetensors"
        save_file({str(n): value.detach().cpu().contiguous().numpy() for n, value in enumerate(inputs)}, stored)
        request = {"file": str(Path(path).absolute()), "inputs": str(stored), "batch": batch, "threads": used}
        found = run_fresh("tersor.measure.memory_worker", request)
    conditions = {
        "batch": batch, "threads": used, "backend": BACKEND,
        "method": "peak resident size after loading and three runs, minus the resident size before loading",
    }  # fmt: skip
    return Measurement(max(0, found["peak"] - found["before"]), "bytes", n=1, conditions=conditions)
