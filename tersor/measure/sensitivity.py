"""How much each layer bears: loss and metric with one layer pruned at a time, at several sparsities."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from tersor.core.check_batch import metric_values
from tersor.core.device import device_of
from tersor.core.edit import Mask
from tersor.core.errors import InputError, user_code
from tersor.core.loading import batches_of
from tersor.core.metric import default_loss
from tersor.core.place import TensorPlace, stored_at
from tersor.core.plan import Skip
from tersor.core.progress import Progress
from tersor.core.randomness import seeded
from tersor.core.task import Batch, Task
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import PerLayer

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Point:
    """The whole model's loss and metric with ``zeros`` of one weight's numbers at zero (infinite and NaN where its
    outputs are not finite). ``asked``: the fraction that was asked for, ``sparsity`` the one that it is."""

    asked: float
    sparsity: float
    zeros: int
    loss: float
    metric: float


@dataclass(frozen=True)
class LayerCurve:
    """One weight: its place, how many numbers it has, and its points, sparsity growing."""

    place: str
    parameters: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Loss and metric of the model as it is, a curve for each weight, and what was passed over.

    ``samples``: of validation. ``left_out``: how many measurements there was no time for.
    """

    loss: float
    metric: float
    higher_is_better: bool
    samples: int
    layers: tuple[LayerCurve, ...]
    skips: tuple[Skip, ...] = ()
    left_out: int = 0

    def drop(self, point: Point) -> float:
        """How much worse the metric is at a point, in its own unit; infinite where it is no number."""
        worse = self.metric - point.metric if self.higher_is_better else point.metric - self.metric
        return worse if math.isfinite(worse) else math.inf

    def increases(self, curve: LayerCurve) -> list[float]:
        """The increase of the loss at each point, never falling: where more zeros seem to help, that is noise."""
        rises = (point.loss - self.loss for point in curve.points)
        return list(accumulate(rises, max, initial=0.0))[1:]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values; what is not finite is null."""
        plain: dict[str, Any] = plain_json(dataclasses.asdict(self))
        return plain


@dataclass(frozen=True)
class Probe:
    """What is measured: ``sparsities`` of each weight, chosen as ``prune`` chooses (its score, pattern and where).

    On the first ``samples`` validation samples (whole batches), for about ``seconds`` (None: as long as it takes; the
    model as it is and one point are always measured). Raises InputError for settings out of range.
    """

    sparsities: Sequence[float] = SPARSITIES
    prune: Prune = field(default_factory=Prune)
    samples: int = 1024
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError("too few", where="Probe.samples", got=self.samples, expected="1 or more")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError("no time", where="Probe.seconds", got=self.seconds, expected="more than 0")
        if not self.sparsities or not all(0 < sparsity < 1 for sparsity in self.sparsities):
            raise InputError("not fractions", where="Probe.sparsities", got=self.sparsities, expected="within (0, 1)")

    def prunes(self) -> dict[float, Prune]:
        """What prunes for each sparsity, growing; a pattern that has its own gives one."""
        alone = dataclasses.replace(self.prune, sparsity=None, scope=PerLayer(), may_empty=True)
        if alone.pattern.sparsity is not None:
            return {alone.pattern.sparsity: alone}
        return {sparsity: dataclasses.replace(alone, sparsity=sparsity) for sparsity in sorted(set(self.sparsities))}


def sensitivity(
    model: nn.Module, task: Task, probe: Probe = Probe(), *, progress: Progress | None = None
) -> Sensitivity:
    """Prune one weight of ``model`` at a time (on a copy), at each sparsity, and evaluate the whole model.

    Masks are chosen once for each sparsity. Lower sparsities of all weights come first, so that where time runs out
    every weight has the same points, or one less. Raises what ``Prune`` raises, and InputError for a task that is not
    completed and batches that cannot be run.
    """
    begun = time.monotonic()
    model = copy.deepcopy(model).eval()
    batches = validation_batches(task, model, probe.samples)
    loss, metric = judge(model, task, batches)
    plans = {sparsity: prune.plan(model, task) for sparsity, prune in probe.prunes().items()}
    edits = [(asked, edit) for asked, plan in plans.items() for edit in plan.edits if isinstance(edit, Mask)]
    points: dict[TensorPlace, list[Point]] = {}
    done = 0
    for asked, edit in (progress or Progress()).track(edits, "sensitivity of layers", len(edits)):
        if done and probe.seconds is not None and time.monotonic() - begun > probe.seconds:
            break
        stored = stored_at(model, edit.place).detach()
        with _masked(stored, edit.keep):
            zeros = int((~edit.keep).sum())
            share = zeros / edit.keep.numel()
            points.setdefault(edit.place, []).append(Point(asked, share, zeros, *judge(model, task, batches)))
        done += 1
    sizes = {edit.place: edit.keep.numel() for _, edit in edits}
    curves = tuple(LayerCurve(str(place), sizes[place], tuple(found)) for place, found in points.items())
    assert task.metric is not None, "a completed task has a metric"
    samples = sum(len(task.targets(batch)) for batch in batches)
    skips = tuple(dict.fromkeys(skip for plan in plans.values() for skip in plan.skips))
    return Sensitivity(loss, metric, task.metric.higher_is_better, samples, curves, skips, len(edits) - done)


class _masked:
    """Within, a tensor is zero where ``keep`` is false; at the end it is as it was."""

    def __init__(self, tensor: Tensor, keep: Tensor):
        self.tensor, self.gone = tensor, ~keep.to(tensor.device)

    def __enter__(self) -> None:
        self.hidden = self.tensor[self.gone]
        self.tensor[self.gone] = 0

    def __exit__(self, *_: object) -> None:
        self.tensor[self.gone] = self.hidden


def validation_batches(task: Task, model: nn.Module, samples: int) -> list[Batch]:
    """The first batches that together have at least ``samples`` samples, on the model's device."""
    if task.validation is None or task.metric is None:
        raise InputError("the task is not completed", where="task.validation", do="Call task.complete() first")
    found: list[Batch] = []
    seen = 0
    with seeded(0, task.validation):
        for batch in batches_of(task.validation, "task.validation"):
            found.append(send_to_device(batch, device_of(model)))
            seen += len(task.targets(batch))
            if seen >= samples:
                break
    if not seen:
        raise InputError("the loader is empty", where="task.validation", got="no sample")
    return found


def judge(model: nn.Module, task: Task, batches: Sequence[Batch]) -> tuple[float, float]:
    """(loss, metric), means over samples; infinite and NaN where outputs are not finite."""
    losses, values, count = 0.0, 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            where = f"task.validation, batch {number}"
            with user_code("the model does not run on this batch", where=where):
                outputs, targets = task.outputs(model, batch), task.targets(batch)
                loss = default_loss(outputs, targets) if task.loss is None else task.loss_of(model, batch)
            if not bool(torch.isfinite(outputs).all() and torch.isfinite(loss)):
                return math.inf, math.nan
            losses += float(loss) * len(targets)
            values += float(metric_values(task, outputs, targets, where).sum())
            count += len(targets)
    return losses / count, values / count


def plain_json(value: Any) -> Any:
    """Nested mappings and sequences as plain JSON values: numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
