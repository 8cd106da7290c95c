"""Second-order rounding of weights: each weight that is rounded leaves its error to those that are not yet."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.edit import Quantizer, Write
from tersor.core.errors import InputError
from tersor.core.masked import standing_mask
from tersor.core.place import Everything, Selector, TensorPlace, module_at
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.observe.hessian import inverse_factor
from tersor.observe.layerwise import Pair, calibration_arguments, stages_of, unsolvable
from tersor.observe.least_squares import NormalEquations, as_rows, as_weight, output_axis, tensor_of, written
from tersor.quantize.ranges import MeanSquaredError, Range
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import expect_weight_bits, layer_weights, quantizer, spread
from tersor.tensor.affine import dequantize, quantize


@final
@dataclass(frozen=True)
class GPTQ(Method):
    """Round the weights of each layer so that its outputs stay near, not its weights: on calibration data, no training.

    Layer by layer in the order of the forward, x being what the layer reads in the model rounded so far, y what it gave
    in the model given: the weights (and bias) with the least Σ ‖y − W x‖² are found; then, with H = Σ x xᵀ, column by
    column, a weight is rounded to its grid and the weights to its right take over the error,

        w ← w − (w_j − ŵ_j) / [H⁻¹]ⱼⱼ · [H⁻¹]_j          (H of the columns not yet passed)

    Convolutions of one to three dimensions (grouped too), linear layers and transformers' ``Conv1D``; other weights are
    skips (``QuantizeWeights`` after it rounds them to the nearest). Gives a ``Write`` of values on the grid and the
    ``Quantizer`` whose grid it is, not learnt. Weights that a mask holds at zero stay zero.

    Args:
        scheme, range: the integers and which reals they reach, by the weights before any is rounded.
        act_order: columns in the order of decreasing Σ x²; what matters most is rounded while most can take over.
        damping: λ / mean diagonal of H, which also holds W where it is; more where rows are few.
        batches, rows: calibration batches, and how many output positions of each are counted, drawn at random.
        where: which layers.

    Raises InputError for settings out of range, no calibration data, weights or inputs that are not finite, a model
    that is quantised already, and an H that the damping does not mend.
    Source: Frantar et al. 2023 (arXiv 2210.17323), algorithm 1, whose y is W x. Ours aims at what the float model gave.
    Grids are fixed before the first column is rounded, so that groups are runs of inputs in any order of columns.
    """

    scheme: Int = Int(4)
    range: Range = field(default_factory=MeanSquaredError)
    act_order: bool = True
    damping: float = 0.01
    batches: int = 8
    rows: int = 2048
    where: Selector = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_fields(self)
        expect_weight_bits(self.scheme, "GPTQ.scheme")
        for name in ("batches", "rows"):
            if (got := getattr(self, name)) < 1:
                raise InputError("too few", where=f"GPTQ.{name}", got=got, expected="1 or more")
        if not 0 <= self.damping < float("inf"):
            raise InputError("out of range", where="GPTQ.damping", got=self.damping, expected="0 or more")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Round a copy layer after layer; what was written into it is the plan."""
        paths, skips = self._layers(model)
        changed = copy.deepcopy(model).eval()
        stages = stages_of(changed, paths, task)
        called = {path for stage in stages for path in stage.paths}
        skips += [Skip(path, "the forward does not call it as a module") for path in paths if path not in called]
        data = calibration_arguments(changed, task, self.batches, 0, "GPTQ") if stages else []
        pair = Pair(copy.deepcopy(model).eval(), changed, {}, self.rows, 0)
        edits: list[Write | Quantizer] = []
        lines: list[tuple[str, str]] = []
        for stage in stages:
            for path, equations in pair.equations(stage, data).items():
                writes, grid, error = self._round(changed, path, equations)
                apply(changed, Plan("GPTQ", writes), in_place=True)
                edits += [*writes, grid]
                what = f"{self.scheme}, {grid.scale.numel():,} scales, relative squared error of outputs {error:.3g}"
                lines.append((path, what))
        return Plan("GPTQ", tuple(edits), tuple(skips), tuple(lines))

    def _layers(self, model: nn.Module) -> tuple[list[str], list[Skip]]:
        """Paths of the layers that can be rounded, and why others that have weights cannot."""
        skips: list[Skip] = []
        found = []
        for weight in layer_weights(model, self.where, skips):
            path = weight.place.module
            reason = unsolvable(model, path, inputs_first=True)
            if reason is None and weight.place.tensor != "weight":
                reason = f"it is not the weight of a {type(module_at(model, path)).__name__}"
            reason = reason or self.scheme.check(str(weight.place), weight.value.shape, weight.axis)
            if reason:
                skips.append(Skip(str(weight.place), reason))
            else:
                found.append(path)
        return found, skips

    def _round(
        self, model: nn.Module, path: str, equations: NormalEquations
    ) -> tuple[tuple[Write, ...], Quantizer, float]:
        """The weight on its grid (and the bias that goes best with it), the grid, and the outputs' relative error."""
        layer = module_at(model, path)
        weight, mask, H = tensor_of(layer, "weight"), standing_mask(layer, "weight"), equations.moments()
        W = equations.solve(self.damping)[..., : H.shape[1]]
        keep = torch.ones_like(W, dtype=torch.bool) if mask is None else as_rows(layer, mask.keep)
        values = as_weight(layer, torch.where(keep, W, 0.0))
        grid = quantizer(TensorPlace(path, "weight"), values, output_axis(layer), self.scheme, self.range)
        scale, zero_point = (as_rows(layer, part) for part in spread(grid, weight.shape))
        order = torch.arange(W.shape[2], device=W.device).expand(len(W), -1)
        if self.act_order:
            order = H.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        U = inverse_factor(_ordered(_ordered(H, order).mT, order), self.damping, f"GPTQ.damping, at {path}")
        W, s, z, keep = (_ordered(part, order) for part in (W, scale, zero_point, keep))
        q = _ordered(round_columns(W, U, s, z, keep, (grid.quant_min, grid.quant_max)), order.argsort(1))
        new = dequantize(q, scale, zero_point)
        solution = equations.with_weights(new.double())
        writes = {name: Write(TensorPlace(path, name), value) for name, value in written(layer, solution).items()}
        return tuple(writes.values()), grid, equations.error(solution)


