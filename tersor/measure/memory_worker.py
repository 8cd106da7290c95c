"""The fresh process of ``peak_memory``."""

from __future__ import annotations

import gc
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
from safetensors.numpy import load_file

from tersor.measure.fresh_process import Tick, serve
from tersor.measure.onnx_cpu import feed_of, open_session, run_session, tiled

RUNS = 3


def measure(request: dict[str, Any], tick: Tick) -> dict[str, int]:
    """Bytes: ``before`` loading the file, and the ``peak`` after a few runs. Request: file, inputs, batch, threads."""
    path = Path(request["file"])
    stored = load_file(request["inputs"])
    arrays = tiled(tuple(stored[str(number)] for number in range(len(stored))), request["batch"])
    gc.collect()
    _forget_peak()
    before = psutil.Process().memory_info().rss
    session = open_session(path, threads=request["threads"])
    feed = feed_of(session, arrays, str(path))
    for _ in range(RUNS):
        run_session(session, feed, str(path))
    return {"before": before, "peak": peak_bytes()}


def _forget_peak() -> None:
    """Let the kernel count the peak from here on, where it can (Linux)."""
    if platform.system() == "Linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not in every sandbox: the peak then begins at the process's start
            return


def peak_bytes() -> int:
    """The peak resident size of this process.

    On Linux from VmHWM: ru_maxrss begins there at the size of the process that started this one.
    """
    if platform.system() == "Linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


if __name__ == "__main__":
    serve(measure)
