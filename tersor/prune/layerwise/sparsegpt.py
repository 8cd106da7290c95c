"""Zeros with repair in one: which weights go, and what the others of their row do about it, on calibration data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast, final

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.edit import Mask, Write
from tersor.core.errors import InputError
from tersor.core.masked import standing_mask
from tersor.core.place import Everything, Selector, TensorPlace, module_at, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.observe.hessian import inverse_factor
from tersor.observe.layerwise import Pair, calibration_arguments, stages_of, unsolvable
from tersor.observe.least_squares import NormalEquations, written
from tersor.prune.layerwise.optimal_brain import input_first, settle, surgery
from tersor.prune.sparse.patterns import NM, Element, Pattern
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import PerLayer, Scope
from tersor.prune.sparse.weights import weights_of

SETTLED = 1024  # weights left in a row: up to here its equations are solved by themselves at the end


@final
@dataclass(frozen=True)
class SparseGPT(Method):
    """Hold ⌊sparsity · n⌋ weights of each layer at zero and move the others so that its outputs stay near.

    Layer by layer in the order of the forward, x being what the layer reads in the model pruned so far, y what it gave
    in the model given: the weights (and bias) with the least Σ ‖y − W x‖² are found; then, by H = Σ x xᵀ, a weight that
    goes costs w² / [H⁻¹]ⱼⱼ (of the columns not yet passed), and the weights to its right take over what it did,
    w ← w − w_j · [H⁻¹]_j / [H⁻¹]ⱼⱼ; last, what is left of a row is solved for once more, where that is at most 1,024.
    Convolutions (1-3 dimensions, grouped too) and linear layers; other weights are skips. Gives ``Write``s and a
    ``Mask`` for each layer. Masks that stand already stay, and count.

    Args:
        sparsity, pattern, scope, where: how many weights each layer loses, as of ``Prune``: a fraction, or names →
            fractions; ``Element()`` or ``NM(n, m)``; layers compete (``Global``) by the magnitude of their weights.
        batches, rows: calibration batches, and how many output positions of each are counted, drawn at random.
        damping: λ / mean diagonal of H, which also holds W where it is; more where rows are few.

    Raises InputError for settings out of range, other patterns, no calibration data, weights or inputs that are not
    finite, and an H that the damping does not mend.
    Source: Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1, whose y is W x and who leave what stands to the
    left of a removed weight alone. Ours aims at what the dense model gave, which at 90 % makes the difference between
    a network and none (docs/cards/sparsegpt.md), counts exactly, and takes convolutions.
    """

    sparsity: float | Mapping[str, float] | None = None
    pattern: Pattern = field(default_factory=Element)
    scope: Scope = field(default_factory=PerLayer)
    where: Selector = field(default_factory=Everything)
    batches: int = 8
    rows: int = 2048
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.pattern, NM) and self.pattern != Element():
            raise InputError(
                "no pattern for SparseGPT",
                where="SparseGPT.pattern",
                got=self.pattern,
                expected="Element() or NM(n, m)",
            )
        try:
            self._amounts(self.where)
        except InputError as error:
            raise error.at(error.where.replace("Prune", "SparseGPT")) from None
        for name in ("batches", "rows"):
            if (got := getattr(self, name)) < 1:
                raise InputError("too few", where=f"SparseGPT.{name}", got=got, expected="1 or more")
        if not 0 <= self.damping < float("inf"):
            raise InputError("out of range", where="SparseGPT.damping", got=self.damping, expected="0 or more")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Prune a copy layer after layer; what was written into it is the plan."""
        zeros, skips = self._zeros(model, task)
        pruned = copy.deepcopy(model).eval()
        stages = stages_of(pruned, list(zeros), task)
        called = {path for stage in stages for path in stage.paths}
        skips += [Skip(path, "the forward does not call it as a module") for path in zeros if path not in called]
        data = calibration_arguments(pruned, task, self.batches, 0, "SparseGPT") if stages else []
        pair = Pair(copy.deepcopy(model).eval(), pruned, {}, self.rows, 0)
        edits: list[Write | Mask] = []
        lines: list[tuple[str, str]] = []
        for stage in stages:
            for path, equations in pair.equations(stage, data).items():
                new, line = self._prune(pruned, path, zeros[path], equations)
                apply(pruned, Plan("SparseGPT", new), in_place=True)
                edits += new
                lines.append((path, line))
        return Plan("SparseGPT", tuple(edits), tuple(skips), tuple(lines))

    def _amounts(self, where: Selector) -> Prune:
        return Prune(self.sparsity, pattern=self.pattern, scope=self.scope, where=where)

    def _zeros(self, model: nn.Module, task: Task) -> tuple[dict[str, int], list[Skip]]:
        """path → how many zeros the layer's weight is to have, and why others are passed over."""
        skips: list[Skip] = []
        places = [weight.place for weight in weights_of(model, select(model, self.where), skips)]
        # What weights_of skips, Prune would skip too; what is left are layers that Prune could mask and we not.
        reasons = {place: _why_not(model, place) for place in places}
        skips += [Skip(str(place), reason) for place, reason in reasons.items() if reason is not None]
        open_ = frozenset(place.module for place, reason in reasons.items() if reason is None)
        if not open_:
            return {}, skips
        amounts = self._amounts(_Among(open_)).plan(model, task)
        skips += [skip for skip in amounts.skips if skip.place != "the model"]
        found = {edit.place.module: int((~edit.keep).sum()) for edit in amounts.edits if isinstance(edit, Mask)}
        said = {skip.place for skip in skips}
        for path in sorted(open_ - found.keys()):
            if f"{path}.weight" not in said:
                skips.append(Skip(f"{path}.weight", "no more of its weights are to go than are masked already"))
        return {path: found[path] for path in (place.module for place in places) if path in found}, skips

    def _prune(
        self, model: nn.Module, path: str, zeros: int, equations: NormalEquations
    ) -> tuple[tuple[Write | Mask, ...], str]:
        layer = cast("_ConvNd | nn.Linear", module_at(model, path))
        weight, mask = layer.weight.detach(), standing_mask(layer, "weight")
        gone = torch.zeros_like(weight, dtype=torch.bool) if mask is None else ~mask.keep
        gone = gone.reshape(equations.weight.shape[0], equations.weight.shape[1], -1)
        solution, H = equations.solve(self.damping), equations.moments()
        W, pattern = solution[..., : H.shape[1]], None
        order = torch.arange(W.shape[2], device=W.device)
        if isinstance(self.pattern, NM):
            pattern, order = (self.pattern.n, self.pattern.m), input_first(weight[0, 0].numel(), weight.shape[1])
        U = inverse_factor(H[:, order][..., order], self.damping, f"SparseGPT.damping, at {path}")
        new, keep = surgery(W[..., order], U, zeros, pattern=pattern, standing=gone[..., order])
        back = torch.argsort(order)
        new, keep = new[..., back], keep[..., back]
        if int(keep.sum(2).max()) <= SETTLED:
            new = settle(solution[..., : H.shape[1]], H, keep, self.damping)
        solution = equations.with_weights(new)
        values = written(layer, solution)
        writes = [Write(TensorPlace(path, name), value) for name, value in values.items()]
        line = (
            f"{int((~keep).sum()):,} of {keep.numel():,} zero; relative squared error {equations.error(solution):.3g}"
        )
        return (*writes, Mask(TensorPlace(path, "weight"), keep.reshape(weight.shape))), line


@dataclass(frozen=True)
class _Among(Selector):
    """The modules at these paths."""

    paths: frozenset[str]

    def matches(self, path: str, module: nn.Module) -> bool:
        return path in self.paths


def _why_not(model: nn.Module, place: TensorPlace) -> str | None:
    reason = unsolvable(model, place.module)
    if reason is None and place.tensor != "weight":
        return f"it is not the weight of a {type(module_at(model, place.module)).__name__}"
    return reason
