"""Inputs that are large on average get finer weights: factors by activations, which the layer before takes back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.edit import Write
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector, TensorPlace, module_at, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Arguments, Task
from tersor.graph.trace import trace
from tersor.observe.layerwise import calibration_arguments, expect_finite, pass_through, unsolvable
from tersor.observe.least_squares import as_rows, as_weight, drawn_rows, input_rows, output_axis, tensor_of
from tersor.quantize.commuting import Pair, Touched, commuting, rescale, scaled
from tersor.quantize.ranges import MinMax, Range
from tersor.quantize.schemes import Int
from tersor.quantize.unquantized import quantizers
from tersor.quantize.weight_only import expect_weight_bits, quantizer, rounded


@final
@dataclass(frozen=True)
class ScaleByActivations(Method):
    """Rescale the inputs of layers so that rounding their weights costs less; the function stays as it is.

    Where a factor may wander between what makes channels (a norm, a layer) and all layers that read them, with mᵢ the
    mean of |xᵢ| over calibration data,

        sᵢ = mᵢ^α / (geometric mean of m^α),   W ← W · diag(s),   x ← x / s  (in the layer before)

    so that what multiplies large inputs is rounded more finely, at the cost of the rest of its channel or group. α is
    that of ``steps`` + 1 even steps from 0 to 1 with the least Σ ‖(Q(W s) / s − W) x‖² / ‖W x‖² over the readers, Q
    being ``scheme`` and ``range``: give the step that rounds after it (``QuantizeWeights``, ``GPTQ``) the same. Which
    layers are tied together so: ``commuting``. Channels that are always zero stay; masked zeros do too.

    Args:
        scheme, range: the integers that the readers' weights are to have.
        steps: of the search; 0.05 apart by default.
        batches, rows: calibration batches, and how many output positions of each are counted, drawn at random.
        where: the layers that may be rescaled; a pair is where all of its layers are meant.

    The plan preserves the function, which is verified when it runs. Raises InputError for settings out of range, no
    calibration data, inputs that are not finite, and a model that is quantised already.
    Source: Lin et al. 2023, AWQ (arXiv 2306.00978), section 3.2, equations 4 and 5. We weigh each reader's error by the
    size of its outputs, and leave clipping to ``range``.
    """

    scheme: Int = Int(4)
    range: Range = field(default_factory=MinMax)
    steps: int = 20
    batches: int = 8
    rows: int = 2048
    where: Selector = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_fields(self)
        expect_weight_bits(self.scheme, "ScaleByActivations.scheme")
        for name in ("steps", "batches", "rows"):
            if (got := getattr(self, name)) < 1:
                raise InputError("too few", where=f"ScaleByActivations.{name}", got=got, expected="1 or more")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """A Write for each tensor that bears a factor; each line says α and the readers' error before and after."""
        task.demand_example()
        if found := quantizers(model):
            raise InputError(
                "the model is quantised already", where=next(iter(found)), got=f"{len(found)} quantisers",
                do="Put ScaleByActivations() before quantisation",
            )  # fmt: skip
        pairs, skips = self._pairs(model, task)
        changed = copy.deepcopy(model).eval()
        data = calibration_arguments(changed, task, self.batches, 0, "ScaleByActivations") if pairs else []
        seen = _watched(changed, [each.place.module for pair in pairs for each in pair.readers], data, self.rows)
        edits: dict[TensorPlace, Write] = {}
        lines = []
        for pair in pairs:
            where = str(pair.producer.place)
            if silent := [each.place.module for each in pair.readers if not seen[each.place.module].rows]:
                skips.append(Skip(where, f"the forward does not call {', '.join(silent)} as a module"))
                continue
            alpha, factor, before, after = self._search(changed, pair, seen)
            if not alpha:
                skips.append(Skip(where, f"no power of its activations lessens the error of its readers, {before:.3g}"))
                continue
            new = rescale(changed, pair, 1 / factor)
            apply(changed, Plan("ScaleByActivations", new), in_place=True)
            for each in pair.readers:
                seen[each.place.module].divide(_by_column(changed, each, factor))
            edits |= {write.place: write for write in new}
            names = ", ".join(each.place.module for each in pair.readers)
            lines.append((where, f"α {alpha:.2f} for {names}: relative squared error {before:.3g} -> {after:.3g}"))
        return Plan("ScaleByActivations", tuple(edits.values()), tuple(skips), tuple(lines), preserves=True)

    def _pairs(self, model: nn.Module, task: Task) -> tuple[list[Pair], list[Skip]]:
        """The pairs whose readers can be rounded as the scheme says, and why others are none."""
        chosen = select(model, self.where)
        found, skips = commuting(model, trace(model, task.demand_example()))
        pairs = []
        for pair in found:
            left_out = [path for path in pair.modules if path not in chosen]
            reasons = [f"where leaves out {', '.join(left_out)}"] if left_out else []
            reasons += filter(None, (self._why_not(model, each.place) for each in pair.readers))
            if reasons:
                skips.append(Skip(str(pair.producer.place), reasons[0]))
            else:
                pairs.append(pair)
        return pairs, skips

    def _why_not(self, model: nn.Module, place: TensorPlace) -> str:
        """Why the weight that reads the channels cannot be rounded on its inputs; "" where it can."""
        reason = unsolvable(model, place.module, inputs_first=True)
        if reason is None:
            layer = module_at(model, place.module)
            reason = self.scheme.check(str(place), tensor_of(layer, "weight").shape, output_axis(layer))
        return f"{place}: {reason}" if reason else ""

    def _search(self, model: nn.Module, pair: Pair, seen: Mapping[str, _Inputs]) -> tuple[float, Tensor, float, float]:
        """(α, s [channels], the readers' error without a factor, their error with it): the least one."""
        size = _mean_magnitude(model, pair, seen)
        alive = size > 0
        logarithm = torch.where(alive, size.clamp_min(1e-300).log(), 0.0)
        logarithm = torch.where(alive, logarithm - logarithm.sum() / alive.sum().clamp_min(1), 0.0)
        best, first = (0.0, torch.ones_like(size), float("inf")), 0.0
        for number in range(self.steps + 1):
            alpha = number / self.steps
            factor = (alpha * logarithm).exp()
            error = sum(self._error(model, each, seen[each.place.module], factor) for each in pair.readers)
            first = error if number == 0 else first
            if error < best[2]:
                best = alpha, factor, error
        return best[0], best[1], first, best[2]

    def _error(self, model: nn.Module, reader: Touched, seen: _Inputs, factor: Tensor) -> float:
        """Σ ‖(Q(W s) / s − W) x‖² / Σ ‖W x‖² of one reader."""
        layer = module_at(model, reader.place.module)
        weight, by = tensor_of(layer, "weight"), _by_column(model, reader, factor)[:, None]
        W = as_rows(layer, weight).double()
        larger = as_weight(layer, W * by).to(weight.dtype)
        grid = quantizer(reader.place, larger, output_axis(layer), self.scheme, self.range)
        D = as_rows(layer, rounded(grid, larger)).double() / by - W
        size = float((W @ seen.G).mul_(W).sum())
        return float((D @ seen.G).mul_(D).sum()) / size if size > 0 else 0.0


