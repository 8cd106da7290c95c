"""How much each layer of a task's model bears, and the sparsities that follow: measured, written, told."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.core.check_task import check_task
from tersor.core.errors import ArtifactError
from tersor.core.files import write_atomically
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.jobs.find_task import find_task
from tersor.measure.layer_budgets import LayerBudgets, least_loss, within_tolerance
from tersor.measure.sensitivity import Probe, Sensitivity
from tersor.measure.sensitivity import sensitivity as measure
from tersor.report.sensitivity import render

JSON, PAGE = "sensitivity.json", "sensitivity.html"


@dataclass(frozen=True)
class LayerSensitivity:
    """What was measured, the sparsities of layers that follow, and all of it as plain JSON values.

    ``within``: for each layer the largest sparsity at which the metric falls by at most the drop asked for.
    ``together``: the sparsities that meet the overall one at the least predicted loss (None where none was asked for).
    """

    found: Sensitivity
    within: LayerBudgets
    together: LayerBudgets | None
    data: dict[str, Any]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Put sensitivity.json and sensitivity.html into ``folder``, which is made; returns both paths."""
        return write_sensitivity(self.data, folder)


def write_sensitivity(data: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Put sensitivity.json and sensitivity.html into ``folder``, which is made; returns both paths."""
    text = json.dumps(data, indent=1, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / JSON, text.encode())
        write_atomically(folder / PAGE, render(data).encode("utf-8", errors="replace"))
    except OSError as error:
        raise ArtifactError("cannot be written", where=str(folder), got=error.strerror or error) from error
    return folder / JSON, folder / PAGE


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
    found_task = find_task(task, progress or Progress()) if isinstance(task, (str, Path)) else task
    complete = found_task.complete()
    check_task(complete)
    assert complete.metric is not None, "a completed task has a metric"
    found = measure(complete.model, complete, probe, progress=progress)
    fraction = complete.metric.unit == "fraction"
    within = within_tolerance(found, drop=max_drop / 100 if fraction else max_drop)
    together = None if overall is None else least_loss(found, overall)
    data = {
        "task": complete.name,
        "metric": {"name": complete.metric.name, "unit": complete.metric.unit, "value": found.metric},
        **{key: value for key, value in found.to_json().items() if key != "metric"},
        "max_drop": max_drop,
        "within": dataclasses.asdict(within),
        "together": None if together is None else dataclasses.asdict(together),
    }
    result = LayerSensitivity(found, within, together, data)
    if out is not None:
        result.write(Path(out))
    return result
