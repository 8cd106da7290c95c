"""Latency and bytes of usual architectures: fp32, bf16, Tersor's int8 and onnxruntime's own, in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.claims import Claim
from benchmarks.quantization.networks import CALIBRATION, OF_LINEAR_LAYERS, network_task
from benchmarks.quantization.peers import calibration_inputs, onnxruntime_dynamic, onnxruntime_static
from benchmarks.tables import table
from tersor.core.measurement import Measurement
from tersor.core.place import ByType
from tersor.core.step import Context, Pipeline
from tersor.core.task import Task
from tersor.export.half import store_file_half
from tersor.export.onnx import export_onnx
from tersor.measure.latency import compare_latency
from tersor.quantize.dynamic import QuantizeDynamically
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.quantize import Quantize
from tersor.quantize.weight_only import QuantizeWeights

FP32, BF16, OURS, PEER = "fp32", "bf16, computed in fp32", "int8", "int8, onnxruntime's quantize_static"
DYNAMIC, DYNAMIC_PEER = "int8, dynamic", "int8, onnxruntime's quantize_dynamic"
FASTER, SMALLER = 2.3, 3.8


@dataclass(frozen=True)
class Timed:
    """A file of a network: what it weighs and how long a call takes; ``speedup``: over fp32 (None for itself)."""

    network: str
    file: str
    size_bytes: int
    median: Measurement
    p95: Measurement
    speedup: Measurement | None


def timed(name: str, folder: Path, seconds: float, batch: int = 1) -> list[Timed]:
    """Make a network's files and time them in turns; those of dynamic int8 where it has no convolutions to speak of."""
    task = network_task(name)
    assert task.example_inputs is not None
    folder.mkdir(parents=True, exist_ok=True)
    stem = name.split(",")[0].lower().replace(" ", "-")
    kinds = [FP32, BF16, OURS, PEER, *([DYNAMIC, DYNAMIC_PEER] if name in OF_LINEAR_LAYERS else [])]
    files = {kind: folder / f"{stem}-{number}.onnx" for number, kind in enumerate(kinds)}
    export_onnx(task.model, task.example_inputs, files[FP32], output_of=task.output)
    store_file_half(files[FP32], files[BF16])
    tables = (QuantizeWeights(where=ByType("Embedding")),) if _has_tables(task) else ()
    _export(task, Pipeline((FoldBatchNorm(), Quantize(learn=False), *tables)), files[OURS])
    onnxruntime_static(files[FP32], files[PEER], calibration_inputs(task, CALIBRATION))
    if DYNAMIC in files:
        _export(task, Pipeline((QuantizeDynamically(), QuantizeWeights())), files[DYNAMIC])
        onnxruntime_dynamic(files[FP32], files[DYNAMIC_PEER])
    found = compare_latency(files, task.example_inputs, batch_sizes=(batch,), seconds=seconds)
    return [
        Timed(
            name, kind, path.stat().st_size, found[kind][f"latency_ms_batch_{batch}"],
            found[kind][f"latency_ms_batch_{batch}_p95"], found[kind].get(f"speedup_batch_{batch}"),
        )
        for kind, path in files.items()
    ]  # fmt: skip


def _has_tables(task: Task) -> bool:
    """Whether the network looks embeddings up, which are quantised alone."""
    return any(isinstance(module, nn.Embedding) for module in task.model.modules())


def _export(task: Task, steps: Pipeline, to: Path) -> None:
    assert task.example_inputs is not None
    export_onnx(steps.run(task.model, task, Context()).model, task.example_inputs, to, output_of=task.output)


def claims(rows: Sequence[Timed]) -> list[Claim]:
    """That ResNet-18's int8 file is faster and smaller by what was promised."""
    of: Mapping[str, Timed] = {row.file: row for row in rows if row.network == "ResNet-18"}
    if OURS not in of:
        return []
    speedup, ratio = of[OURS].speedup, of[FP32].size_bytes / of[OURS].size_bytes
    assert speedup is not None, "only fp32 has none"
    return [
        Claim(f"ResNet-18, batch 1: int8 is {FASTER:g} times faster than fp32", _times(speedup),
              speedup.value >= FASTER),
        Claim(f"ResNet-18: the int8 file is {SMALLER:g} times smaller", f"{ratio:.2f}×", ratio >= SMALLER),
    ]  # fmt: skip


def rows_table(rows: Sequence[Timed]) -> str:
    """A row for each file."""
    sizes = {row.network: row.size_bytes for row in rows if row.file == FP32}
    lines = [
        [
            row.network if row.file == FP32 else "", row.file, f"{row.size_bytes / 1e6:.2f}",
            f"{sizes[row.network] / row.size_bytes:.2f}×", f"{row.median.value:.2f}", f"{row.p95.value:.2f}",
            _times(row.speedup) if row.speedup else "",
        ]
        for row in rows
    ]  # fmt: skip
    return table(["network", "file", "MB", "smaller", "median, ms", "95 %, ms", "faster than fp32"], lines)


def _times(found: Measurement) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.2f}×"
    return f"{found.value:.2f}× ({found.low:.2f}–{found.high:.2f})"
