"""Everything that is measured after a step, on the very ONNX file that it would ship."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import nn

from tersor.core.errors import ArtifactError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.files import write_atomically
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.measure.compute import layer_table, macs
from tersor.measure.latency import compare_latency
from tersor.measure.memory import peak_memory
from tersor.measure.quality import Evaluation, Split, agreement, evaluate, paired_drop, quality
from tersor.measure.session import OnnxRunnable
from tersor.measure.size import file_bytes, nonzeros, parameters

BATCH_SIZES = (1, 32)
SPLITS: tuple[Split, ...] = ("validation", "test")


@dataclass(frozen=True)
class Timing:
    """How long latency is measured: ``seconds`` for each batch size, at ``threads`` threads (None: all cores)."""

    seconds: float = 2.0
    threads: int | None = None


def measure_step(
    model: nn.Module, folder: Path, baseline: Path, task: Task, timing: Timing, progress: Progress
) -> tuple[dict[str, Measurement], tuple[dict[str, Any], ...]]:
    """Measure the ONNX file in ``folder`` against the one in ``baseline``; the layer table comes along.

    Test and validation are evaluated on the ONNX file; latency is interleaved with the baseline's in a fresh process.
    """
    example = task.demand_example()
    metric = task.demand_metric()
    file = folder / "model.onnx"
    found = {
        "size_bytes": file_bytes(file),
        "parameters": parameters(model),
        "nonzeros": nonzeros(model),
        "macs": macs(model, example),
    }
    runnable = OnnxRunnable(file)
    for split in SPLITS:
        _keep(folder / f"{split}.safetensors", evaluate(runnable, task, split=split, progress=progress))
    test, original = stored_evaluation(folder, "test"), stored_evaluation(baseline, "test")
    found[metric.name] = quality(test, task)
    found[f"validation_{metric.name}"] = quality(stored_evaluation(folder, "validation"), task)
    found["drop_points"] = paired_drop(original, test, task)
    if test.predictions is not None and original.predictions is not None:
        found["agreement"] = agreement(original, test)
    if test.predictions is not None and any(isinstance(module, FakeQuantize) for module in model.modules()):
        found["onnx_agreement"] = agreement(evaluate(model, task, split="test", progress=progress), test)
    found |= _latency(file, baseline / "model.onnx", task, timing, progress)
    sample = tuple(value[:1] for value in example)
    found["peak_memory_bytes"] = peak_memory(file, sample, batch=max(BATCH_SIZES), threads=timing.threads)
    return found, layer_table(model, example)


def _latency(file: Path, baseline: Path, task: Task, timing: Timing, progress: Progress) -> dict[str, Measurement]:
    example = task.demand_example()
    sample = tuple(value[:1] for value in example)
    files = {"baseline": baseline, "step": file}
    timed = compare_latency(
        files, sample, batch_sizes=BATCH_SIZES, threads=timing.threads, seconds=timing.seconds, progress=progress
    )
    return timed["step"]


def _keep(path: Path, evaluation: Evaluation) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {"values": evaluation.values}
    if evaluation.predictions is not None:
        arrays["predictions"] = evaluation.predictions
    if evaluation.targets_key is not None:
        arrays["targets_key"] = np.array([evaluation.targets_key], dtype=np.int64)
    write_atomically(path, save(arrays))


def stored_evaluation(folder: Path, split: str) -> Evaluation:
    """The per-sample values and predictions that a step's evaluation left in its folder."""
    path = folder / f"{split}.safetensors"
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            "a stored evaluation cannot be read", where=str(path), got=error, do="Put the file back, or compress again"
        ) from None
    key = arrays.get("targets_key")
    return Evaluation(
        arrays["values"],
        arrays.get("predictions"),
        len(arrays["values"]),
        0.0,
        split,
        None if key is None else int(key[0]),
    )
