"""How much each layer of a task's model bears, and the sparsities that follow: measured, written, told."""

from __future__ import annotations

from pathlib import Path

from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.jobs.layer_curves import Told, checked_task, told
from tersor.measure.layer_budgets import LayerBudgets, least_loss, within_tolerance
from tersor.measure.layer_curves import in_own_unit
from tersor.measure.sensitivity import Probe, Sensitivity
from tersor.measure.sensitivity import sensitivity as measure


class LayerSensitivity(Told[Sensitivity, LayerBudgets]):
    """What was measured, the sparsities of layers that follow, and all of it as plain JSON values.

    ``within``: for each layer the largest sparsity at which the metric falls by at most the drop asked for.
    ``together``: the sparsities that meet the overall one at the least predicted loss (None where none was asked for).
    """


def sensitivity(
    task: Task | str | Path,
    out: str | Path | None = None,
    *,
    probe: Probe = Probe(),
    max_drop: float = 1.0,
    overall: float | None = None,
    progress: Progress | None = None,
) -> LayerSensitivity:
    """Prune one layer at a time at several sparsities, and say what each bears; the model is not changed.

    ``max_drop``: largest fall of the metric for one layer alone, in percentage points (in the metric's own unit where
    it is no fraction). ``overall``: a sparsity of all layers together, divided among them at the least predicted loss.
    ``out``: a folder for sensitivity.json and sensitivity.html. Decisions are taken on validation data. Raises
    InputError for unusable input.
    """
    complete = checked_task(task, out, progress)
    found = measure(complete.model, complete, probe, progress=progress)
    within = within_tolerance(found, drop=in_own_unit(complete, max_drop))
    together = None if overall is None else least_loss(found, overall)
    data = told(complete, found, max_drop, within, together)
    result = LayerSensitivity(found, within, together, data)
    if out is not None:
        result.write(Path(out))
    return result
