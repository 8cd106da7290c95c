"""What the jobs that ask how much each layer bears have in common: what is told, and where it is written."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tersor.core.check_task import check_task
from tersor.core.errors import ArtifactError
from tersor.core.files import write_atomically
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.jobs.documents import expect_folder
from tersor.jobs.find_task import find_task
from tersor.measure.bit_budgets import BitBudgets
from tersor.measure.layer_budgets import LayerBudgets
from tersor.measure.layer_curves import Curves
from tersor.report.sensitivity import render

JSON, PAGE = "sensitivity.json", "sensitivity.html"

F = TypeVar("F", bound=Curves[Any])
B = TypeVar("B", LayerBudgets, BitBudgets)


@dataclass(frozen=True)
class Told(Generic[F, B]):
    """What was measured, the budgets of layers that follow, and all of it as plain JSON values.

    ``within``: for each layer the most at which the metric falls by at most the drop asked for.
    ``together``: what meets the overall budget at the least predicted loss (None where none was asked for).
    """

    found: F
    within: B
    together: B | None
    data: dict[str, Any]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Put sensitivity.json and sensitivity.html into ``folder``, which is made; returns both paths."""
        text = json.dumps(self.data, indent=1, allow_nan=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / JSON, text.encode())
            write_atomically(folder / PAGE, render(self.data).encode("utf-8", errors="replace"))
        except OSError as error:
            raise ArtifactError("cannot be written", where=str(folder), got=error.strerror or error) from error
        return folder / JSON, folder / PAGE


def checked_task(task: Task | str | Path, out: str | Path | None, progress: Progress | None) -> Task:
    """The task, found where it is a name or a file, completed and checked. Raises InputError; ArtifactError for an
    ``out`` that cannot become a folder."""
    if out is not None:
        expect_folder(Path(out))
    found = find_task(task, progress or Progress()) if isinstance(task, (str, Path)) else task
    complete = found.complete()
    check_task(complete)
    return complete


def told(task: Task, found: Curves[Any], max_drop: float, within: B, together: B | None) -> dict[str, Any]:
    """What both jobs say, as plain JSON values."""
    metric = task.demand_metric()
    return {
        "task": task.name,
        "metric": {"name": metric.name, "unit": metric.unit, "value": found.metric},
        **{key: value for key, value in found.to_json().items() if key != "metric"},
        "max_drop": max_drop,
        "within": dataclasses.asdict(within),
        "together": None if together is None else dataclasses.asdict(together),
    }
