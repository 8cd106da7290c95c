"""Weights as integers and activations as they were: smaller files, fewer bytes to read per token, no calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from tersor.core.check_fields import check_fields
from tersor.core.edit import Quantizer
from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.finite import expect_finite
from tersor.core.masked import Masked
from tersor.core.place import Everything, Selector, TensorPlace, aliases, select, stored_at, tensor_at
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.observe.least_squares import is_conv1d, output_axis
from tersor.quantize.ranges import MinMax, Range
from tersor.quantize.schemes import Int
from tersor.quantize.weights import is_quantized
from tersor.tensor.affine import join_groups, split_groups


@final
@dataclass(frozen=True)
class QuantizeWeights(Method):
    """Round the weights of layers to the nearest integers of a grid; activations stay as they are.

    ŵ = (clamp(round(w / s) + z) − z) · s with one scale for each output channel (or tensor, or group of inputs) of
    every convolution, linear layer, embedding (a scale for each row), recurrent layer and attention projection that
    ``where`` means. A ``Quantizer`` that is not learnt stands on each; what is stored beneath stays, and so do masks:
    zero is on every grid. Tied weights are rounded once, where ``where`` means all of their layers. Other parameters
    of two or more axes, computed weights and what is quantised already are skips.

    Args:
        scheme: the integers, 2 to 8 bits; ``Int(4, group_size=128)`` has a scale for each 128 inputs of an output.
        range: which reals they reach (docs/cards/quantize-weights.md says what clipping did).
        where: which layers.

    Raises InputError where every weight meant is quantised already, and where one is not finite.
    Source: Jacob et al. 2018 (arXiv 1712.05877), section 2.1, for the grid.
    """

    scheme: Int = Int(8)
    range: Range = field(default_factory=MinMax)
    where: Selector = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_fields(self)
        expect_weight_bits(self.scheme, "QuantizeWeights.scheme")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """One Quantizer for each weight; each line says the grid and the relative squared error of the weight."""
        skips: list[Skip] = []
        edits, lines = [], []
        for weight in layer_weights(model, self.where, skips):
            reason = self.scheme.check(str(weight.place), weight.value.shape, weight.axis)
            if reason:
                skips.append(Skip(str(weight.place), reason))
                continue
            edit = quantizer(weight.place, weight.value, weight.axis, self.scheme, self.range)
            edits.append(edit)
            what = described(self.scheme, edit, weight.value, rounded(edit, weight.value))
            lines.append((", ".join(map(str, weight.places)), what))
        return Plan("QuantizeWeights", tuple(edits), tuple(skips), tuple(lines))


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """The weight of a layer. ``places``: all that hold it (tied ones); ``value``: as the layer reads it, masked;
    ``axis``: of its output channels."""

    places: tuple[TensorPlace, ...]
    value: Tensor
    axis: int

    @property
    def place(self) -> TensorPlace:
        """The first of its places."""
        return self.places[0]


def layer_weights(model: nn.Module, where: Selector, skips: list[Skip]) -> list[LayerWeight]:
    """The weights of the layers that ``where`` means, tied ones once, in the model's order.

    Why others are not among them goes into ``skips``. Raises InputError where all that are meant are quantised
    already, and where a weight is not finite.
    """
    chosen = select(model, where)
    found: list[LayerWeight] = []
    seen: set[int] = set()
    standing: list[TensorPlace] = []
    for path, module in chosen.items():
        for name, is_weight in _tensors(module):
            place = TensorPlace(path, name)
            stored = stored_at(model, place)
            if stored.ndim < 2 or id(stored) in seen:
                continue
            seen.add(id(stored))
            if is_quantized(model, place):
                standing.append(place)
            reason = _why_not(model, place, stored, is_weight, chosen)
            if reason is not None:
                skips.append(Skip(str(place), reason))
                continue
            value = tensor_at(model, place).detach()
            expect_finite_weight(place, value)
            places = tuple(sorted(aliases(model, place), key=lambda other: other != place))
            found.append(LayerWeight(places, value, output_axis(module)))
    if standing and not found:
        raise InputError(
            "the model is quantised already", where=str(standing[0]), got=f"{len(standing)} quantised weights",
            do="Quantise the model as it was before; after a step that quantised them all, leave this one out",
        )  # fmt: skip
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Name of each parameter that a module owns, parametrized or not, and whether it is the weight of a known layer."""
    if isinstance(module, (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag)) or is_conv1d(module):
        known: tuple[str, ...] = ("weight",)
    elif isinstance(module, nn.MultiheadAttention):
        known = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    elif isinstance(module, nn.RNNBase):
        known = tuple(name for names in module._all_weights for name in names if name.startswith("weight_"))
    else:
        known = ()
    if isinstance(module, parametrize.ParametrizationList):
        return
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if parametrize.is_parametrized(module):
        names += list(module.parametrizations)  # type: ignore[arg-type]
    for name in names:
        yield name, name in known