def _ordered(rows: Tensor, order: Tensor) -> Tensor:
    """``rows`` [groups, m, n] with the columns of each group in its own order [groups, n]."""
    return rows.gather(2, order[:, None].expand(-1, rows.shape[1], -1))


def round_columns(
    W: Tensor, U: Tensor, scale: Tensor, zero_point: Tensor, keep: Tensor, bounds: tuple[int, int],
    *, block: int = 128,
) -> Tensor:  # fmt: skip
    """The integers q, within ``bounds``, with which Σ ‖W x − Ŵ x‖² stays small, ŵ = (q − z) · s: int32, like W.

    Column by column from the left: e = (w_j − ŵ_j) / [U]ⱼⱼ, and w ← w − e · U_j to its right; beyond the ``block`` of
    columns at hand only at its end, which changes nothing but the time that it takes.

    W [groups, outputs, n] float64; U [groups, n, n] as of ``inverse_factor``; ``scale``, ``zero_point``: like W;
    ``keep``: bool like W, False where a weight is zero and stays so. Frantar et al. 2023 (arXiv 2210.17323),
    algorithm 1.
    """
    W, q = W.clone(), torch.empty_like(zero_point)
    for start in range(0, W.shape[2], block):
        stop = min(start + block, W.shape[2])
        errors = torch.empty_like(W[..., start:stop])
        for j in range(start, stop):
            s, z = scale[..., j], zero_point[..., j]
            nearest = quantize(W[..., j], s, z, quant_min=bounds[0], quant_max=bounds[1])
            q[..., j] = torch.where(keep[..., j], nearest, z)
            error = (W[..., j] - dequantize(q[..., j], s, z)) / U[:, j, j, None]
            W[..., j:stop] -= error[..., None] * U[:, j, None, j:stop]
            errors[..., j - start] = error
        W[..., stop:] -= errors @ U[:, start:stop, stop:]
    return q
