"""How few bits each layer of a task's model bears, and the widths that follow: measured, written, told."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from torch import nn

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.export.onnx import export_onnx
from tersor.jobs.layer_curves import Told, checked_task, told
from tersor.measure.bit_budgets import BitBudgets, Bits, fewest_bits, least_loss
from tersor.measure.bit_sensitivity import BitProbe, BitSensitivity
from tersor.measure.bit_sensitivity import bit_sensitivity as measure
from tersor.measure.layer_curves import in_own_unit
from tersor.measure.layer_latency import layer_latency
from tersor.quantize.fold import FoldBatchNorm


class LayerBits(Told[BitSensitivity, BitBudgets]):
    """What was measured, the widths of layers that follow, and all of it as plain JSON values.

    ``within``: for each layer the fewest bits at which the metric falls by at most the drop asked for.
    ``together``: the widths that meet the budget at the least predicted loss (None where none was asked for).
    Either goes into ``Quantize(per_layer=budgets.per_layer())``.
    """


def bit_sensitivity(
    task: Task | str | Path,
    out: str | Path | None = None,
    *,
    probe: BitProbe = BitProbe(),
    max_drop: float = 1.0,
    max_size: float | None = None,
    max_latency: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> LayerBits:
    """Quantise one layer at a time at several widths, and say what each bears; the model is not changed.

    Batch norm is folded first, on a copy. ``max_drop``: largest fall of the metric for one layer alone, in percentage
    points (in the metric's own unit where it is no fraction). ``max_size``: bytes of all these layers' weights and
    scales together, divided among them at the least predicted loss; or ``max_latency``: milliseconds of all their
    kernels at batch 1 (``layer_costs``), on ``threads`` threads (None: the physical cores). ``out``: a folder for
    sensitivity.json and sensitivity.html. Decisions are taken on validation data. Raises InputError for unusable input.
    """
    if max_size is not None and max_latency is not None:
        raise InputError("give one budget", where="bit_sensitivity", got=f"{max_size=}, {max_latency=}")
    complete = checked_task(task, out, progress)
    folded = FoldBatchNorm().run(complete.model, complete).model
    found = measure(folded, complete, probe, progress=progress)
    within = fewest_bits(found, drop=in_own_unit(complete, max_drop))
    costs = None if max_latency is None else layer_costs(folded, complete, probe, found, threads)
    budget = max_size if max_latency is None else max_latency
    together = None if budget is None else least_loss(found, budget, costs=costs)
    data = told(complete, found, max_drop, within, together)
    ends = None if costs is None else {name: [row[None], min(row.values())] for name, row in costs.items()}
    data["milliseconds"] = ends
    result = LayerBits(found, within, together, data)
    if out is not None:
        result.write(Path(out))
    return result


def layer_costs(
    model: nn.Module, task: Task, probe: BitProbe, found: BitSensitivity, threads: int | None = None
) -> dict[str, dict[Bits, float]]:
    """layer → width → milliseconds of its kernel in ONNX Runtime at batch 1; None is float's.

    From two files in turns: ``model`` in float, and quantised as a whole. A layer at any width runs on 8-bit kernels,
    so all widths cost the same; conversions where integers meet floats are not counted. A layer that cannot be told
    apart in what runs costs 0.
    """
    example = task.demand_example()
    quantised = dataclasses.replace(probe.quantize, learn=False).run(model, task).model
    sample = tuple(value[:1] for value in example)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, each in (("float", model), ("integers", quantised)):
            files[name] = Path(folder) / f"{name}.onnx"
            export_onnx(each, example, files[name], output_of=task.sole_output)
        times = layer_latency(files, sample, threads=threads)
    costs: dict[str, dict[Bits, float]] = {}
    for layer in found.layers:
        integers = times["integers"].get(layer.layer, 0.0)
        costs[layer.layer] = {None: times["float"].get(layer.layer, 0.0)}
        costs[layer.layer] |= {point.bits: integers for point in layer.points}
    return costs