@dataclass(eq=False)
class _Inputs:
    """What a layer multiplies its weights with: Σ x xᵀ [groups, n, n] and Σ |x| [groups, n] over ``rows``, float64."""

    G: Tensor
    magnitude: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Count rows in: [groups, rows, n]."""
        x = x.double()
        self.G += x.mT @ x
        self.magnitude += x.abs().sum(1)
        self.rows += x.shape[1]

    def divide(self, by: Tensor) -> None:
        """The inputs from now on are those divided ``by`` [groups, n]."""
        self.G /= by[:, :, None] * by[:, None, :]
        self.magnitude /= by


def _watched(model: nn.Module, paths: Iterable[str], data: Sequence[Arguments], rows: int) -> dict[str, _Inputs]:
    """path → what the layer reads on ``data``, at most ``rows`` positions of each batch and call."""
    found = {}
    for path in paths:
        rows_of_weight = as_rows(module_at(model, path), tensor_of(module_at(model, path), "weight")).double()
        groups, _, n = rows_of_weight.shape
        found[path] = _Inputs(rows_of_weight.new_zeros(groups, n, n), rows_of_weight.new_zeros(groups, n))
    generator = torch.Generator().manual_seed(0)

    def see(path: str, x: Tensor, y: Tensor) -> None:
        layer = module_at(model, path)
        found[path].add(input_rows(layer, x, drawn_rows(layer, y, rows, generator)))

    for number, arguments in enumerate(data):
        pass_through(model, found, see, arguments, number)
    for path, inputs in found.items():
        expect_finite(path, inputs.G, inputs.magnitude)
    return found


def _columns(model: nn.Module, reader: Touched) -> Tensor:
    """The channel that each column of the reader's weight is multiplied with, -1 for none: [groups, n]."""
    layer = module_at(model, reader.place.module)
    return as_rows(layer, reader.channels.expand(tensor_of(layer, "weight").shape))[:, 0]


def _by_column(model: nn.Module, reader: Touched, factor: Tensor) -> Tensor:
    """The factor of each column: [groups, n]; 1 where it reads none of the channels."""
    columns = _columns(model, reader).to(factor.device)
    return scaled(factor.new_ones(columns.shape), columns, factor)


def _mean_magnitude(model: nn.Module, pair: Pair, seen: Mapping[str, _Inputs]) -> Tensor:
    """mᵢ: the mean of |x| of each channel over rows, columns and readers, [channels]."""
    total = count = torch.zeros(())
    for each in pair.readers:
        inputs, columns = seen[each.place.module], _columns(model, each).flatten()
        total, count = (
            part + torch.zeros(pair.size + 1, dtype=torch.float64).index_add(0, columns % (pair.size + 1), value)
            for part, value in (
                (total, (inputs.magnitude / inputs.rows).flatten().cpu()),
                (count, torch.ones(columns.numel(), dtype=torch.float64)),
            )
        )
    return (total / count.clamp_min(1))[: pair.size]
