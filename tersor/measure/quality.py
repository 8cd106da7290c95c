"""Quality: the task's metric sample by sample, agreement with the original, and the paired loss of quality."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tersor.core.check_batch import check_outputs, check_targets, metric_values, predicts_classes
from tersor.core.errors import InputError, user_code
from tersor.core.eval_mode import eval_mode
from tersor.core.loading import batches_of
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.core.randomness import seeded
from tersor.core.task import Batch, Task
from tersor.measure.runnable import on_device, outputs_of
from tersor.tensor.statistics import is_binary, mean_interval, paired_difference, wilson

Runnable = Callable[..., Any]
Split = Literal["test", "validation"]
MEAN = "Student's and Hall's"  # what conditions call the interval of a mean


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metric of each sample, float64 [n], and the predicted classes, int64 [n, …] (None: outputs are no scores).

    ``seconds``: how long it took. ``targets_key``: a checksum of the targets in their order, so that samples of two
    evaluations can be paired (None: not known).
    """

    values: NDArray[np.float64]
    predictions: NDArray[np.int64] | None
    n: int
    seconds: float
    split: str = "test"
    targets_key: int | None = None


def evaluate(
    runnable: Runnable,
    task: Task,
    split: Split = "test",
    progress: Progress | None = None,
    limit: int | None = None,
    seconds: float = math.inf,
) -> Evaluation:
    """Run a model (an nn.Module in eval mode, an OnnxRunnable, any callable) over a split of a completed task.

    ``limit``: only so many samples; ``seconds``: no batch after the one in which so many have passed. A loader that
    shuffles gives the same order each time. Raises InputError for an empty loader, a batch that cannot be read or run,
    targets out of range and a metric of a strange shape, VerificationError for outputs not finite.
    """
    loader: Iterable[Batch] | None = getattr(task, split)
    if loader is None or task.metric is None:
        raise InputError("the task is not completed", where=f"task.{split}", do="Call task.complete() first")
    start = time.perf_counter()
    values: list[Tensor] = []
    classes: list[Tensor | None] = []
    key = n = 0
    total = len(loader) if isinstance(loader, Sized) else None
    mode = eval_mode(runnable) if isinstance(runnable, nn.Module) else nullcontext()
    with mode, torch.no_grad(), seeded(0, loader):
        batches = batches_of(loader, f"task.{split}")
        for number, batch in enumerate((progress or Progress()).track(batches, f"evaluate {split}", total)):
            one = _evaluate_batch(runnable, task, batch, f"task.{split}, batch {number}")
            keep = len(one[0]) if limit is None else min(len(one[0]), limit - n)
            values.append(one[0][:keep])
            classes.append(None if one[1] is None else one[1][:keep])
            key = crc32(task.targets(batch)[:keep].cpu().contiguous().numpy().tobytes(), key)
            n += keep
            if n == limit or time.perf_counter() - start > seconds:
                break
    if n == 0:
        raise InputError(
            "there is nothing to evaluate", where=f"task.{split}", got="no sample", expected="at least one sample"
        )
    predicted = [value for value in classes if value is not None]
    predictions = torch.cat(predicted).numpy() if len(predicted) == len(classes) else None
    return Evaluation(torch.cat(values).numpy(), predictions, n, time.perf_counter() - start, split, key)


def _evaluate_batch(runnable: Runnable, task: Task, batch: Batch, where: str) -> tuple[Tensor, Tensor | None]:
    """(metric values [batch], predicted classes [batch, …] or None)."""
    if isinstance(runnable, nn.Module):
        batch = on_device(batch, next((value.device for value in runnable.parameters()), torch.device("cpu")))
    with user_code("the model does not run on this batch", where=where):
        targets, outputs = task.targets(batch), outputs_of(runnable, task, batch)
    outputs, targets = outputs.detach(), targets.to(outputs.device)
    check_outputs(outputs, len(targets), where)
    check_targets(task, outputs.shape, targets, where)
    values = metric_values(task, outputs, targets, where)
    classes = predicts_classes(outputs.shape, targets) and outputs.shape[-1] > 1
    return values, outputs.argmax(dim=-1).cpu() if classes else None


def quality(evaluation: Evaluation, task: Task) -> Measurement:
    """The task's metric: Wilson's interval where each value is 0 or 1, ``mean_interval`` otherwise."""
    metric = task.demand_metric()
    values, n = evaluation.values, evaluation.n
    low: float | None = None
    high: float | None = None
    if is_binary(values):
        (low, high), method = wilson(int(values.sum()), n), "Wilson"
    elif n > 1:
        (low, high), method = mean_interval(values), MEAN
    else:
        method = "none: one sample"
    conditions = {"split": evaluation.split, "interval": method}
    return Measurement(float(values.mean()), metric.unit, low, high, n, conditions=conditions)


def agreement(a: Evaluation, b: Evaluation) -> Measurement:
    """The fraction of predictions in which two models give the same class, with Wilson's interval."""
    _check_pairs(a, b)
    if a.predictions is None or b.predictions is None:
        raise InputError("agreement needs predicted classes", where="agreement", got="outputs that are no class scores")
    same = (a.predictions == b.predictions).ravel()
    conditions = {"split": b.split, "interval": "Wilson"}
    return Measurement(
        float(same.mean()), "fraction", *wilson(int(same.sum()), same.size), same.size, conditions=conditions
    )


def paired_drop(original: Evaluation, compressed: Evaluation, task: Task) -> Measurement:
    """How much worse the compressed model is on the same samples; positive is worse, whichever way the metric points.

    In percentage points where the metric is a fraction, in its own unit otherwise. The interval is that of the paired
    differences: Newcombe's for values 0 and 1, ``mean_interval`` otherwise.
    """
    metric = task.demand_metric()
    _check_pairs(original, compressed)
    better, worse = original.values, compressed.values
    if not metric.higher_is_better:
        better, worse = worse, better
    estimate = paired_difference(better, worse)
    fraction = metric.unit == "fraction"
    method = "Newcombe, paired" if is_binary(better) and is_binary(worse) else f"{MEAN}, of paired differences"
    return Measurement.of(
        estimate, "percentage points" if fraction else metric.unit, original.n, scale=100 if fraction else 1,
        split=compressed.split, interval=method, positive="worse",
    )  # fmt: skip


def _check_pairs(a: Evaluation, b: Evaluation) -> None:
    if a.n != b.n or a.split != b.split:
        got = f"{a.n} samples of {a.split} and {b.n} of {b.split}"
        raise InputError(
            "two evaluations cannot be paired", where="quality", got=got, expected="the same samples twice"
        )
    if a.targets_key is not None and b.targets_key is not None and a.targets_key != b.targets_key:
        raise InputError(
            "two evaluations cannot be paired: their targets differ", where=f"task.{a.split}",
            got="another order or other samples at the second pass", expected="the same samples in the same order",
            do="Give the loader shuffle=False, and the dataset no randomness of its own",
        )  # fmt: skip
