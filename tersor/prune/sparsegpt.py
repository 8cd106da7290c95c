"""Zeros with repair in one: which weights go, and what the others of their row do about it, on calibration data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersor.core.apply import apply
from tersor.core.edit import Mask, Write
from tersor.core.errors import InputError
from tersor.core.masked import standing_mask
from tersor.core.place import Everything, Selector, TensorPlace, module_at, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method, derive_seed
from tersor.core.task import Arguments, Task
from tersor.prune.layerwise import Stage, calibration_arguments, expect_finite, pass_through, stages_of, unsolvable
from tersor.prune.least_squares import drawn_rows, input_rows
from tersor.prune.optimal_brain import input_first, inverse_factor, relative_error, surgery
from tersor.prune.patterns import NM, Element, Pattern
from tersor.prune.prune import Prune
from tersor.prune.scopes import PerLayer, Scope
from tersor.prune.weights import weights_of
from tersor.tensor.masks import keep_largest, n_of_m


@final
@dataclass(frozen=True)
class SparseGPT(Method):
    """Hold ⌊sparsity · n⌋ weights of each layer at zero and move the others so that its outputs stay near.

    Layer by layer in the order of the forward: H = Σ x xᵀ over what the layer reads in the model pruned so far; a
    weight that goes costs w² / [H⁻¹]ⱼⱼ (of the columns not yet passed), and the weights to its right take over what it
    did, w ← w − w_j · [H⁻¹]_j / [H⁻¹]ⱼⱼ. Convolutions (1-3 dimensions, grouped too) and linear layers; other weights
    are skips. Gives a ``Write`` and a ``Mask`` for each layer. Masks that stand already stay, and count.

    Args:
        sparsity, pattern, scope, where: how many weights each layer loses, as of ``Prune``: a fraction, or names →
            fractions; ``Element()`` or ``NM(n, m)``; layers compete (``Global``) by the magnitude of their weights.
        batches, rows: calibration batches, and how many output positions of each are counted, drawn at random.
        damping: λ / mean diagonal of H; more where rows are few.

    Raises InputError for settings out of range, other patterns, no calibration data, weights or inputs that are not
    finite, and an H that the damping does not mend.
    Source: Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1. Ours counts exactly, and takes convolutions.
    """

    sparsity: float | Mapping[str, float] | None = None
    pattern: Pattern = field(default_factory=Element)
    scope: Scope = field(default_factory=PerLayer)
    where: Selector = field(default_factory=Everything)
    batches: int = 8
    rows: int = 4096
    damping: float = 0.01

    def __post_init__(self) -> None:
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
        edits: list[Write | Mask] = []
        lines: list[tuple[str, str]] = []
        for stage in stages:
            H = _second_moments(pruned, stage, data, self.rows)
            for path in stage.paths:
                new, line = self._prune(pruned, path, zeros[path], H[path])
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

    def _prune(self, model: nn.Module, path: str, zeros: int, H: Tensor) -> tuple[tuple[Write, Mask], str]:
        layer = cast("_ConvNd | nn.Linear", module_at(model, path))
        weight, mask = layer.weight.detach(), standing_mask(layer, "weight")
        expect_finite(path, H)
        gone = torch.zeros_like(weight, dtype=torch.bool) if mask is None else ~mask.keep
        W, gone = _matrix(layer, weight.double()), _matrix(layer, gone)
        pattern = (self.pattern.n, self.pattern.m) if isinstance(self.pattern, NM) else None
        order = torch.arange(W.shape[2], device=W.device)
        if pattern:
            order = input_first(weight[0, 0].numel(), weight.shape[1]).to(W.device)
        W, gone, H = W[..., order], gone[..., order], H[:, order][..., order]
        new, keep = surgery(W, inverse_factor(H, self.damping), zeros, pattern=pattern, standing=gone)
        size = torch.where(gone, -1.0, W.abs())
        plain = n_of_m(size, *pattern) if pattern else keep_largest(size, zeros)
        line = (
            f"{int((~keep).sum()):,} of {keep.numel():,} zero; relative squared error {relative_error(W, new, H):.3g}, "
            f"by magnitude {relative_error(W, torch.where(plain, W, 0.0), H):.3g}"
        )
        back = torch.argsort(order)
        value, kept = new[..., back].reshape(weight.shape).to(weight), keep[..., back].reshape(weight.shape)
        place = TensorPlace(path, "weight")
        return (Write(place, value), Mask(place, kept)), line


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


def _matrix(layer: _ConvNd | nn.Linear, weight: Tensor) -> Tensor:
    """[groups, outputs of a group, unknowns]."""
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return weight.reshape(groups, len(weight) // groups, -1)


def _second_moments(model: nn.Module, stage: Stage, data: Sequence[Arguments], rows: int) -> dict[str, Tensor]:
    """path → mean of x xᵀ over the rows that the layer reads: float64 [groups, unknowns, unknowns]."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(stage.paths, 0)
    for number, arguments in enumerate(data):
        generator = torch.Generator().manual_seed(derive_seed(0, number))

        def see(path: str, x: Tensor, y: Tensor, generator: torch.Generator = generator) -> None:
            layer = module_at(model, path)
            found = input_rows(layer, x, drawn_rows(layer, y, rows, generator))
            found = found if found.dtype == torch.float64 else found.float()
            counts[path] += found.shape[1]
            sums[path] = sums.get(path, 0) + (found.mT @ found).double()

        pass_through(model, stage.paths, see, arguments, number, stage.calls)
    return {path: total / counts[path] for path, total in sums.items()}
