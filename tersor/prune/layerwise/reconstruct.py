"""Repair without training: who reads pruned channels learns to do without them, by least squares."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.edit import Cut, Slice, Write
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace, module_at
from tersor.core.plan import Plan, Skip
from tersor.core.progress import Progress
from tersor.core.step import Context, Method, Result, Step
from tersor.core.task import Task
from tersor.observe.layerwise import Indices, Pair, calibration_arguments, stages_of, unsolvable
from tersor.observe.least_squares import NormalEquations, written


@final
@dataclass(frozen=True)
class PruneAndReconstruct(Step):
    """``prune``, then give each layer that reads pruned channels the weights whose outputs come closest to those it had
    in the model given, on calibration data.

    Layer by layer in the order of the forward, min_W Σ ‖y − W x‖² + λ ‖W − W₀‖²: x is what the layer reads in the model
    pruned and repaired so far, y what it gave in the model given (those of its outputs that are left), W₀ its weights
    after pruning, λ = ``ridge`` times the mean of x². A bias is solved for where the layer has one. Convolutions (1-3
    dimensions, grouped too) and linear layers; what else reads pruned channels is a Skip. A layer that is called more
    than once is solved once, for all its calls.

    Args:
        prune: the Method that removes channels; its result is verified as always, before the repair.
        batches: calibration batches.
        rows: at most so many output positions of each batch and layer are counted, drawn at random.
        ridge: how strongly weights are held where they are; 0 is plain least squares.

    ``plans`` holds both plans; ``facts["reconstructed"]`` says how many layers were. Raises what ``prune`` raises, and
    InputError for numbers out of range, no calibration data, and values that are not finite.
    Source: He, Zhang, Sun 2017 (arXiv 1707.06168), section 3.1 (ii); Luo, Wu, Lin 2017, ThiNet (arXiv 1707.06342),
    section 3.2. Ours keeps the channels that a score chose, solves for all weights of a layer, and pulls towards W₀.
    """

    prune: Method
    batches: int = 8
    rows: int = 4096
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("batches", "rows"):
            if (got := getattr(self, name)) < 1:
                raise InputError("too few", where=f"PruneAndReconstruct.{name}", got=got, expected="1 or more")
        if not 0 <= self.ridge < float("inf"):
            raise InputError("out of range", where="PruneAndReconstruct.ridge", got=self.ridge, expected="0 or more")

    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        """Prune a copy and repair it; the model given is the one that its layers are held against."""
        context, task = context or Context(), task.ready()
        pruned = self.prune.run(model, task, context)
        plan = reconstruction(
            model, pruned.model, pruned.plans, task, batches=self.batches, rows=self.rows, ridge=self.ridge,
            seed=context.seed, progress=context.progress,
        )  # fmt: skip
        if not plan.edits:
            context.progress.say(f"warning: no layer was reconstructed ({len(plan.skips)} skipped)")
        facts = {**pruned.facts, "reconstructed": len(plan.lines)}
        return Result(apply(pruned.model, plan), (*pruned.plans, plan), facts=facts)


def reconstruction(
    original: nn.Module, pruned: nn.Module, plans: Sequence[Plan], task: Task,
    *, batches: int = 8, rows: int = 4096, ridge: float = 1e-3, seed: int = 0, progress: Progress | None = None,
) -> Plan:  # fmt: skip
    """The weights to write into ``pruned``, which ``plans`` made of ``original``; see PruneAndReconstruct.

    Neither model is changed. Each line says a layer's relative squared error before and after, on the rows it was
    solved from.
    """
    readers, skips = _readers(pruned, plans)
    both = Pair(copy.deepcopy(original).eval(), copy.deepcopy(pruned).eval(), surviving(plans), rows, seed)
    stages = stages_of(both.changed, readers, task)
    called = {path for stage in stages for path in stage.paths}
    skips += [Skip(path, "the forward does not call it as a module") for path in readers if path not in called]
    data = calibration_arguments(both.changed, task, batches, seed, "PruneAndReconstruct") if stages else []
    edits: list[Write] = []
    lines: list[tuple[str, str]] = []
    for stage in (progress or Progress()).track(stages, "reconstructing", len(stages)):
        for path, equations in both.equations(stage, data).items():
            solution = equations.solve(ridge)
            values = written(module_at(both.changed, path), solution)
            new = [Write(TensorPlace(path, name), value) for name, value in values.items()]
            apply(both.changed, Plan("reconstruct", tuple(new)), in_place=True)
            edits += new
            lines.append((path, _line(equations, solution)))
    return Plan("reconstruct", tuple(edits), tuple(skips), tuple(lines))


def surviving(plans: Sequence[Plan]) -> Indices:
    """(tensor, dimension) → which indices of the original's are left after all slices of ``plans``: int64, growing."""
    found: dict[tuple[TensorPlace, int], Tensor] = {}
    for cut in _cuts(plans):
        key = cut.place, cut.dim
        found[key] = found[key][cut.keep] if key in found else cut.keep
    return found


def _cuts(plans: Sequence[Plan]) -> Iterator[Cut]:
    for edit in (edit for plan in plans for edit in plan.edits):
        if isinstance(edit, Slice):
            yield from edit.cuts


def _readers(pruned: nn.Module, plans: Sequence[Plan]) -> tuple[list[str], list[Skip]]:
    """Paths of the layers that lost inputs and can be solved for, and why others cannot."""
    found: dict[str, None] = {}
    skips: dict[str, Skip] = {}
    for cut in _cuts(plans):
        if cut.role == "consumer":
            reason = _why_not(pruned, cut)
            if reason is None:
                found[cut.place.module] = None
            else:
                skips[str(cut.place)] = Skip(str(cut.place), reason)
    return list(found), list(skips.values())


def _why_not(pruned: nn.Module, cut: Cut) -> str | None:
    layer = module_at(pruned, cut.place.module)
    reason = unsolvable(pruned, cut.place.module)
    if reason is None and (cut.place.tensor != "weight" or cut.dim != 1):
        return f"dimension {cut.dim} of {cut.place.tensor} is no input of a {type(layer).__name__}"
    return reason


def _line(equations: NormalEquations, solution: Tensor) -> str:
    before, after = equations.error(equations.weight), equations.error(solution)
    unknowns = solution.shape[2]
    return (
        f"{unknowns} weights per output from {equations.rows} rows: relative squared error {before:.3g} -> {after:.3g}"
    )
