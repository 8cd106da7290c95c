"""How much each layer bears: loss and metric with one layer pruned at a time, at several sparsities."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace, stored_at
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.measure.layer_curves import Curves, Judge, expect_effort, in_time
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
class Sensitivity(Curves[LayerCurve]):
    """Loss and metric of the model as it is, a curve for each weight, and what was passed over."""


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
        check_fields(self)
        expect_effort("Probe", self.samples, self.seconds)
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
    completed, batches that cannot be run, and where no weight can be pruned.
    """
    begun = time.monotonic()
    model = copy.deepcopy(model).eval()
    judge = Judge.of(task, model, probe.samples)
    loss, metric = judge(model)
    plans = {sparsity: prune.plan(model, task) for sparsity, prune in probe.prunes().items()}
    edits = [(asked, edit) for asked, plan in plans.items() for edit in plan.edits if isinstance(edit, Mask)]
    skips = tuple(dict.fromkeys(skip for plan in plans.values() for skip in plan.skips))
    if not edits:
        reasons = "; ".join(f"{skip.place}: {skip.reason}" for skip in skips[:3])
        raise InputError("no layer can be pruned", where="sensitivity", got=reasons or "no weight loses anything")
    points: dict[TensorPlace, list[Point]] = {}
    for asked, edit in in_time(edits, "sensitivity of layers", probe.seconds, begun, progress):
        with _masked(stored_at(model, edit.place).detach(), edit.keep):
            zeros = int((~edit.keep).sum())
            share = zeros / edit.keep.numel()
            points.setdefault(edit.place, []).append(Point(asked, share, zeros, *judge(model)))
    sizes = {edit.place: edit.keep.numel() for _, edit in edits}
    curves = tuple(LayerCurve(str(place), sizes[place], tuple(found)) for place, found in points.items())
    left_out = len(edits) - sum(map(len, points.values()))
    return Sensitivity(loss, metric, judge.higher_is_better, judge.samples, curves, skips, left_out)


class _masked:
    """Within, a tensor is zero where ``keep`` is false; at the end it is as it was."""

    def __init__(self, tensor: Tensor, keep: Tensor):
        self.tensor, self.gone = tensor, ~keep.to(tensor.device)

    def __enter__(self) -> None:
        self.hidden = self.tensor[self.gone]
        self.tensor[self.gone] = 0

    def __exit__(self, *_: object) -> None:
        self.tensor[self.gone] = self.hidden
