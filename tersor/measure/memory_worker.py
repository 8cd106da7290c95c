"""The fresh process of ``peak_memory`` and of a benchmark's starts: open one model, run it a few times."""

from __future__ import annotations

import gc
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tersor.measure.fresh_process import Tick, serve
from tersor.measure.onnx_cpu import share_threads
from tersor.measure.opened import FILES, Kinds

RUNS = 3


def measure(request: dict[str, Any], tick: Tick, kinds: Kinds = FILES) -> dict[str, float | None]:
    """Bytes ``before`` opening the model and at the ``peak`` after a few runs, seconds to open it and of the first run.

    ``load`` is None where nothing was read, because the model came with the data; its weights are then taken off
    ``before``. Request: model (its spec), batch, threads.
    """
    share_threads(request["threads"])
    opener = kinds[request["model"]["kind"]](request["model"])
    gc.collect()
    _forget_peak()
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    opened = opener()
    loaded = time.perf_counter() - start
    call = opened.call(request["batch"])
    start = time.perf_counter()
    call.first()
    first = time.perf_counter() - start
    for _ in range(RUNS - 1):
        call.run()
    return {
        "before": before - opened.resident, "peak": peak_bytes(), "device_peak": opened.device_bytes(),
        "load": None if opened.came_open else loaded, "first": first,
    }  # fmt: skip


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
