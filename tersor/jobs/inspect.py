"""What a task's model is made of; nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor.core.check_task import check_task
from tersor.core.errors import GraphError
from tersor.core.eval_mode import eval_mode
from tersor.core.measurement import Measurement
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.graph.groups import groups_of
from tersor.jobs.find_task import find_task
from tersor.measure.compute import layer_table, macs
from tersor.measure.redundancy import redundancy
from tersor.measure.size import nonzeros, parameters, state_bytes


@dataclass(frozen=True)
class Inspection:
    """Totals, a row per layer (with the redundancy of its weights), and the groups of channels that can go."""

    totals: dict[str, Measurement]
    layers: tuple[dict[str, Any], ...]
    groups: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The inspection as plain JSON values."""
        totals = {name: found.to_json() for name, found in self.totals.items()}
        return {"totals": totals, "layers": list(self.layers), "groups": list(self.groups)}


def inspect(task: Task | str | Path, *, groups: bool = False, progress: Progress | None = None) -> Inspection:
    """Size, parameters, MACs, layers, weight redundancy and natural sparsity of a task's model.

    ``groups``: also capture the graph and list which channels can only go together, and what is frozen by what.
    """
    found = find_task(task, progress) if isinstance(task, (str, Path)) else task
    complete = found.complete()
    check_task(complete)
    with eval_mode(complete.model) as model:
        return _inspect(model, complete, groups)


def _inspect(model: nn.Module, complete: Task, groups: bool) -> Inspection:
    assert complete.example_inputs is not None
    totals = {
        "parameters": parameters(model),
        "nonzeros": nonzeros(model),
        "macs": macs(model, complete.example_inputs),
        "state_bytes": Measurement(state_bytes(model), "bytes"),
    }
    weights = {row["path"]: row for row in redundancy(model)}
    layers = [{**weights.get(row["path"], {}), **row} for row in layer_table(model, complete.example_inputs)]
    lines: tuple[str, ...] = ()
    if groups:
        try:
            lines = tuple(groups_of(model, complete.example_inputs, complete.sole_output).describe())
        except GraphError as error:
            lines = (str(error),)
    return Inspection(totals, tuple(layers), lines)
