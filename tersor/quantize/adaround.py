"""Learnt rounding: whether each weight goes up or down is chosen so that the layer's outputs stay near."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from tersor.core.apply import apply
from tersor.core.check_fields import check_fields
from tersor.core.edit import Edit, Quantizer, Write
from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.masked import Masked
from tersor.core.place import Everything, Selector, TensorPlace, aliases, module_at, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Arguments, Task, output_tensor
from tersor.graph.trace import trace
from tersor.observe.layerwise import Pair, calibration_arguments, expect_finite, stages_of
from tersor.observe.least_squares import as_rows, is_conv1d, output_axis, tensor_of
from tersor.quantize.points import Flow, upper_bound
from tersor.quantize.ranges import MeanSquaredError, Range
from tersor.quantize.rounding import Error, Rounding, learn
from tersor.quantize.schemes import Int
from tersor.quantize.unquantized import without_quantizers
from tersor.quantize.weight_only import expect_finite_weight, expect_weight_bits, quantizer
from tersor.quantize.weights import WEIGHTED

_HELD_OUT = 8  # one row in so many is not learnt from, but tells whether learning helped
_MINIBATCH = 256  # rows


@final
@dataclass(frozen=True)
class AdaRound(Method):
    """Round each weight up or down so that what its layer gives stays near what it gave in float, on calibration data.

    Layer by layer in the order of the forward, x̂ being what the layer reads in the model rounded so far, y what it gave
    in the model without quantisers, a the ReLU or clamp that alone follows:

        min_V E ‖a(y) − a(W̃ x̂ + b)‖² + λ Σ 1 − |2 h(V) − 1|^β,   W̃ = s · (⌊W / s⌋ + h(V)),   h a rectified sigmoid

    β falls from 20 to 2, so that every h ends at 0 or 1. A weight that bears a quantiser already keeps its grid
    (activations are then quantised as ``Quantize`` left them, and x̂ shows it); others get one of ``scheme``, which is
    not learnt. Written are values on the grid. Where rows held out of learning say that rounding to the nearest is as
    good, it stays. Weights at zero stay zero, masks stay. Convolutions, linear layers and transformers' ``Conv1D``.

    Args:
        scheme, range: the grid of weights that have none yet.
        where: which layers.
        blocks: modules that are learnt as wholes, all their layers at once, against what the module gives.
        steps: of Adam, for each layer or block.
        batches, rows: calibration batches, and how many output positions of each are counted, drawn at random.

    Raises InputError for settings out of range, no calibration data, and values that are not finite.
    Source: Nagel et al. 2020 (arXiv 2004.10568), sections 3 and 4, equations 21 to 25; blocks: Li et al. 2021, BRECQ
    (arXiv 2102.05426), without its Fisher weights. We differ: λ is relative to what rounding to the nearest costs.
    """

    scheme: Int = Int(4)
    range: Range = field(default_factory=MeanSquaredError)
    where: Selector = field(default_factory=Everything)
    blocks: Selector | None = None
    steps: int = 1000
    batches: int = 8
    rows: int = 1024

    def __post_init__(self) -> None:
        check_fields(self)
        expect_weight_bits(self.scheme, "AdaRound.scheme")
        for name in ("steps", "batches", "rows"):
            if (got := getattr(self, name)) < 1:
                raise InputError("too few", where=f"AdaRound.{name}", got=got, expected="1 or more")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Round a copy, layer after layer; what was written into it is the plan, with the quantisers of new grids."""
        standing, skips = self._layers(model)
        places = [TensorPlace(path, "weight") for path in standing]
        both = Pair(without_quantizers(model), without_quantizers(model, places), {}, self.rows, 0)
        grids = {path: self._grid(module_at(both.changed, path), path, found) for path, found in standing.items()}
        stages = stages_of(both.changed, list(standing), task)
        called = {path: stage for stage in stages for path in stage.paths}
        skips += [Skip(path, "the forward does not call it as a module") for path in standing if path not in called]
        data = calibration_arguments(both.changed, task, self.batches, 0, "AdaRound") if stages else []
        ends = _ends(both.original, task) if stages else {}
        edits: list[Edit] = []
        lines: list[tuple[str, str]] = []
        for block, paths in self._units(model, list(called)):
            if block is None:
                samples = [both.drawn(called[paths[0]], arguments, number) for number, arguments in enumerate(data)]
                outcomes = [_round_layer(both.changed, path, grids[path], samples, ends.get(path), self.steps)
                            for path in paths]  # fmt: skip
            else:
                outcomes = _round_block(both, block, {path: grids[path] for path in paths}, data, self.steps)
            for outcome in outcomes:
                new: list[Edit] = [Write(TensorPlace(outcome.path, "weight"), outcome.value)]
                apply(both.changed, Plan("AdaRound", tuple(new)), in_place=True)
                edits += new if standing[outcome.path] else [*new, grids[outcome.path]]
                lines.append((outcome.path, str(outcome)))
        return Plan("AdaRound", tuple(edits), tuple(skips), tuple(lines))

    def _layers(self, model: nn.Module) -> tuple[dict[str, FakeQuantize | None], list[Skip]]:
        """Path of each layer whose weight can be rounded → the quantiser that stands on it; and why others cannot."""
        found: dict[str, FakeQuantize | None] = {}
        skips = []
        for path, module in select(model, self.where).items():
            if not isinstance(module, (_ConvNd, nn.Linear)) and not is_conv1d(module):
                continue
            entries = _entries(module)
            quantizers = [entry for entry in entries if isinstance(entry, FakeQuantize)]
            reason = _why_not(model, path, entries)
            if not reason and not quantizers:
                reason = self.scheme.check(path, tensor_of(module, "weight").shape, output_axis(module))
            if reason:
                skips.append(Skip(path, reason))
            else:
                found[path] = quantizers[0] if quantizers else None
        return found, skips

    def _grid(self, layer: nn.Module, path: str, standing: FakeQuantize | None) -> Quantizer:
        place, weight = TensorPlace(path, "weight"), tensor_of(layer, "weight")
        expect_finite_weight(place, weight)
        if standing is None:
            return quantizer(place, weight, output_axis(layer), self.scheme, self.range)
        return Quantizer(
            (place,), standing.scale.detach(), standing.zero_point, standing.quant_min, standing.quant_max,
            axis=standing.axis, learn=False, group_size=standing.group_size,
        )  # fmt: skip

    def _units(self, model: nn.Module, paths: list[str]) -> Iterator[tuple[str | None, list[str]]]:
        """(a block, the layers in it), or (None, a layer), in the order of the forward."""
        chosen = select(model, self.blocks) if self.blocks is not None else {}
        inside: dict[str, list[str]] = {}
        for path in paths:
            holder = next((block for block in chosen if f"{path}.".startswith(f"{block}." if block else "")), None)
            inside.setdefault(path if holder is None else f"{holder}.", []).append(path)
        for unit, members in inside.items():
            yield (unit.removesuffix(".") if unit.endswith(".") else None), members