def _why_not(
    model: nn.Module, place: TensorPlace, stored: Tensor, is_weight: bool, chosen: Mapping[str, nn.Module]
) -> str | None:
    if is_quantized(model, place):
        return "quantised already"
    module = model.get_submodule(place.module)
    if not is_weight:
        return f"stays float: not the weight of a known layer, but of a {type(module).__name__}, {list(stored.shape)}"
    if not stored.is_floating_point():
        return f"it holds {str(stored.dtype).removeprefix('torch.')}, not floating point"
    if not stored.numel():
        return f"it is empty: shape {list(stored.shape)}"
    if parametrize.is_parametrized(module, place.tensor):
        entries = module.get_submodule(f"parametrizations.{place.tensor}").children()
        others = [type(entry).__name__ for entry in entries if not isinstance(entry, Masked)]
        if others:
            return f"it is computed by {', '.join(others)} from what is stored"
    left_out = [str(other) for other in aliases(model, place) if other.module not in chosen]
    return f"it is tied to {', '.join(left_out)}, which where leaves out" if left_out else None


def expect_finite_weight(place: TensorPlace, value: Tensor) -> None:
    """Raise InputError, naming the weight, where it has a NaN or an infinity, or no values (on the meta device)."""
    expect_finite(value, str(place), "a weight that is not finite has no range")


def expect_weight_bits(scheme: Int, where: str) -> None:
    """Raise InputError where the scheme is one that only activations take."""
    if scheme.bits > 8:
        raise InputError("too wide for weights", where=where, got=str(scheme), expected="2 to 8 bits")


def rows_of(value: Tensor, axis: int, scheme: Int) -> Tensor:
    """The weights that share a scale, row by row: float32 [scales, n].

    All of them, those of an output channel along ``axis``, or each run of ``group_size`` of these.
    """
    if scheme.granularity == "per_tensor":
        return value.reshape(1, -1).float()
    if scheme.group_size is not None:
        return split_groups(value, scheme.group_size, axis).flatten(0, 1).float()
    return value.movedim(axis, 0).flatten(1).float()


def quantizer(place: TensorPlace, value: Tensor, axis: int, scheme: Int, range: Range) -> Quantizer:
    """The grid for one weight, from its own values; not learnt.

    Scales are [], [channels along ``axis``], or [channels, groups]; the groups must divide a channel (``Int.check``).
    """
    scale, zero_point = range.parameters(rows_of(value, axis, scheme), scheme)
    one = scheme.granularity == "per_tensor"
    shape = [] if one else [value.shape[axis]] if scheme.group_size is None else [value.shape[axis], -1]
    return Quantizer(
        (place,), scale.reshape(shape), zero_point.reshape(shape), scheme.quant_min, scheme.quant_max,
        axis=None if one else axis, learn=False, group_size=scheme.group_size,
    )  # fmt: skip


def spread(edit: Quantizer | FakeQuantize, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) of each number of the tensor of ``shape`` that the quantiser stands on."""
    if edit.axis is None:
        return edit.scale.expand(*shape), edit.zero_point.expand(*shape)
    if edit.group_size is None:
        along = [-1 if d == edit.axis else 1 for d in range(len(shape))]
        return edit.scale.view(along).expand(*shape), edit.zero_point.view(along).expand(*shape)
    scale, zero_point = (
        join_groups(part[..., None].expand(-1, -1, edit.group_size), shape, edit.axis)
        for part in (edit.scale, edit.zero_point)
    )
    return scale, zero_point


def rounded(edit: Quantizer, value: Tensor) -> Tensor:
    """What the quantiser makes of ``value``: the nearest values on its grid."""
    grid = FakeQuantize(
        edit.scale, edit.zero_point, edit.quant_min, edit.quant_max,
        axis=edit.axis, learn=False, group_size=edit.group_size,
    )  # fmt: skip
    with torch.no_grad():
        return grid(value)


def described(scheme: Int, edit: Quantizer, before: Tensor, after: Tensor) -> str:
    """The line of a plan: the scheme, how many scales, and Σ (ŵ − w)² / Σ w²."""
    size = float(before.double().square().sum())
    lost = float((after.double() - before.double()).square().sum())
    error = lost / size if size else 0.0
    return f"{scheme}, {edit.scale.numel():,} scales, relative squared error {error:.3g}"
