"""Pruning a weights file: peak memory, and time against reading it twice and writing it once, interleaved.

    python -m benchmarks.weights_file [--gib 4] [--repeats 3] [--folder /tmp]

Needs twice the size on the disk, and gives it back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.tables import table, write

SPARSITY = 0.9
SIDE = 4096  # tensors are [4096, 4096] float32, 64 MiB each
PIECE = 16 * 2**20


def generate(path: Path, gib: float) -> int:
    """A safetensors file of normal weights whose scale differs from tensor to tensor; how many weights it has."""
    count = max(1, round(gib * 2**30 / (SIDE * SIDE * 4)))
    size = SIDE * SIDE * 4
    header = {
        f"layers.{n}.weight": {"dtype": "F32", "shape": [SIDE, SIDE], "data_offsets": [n * size, (n + 1) * size]}
        for n in range(count)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for n in range(count):
            file.write(rng.standard_normal((SIDE, SIDE), dtype=np.float32) * np.float32(0.02 * (1 + n % 8 / 8)))
    return count * SIDE * SIDE


def forget(path: Path, out: Path) -> None:
    """Ask the system to drop the source from its cache, so that the disk is read; and remove the last output."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    out.unlink(missing_ok=True)
    os.sync()


def plain_loop(source: Path, out: Path) -> float:
    """Seconds to read the file, read it again and write it, fsync included."""
    forget(source, out)
    begun = time.perf_counter()
    buffer = bytearray(PIECE)
    with open(source, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    with open(source, "rb", buffering=0) as file, open(out, "wb", buffering=0) as target:
        while got := file.readinto(buffer):
            target.write(memoryview(buffer)[:got])
        os.fsync(target.fileno())
    return time.perf_counter() - begun


def prune(source: Path, out: Path, scope: str) -> dict[str, Any]:
    """Seconds, peak memory and zeros of one run, in a process of its own."""
    forget(source, out)
    command = [sys.executable, "-m", "benchmarks.weights_file", "--child", str(source), str(out), scope]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def child(source: str, out: str, scope: str) -> None:
    from tersor.prune.files.prune import PruneFile

    settings = PruneFile(SPARSITY, scope)  # type: ignore[arg-type]
    before = _peak()
    begun = time.perf_counter()
    done = settings.run(source, out)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "peak": _peak(), "before": before, "zeros": done.zeros}))


def _peak() -> int:
    """Bytes: the largest resident size of this process so far (Linux); the system's file cache is not in it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def zeros_in(path: Path) -> int:
    """Zeros in a file, counted without Tersor."""
    found = 0
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while data := file.read(PIECE):
            found += int(np.count_nonzero(np.frombuffer(data, np.float32) == 0))
    return found


def measure(folder: Path, gib: float, repeats: int) -> str:
    source, out = folder / "source.safetensors", folder / "out.safetensors"
    weights = generate(source, gib)
    expected = int(SPARSITY * weights + 1e-9)
    runs: dict[str, list[dict[str, Any]]] = {"layer": [], "global": []}
    plain = []
    for _ in range(repeats):
        plain.append(plain_loop(source, out))
        for scope, found in runs.items():
            found.append(prune(source, out, scope))
            assert found[-1]["zeros"] == zeros_in(out), "the zeros that were told are those in the file"
    assert all(run["zeros"] == expected for run in runs["global"]), "the global count is exact"
    rows = [["reading twice, writing once (plain loop)", _seconds(plain), "1", "–", "–"]]
    for scope, found in runs.items():
        seconds = [run["seconds"] for run in found]
        ratio = [a / b for a, b in zip(seconds, plain, strict=True)]
        peak, before = max(run["peak"] for run in found), max(run["before"] for run in found)
        rows.append(
            [f"scope {scope}", _seconds(seconds), f"{median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})",
             f"{peak / 2**20:.0f} MiB", f"{(peak - before) / 2**20:.0f} MiB"]
        )  # fmt: skip
    head = ["", "seconds", "times the plain loop", "peak memory of the process", "of it, beside the imports"]
    return (
        f"{source.stat().st_size / 2**30:.2f} GiB, {weights:,} fp32 weights in tensors of 64 MiB, "
        f"{SPARSITY:.0%} zeros; the global count was exact in every run ({expected:,}), "
        "counted in the file without Tersor.\n\n"
        f"{table(head, rows)}\n\nMedian of {repeats} interleaved runs (smallest to largest), each in a process of "
        "its own; the source is dropped from the system's cache before each, and each ends with fsync."
    )


def _seconds(values: list[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are made and deleted; default: the system's")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    folder = Path(tempfile.mkdtemp(prefix="tersor-weights-", dir=given.folder))
    try:
        body = measure(folder, given.gib, given.repeats)
        write("weights-file", "Pruning a weights file", body, by="make bench-weights-file")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