@dataclass(frozen=True, eq=False)
class _Outcome:
    """A layer's rounded weight, how many went elsewhere than to the nearest, and the relative squared errors of the
    outputs held out: rounded to the nearest, and as learnt."""

    path: str
    value: Tensor
    moved: int
    nearest: float
    learnt: float

    def __str__(self) -> str:
        errors = f"relative squared error of outputs held out {self.nearest:.3g} -> {self.learnt:.3g}"
        if not self.moved:
            return f"rounded to the nearest; {errors}"
        return f"{self.moved:,} of {self.value.numel():,} weights away from the nearest; {errors}"


Held = Callable[[list[Tensor]], float]


def _outcomes(paths: Sequence[str], roundings: list[Rounding], error: Error, held: Held, steps: int) -> list[_Outcome]:
    """Learn, and keep what was learnt where it is better on what was held out."""
    nearest = [rounding.hard() for rounding in roundings]
    before = held(nearest)
    learn(roundings, error, steps)
    values = [rounding.hard() for rounding in roundings]
    after = held(values)
    kept = values if after < before else nearest
    moved = [int((new != old).sum()) for new, old in zip(kept, nearest, strict=True)]
    return [_Outcome(path, value, n, before, after) for path, value, n in zip(paths, kept, moved, strict=True)]


def _round_layer(
    model: nn.Module, path: str, grid: Quantizer, samples: Sequence[Sequence[tuple[str, Tensor, Tensor]]],
    end: float | None, steps: int,
) -> _Outcome:  # fmt: skip
    """``samples``: (path, x, y) of each batch, as ``Pair.drawn`` gives them; ``end``: of the clamp from zero that
    follows the layer."""
    layer = module_at(model, path)
    mine = [(x, y) for batch in samples for name, x, y in batch if name == path]
    x, y = (torch.cat([pair[n] for pair in mine], 1).float() for n in (0, 1))
    expect_finite(path, x, y)
    weight, bias = tensor_of(layer, "weight"), layer.bias
    shift = bias.detach().float().view(len(x), 1, -1) if isinstance(bias, Tensor) else torch.zeros(())
    goal = y if end is None else y.clamp(0, end)

    def off(rows: Tensor, value: Tensor) -> Tensor:
        got = x[:, rows] @ as_rows(layer, value).mT + shift
        return ((got if end is None else got.clamp(0, end)) - goal[:, rows]).square().sum()

    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(x.shape[1], generator=generator).to(x.device)
    learnt, held = order[len(order) // _HELD_OUT :], order[: max(len(order) // _HELD_OUT, 1)]

    def error(step: int, values: list[Tensor]) -> Tensor:
        rows = learnt[torch.randint(len(learnt), (_MINIBATCH,), generator=generator).to(x.device)]
        return off(rows, values[0]) / len(rows)

    size = float(goal[:, held].square().sum()) or 1.0
    with torch.no_grad():
        return _outcomes([path], [Rounding.of(weight, grid)], error, lambda v: float(off(held, v[0])) / size, steps)[0]


def _round_block(
    both: Pair, block: str, grids: Mapping[str, Quantizer], data: Sequence[Arguments], steps: int
) -> list[_Outcome]:
    """Round all layers of a block against what it gives. The last batch is held out, where there are several."""
    module = module_at(both.changed, block)
    names, layers = [], []
    for path in grids:
        layer = module_at(both.changed, path)
        inner = path.removeprefix(f"{block}." if block else "")
        masked = parametrize.is_parametrized(layer, "weight")
        tensor = "parametrizations.weight.original" if masked else "weight"
        names.append(f"{inner}.{tensor}" if inner else tensor)
        layers.append(layer)
    calls = []
    for arguments in data:
        given, wanted = _calls(both.changed, block, arguments), _calls(both.original, block, arguments)
        calls += [(args, kwargs, y) for (args, kwargs, _), (_, _, y) in zip(given, wanted, strict=True)]
    expect_finite(block, *(y for _, _, y in calls))
    known, held = (calls[:-1], calls[-1:]) if len(calls) > 1 else (calls, calls)

    def off(call: tuple[Any, Any, Tensor], values: list[Tensor]) -> Tensor:
        args, kwargs, y = call
        new = dict(zip(names, values, strict=True))
        return (output_tensor(torch.func.functional_call(module, new, args, kwargs)) - y).square().sum()

    def error(step: int, values: list[Tensor]) -> Tensor:
        call = known[step % len(known)]
        return off(call, values) / call[2].shape[0]

    roundings = [
        Rounding.of(tensor_of(layer, "weight"), grids[path]) for path, layer in zip(grids, layers, strict=True)
    ]
    size = sum(float(y.square().sum()) for _, _, y in held) or 1.0
    with torch.no_grad():
        return _outcomes(
            list(grids), roundings, error, lambda v: sum(float(off(call, v)) for call in held) / size, steps
        )


def _calls(model: nn.Module, path: str, arguments: Arguments) -> list[tuple[Any, Any, Tensor]]:
    """(arguments, keyword arguments, output) of each call of the module at ``path`` in a forward."""
    found: list[tuple[Any, Any, Tensor]] = []
    handle = module_at(model, path).register_forward_hook(
        lambda _, args, kwargs, y: found.append((args, kwargs, output_tensor(y))), with_kwargs=True
    )
    args, kwargs = arguments
    with torch.no_grad():
        try:
            model(*args, **kwargs)
        finally:
            handle.remove()
    return found


def _ends(model: nn.Module, task: Task) -> dict[str, float]:
    """Path of each layer that a ReLU or clamp from zero alone follows → where that ends (infinity: nowhere)."""
    flow = Flow(trace(model, task.demand_example()))
    found: dict[str, list[float | None]] = {}
    for call in flow.graph.calls:
        if call.operator in WEIGHTED | {"addmm"}:
            _, absorbed = flow.result(call)
            bound = upper_bound(flow.calls[absorbed[0]]) if absorbed else None
            found.setdefault(call.module, []).append(None if not absorbed else bound or float("inf"))
    return {path: ends[0] for path, ends in found.items() if len(ends) == 1 and ends[0] is not None}


def _entries(layer: nn.Module) -> list[nn.Module]:
    """What stands on the layer's weight."""
    return (
        list(layer.get_submodule("parametrizations.weight").children())
        if parametrize.is_parametrized(layer, "weight")
        else []
    )


def _why_not(model: nn.Module, path: str, entries: Sequence[nn.Module]) -> str:
    layer = module_at(model, path)
    others = [type(entry).__name__ for entry in entries if not isinstance(entry, (Masked, FakeQuantize))]
    if isinstance(layer, _ConvTransposeNd):
        return f"only convolutions and linear layers are rounded, not {type(layer).__name__}"
    if others or (not entries and "weight" not in layer._parameters):
        return f"its weight is computed by {', '.join(others) or 'something else'} from what is stored"
    tied = [str(other) for other in aliases(model, TensorPlace(path, "weight")) if other.module != path]
    return f"its weight is tied to {', '.join(tied)}" if tied else ""
