"""From the sensitivity of layers to a width for each: by a tolerance, or at the least predicted loss in a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tersor.core.errors import InputError
from tersor.measure.bit_sensitivity import BitSensitivity, LayerWidths
from tersor.quantize.schemes import Int
from tersor.tensor.multiple_choice import least_loss_choice

Bits = int | None  # None: the layer stays float
Costs = Mapping[str, Mapping[Bits, float]]


@dataclass(frozen=True)
class BitBudgets:
    """``bits``: layer → width, None where it stays float; ``size_bytes``: of all their weights and scales together;
    ``cost``: what the budget is about, of all layers (their bytes, unless other costs were given);
    ``loss_increase``: predicted, the layers' own increases added up; ``kept_float``: layer → why.
    """

    bits: dict[str, Bits]
    size_bytes: int
    cost: float
    loss_increase: float
    kept_float: dict[str, str] = field(default_factory=dict)

    def per_layer(self, scheme: Int = Int()) -> dict[str, Int | None]:
        """What ``Quantize(per_layer=…)`` takes: ``scheme`` at each layer's width, None where it stays float."""
        return {layer: None if bits is None else replace(scheme, bits=bits) for layer, bits in self.bits.items()}


@dataclass(frozen=True)
class _Option:
    """One width of a layer."""

    bits: Bits
    size_bytes: int
    increase: float
    drop: float


def fewest_bits(found: BitSensitivity, *, loss: float | None = None, drop: float | None = None) -> BitBudgets:
    """For each layer the fewest bits down to which the model stays within the tolerance; float where none does.

    ``loss``: largest increase of the loss. ``drop``: largest fall of the metric, in its own unit. Give one of them. One
    layer is quantised at a time: all of them together cost more, about the sum. Raises InputError otherwise.
    """
    if (loss is None) == (drop is None):
        raise InputError("give one of the two", where="fewest_bits", got=f"loss={loss}, drop={drop}")
    chosen: dict[str, _Option] = {}
    reasons: dict[str, str] = {}
    for layer in _layers(found):
        best, *others = _options(found, layer)
        for option in others:
            if (option.increase > loss) if loss is not None else (drop is not None and option.drop > drop):
                if best.bits is None:
                    what, most = (option.increase, loss) if loss is not None else (option.drop, drop)
                    kind = "the loss grows by" if loss is not None else "the metric falls by"
                    reasons[layer.layer] = f"at {option.bits} bits {kind} {what:.3g}; {most:.3g} is allowed"
                break
            best = option
        chosen[layer.layer] = best
    return _budgets(chosen, None, reasons)


def least_loss(
    found: BitSensitivity, budget: float, *, costs: Costs | None = None, may_stay_float: bool = True
) -> BitBudgets:
    """The widths whose costs are within ``budget`` in all, at the least predicted loss: the exact optimum.

    Predicted: each layer's increase by itself, and the sum over layers. ``costs``: layer → width → what it costs
    (milliseconds, say; None is float's); by default the bytes of weights and scales, 4 a weight in float.
    ``may_stay_float``: whether float is a choice too. Raises InputError where the least possible is above the budget,
    or a cost is missing.
    """
    layers = _layers(found)
    options = {layer.layer: [o for o in _options(found, layer) if may_stay_float or o.bits] for layer in layers}
    table = {name: [_cost(costs, name, option) for option in row] for name, row in options.items()}
    losses = [[option.increase for option in row] for row in options.values()]
    try:
        picked = least_loss_choice(list(table.values()), losses, budget)
    except ValueError as error:
        about = "" if costs is not None else ", in bytes of these layers' weights and scales"
        raise InputError(
            "the budget cannot be met with these widths", where="least_loss", got=f"{error}{about}",
            do="Measure fewer bits, or allow more",
        ) from error  # fmt: skip
    chosen = {name: row[number] for (name, row), number in zip(options.items(), picked, strict=True)}
    widest = {name: row[1] for name, row in options.items() if row[0].bits is None and len(row) > 1}
    reasons = {
        name: f"the budget allows it, and at {option.bits} bits the loss grows by {option.increase:.3g}"
        for name, option in widest.items()
    }
    return _budgets(chosen, costs, reasons)


def _layers(found: BitSensitivity) -> tuple[LayerWidths, ...]:
    if not found.layers:
        raise InputError("no layer was measured", where="bit_sensitivity")
    return found.layers


def _options(found: BitSensitivity, layer: LayerWidths) -> list[_Option]:
    """Float, and each width that was measured, bits falling."""
    rises = found.increases(layer)
    measured = zip(layer.points, rises, strict=True)
    return [
        _Option(None, layer.float_bytes, 0.0, 0.0),
        *(_Option(point.bits, point.size_bytes, rise, found.drop(point)) for point, rise in measured),
    ]


def _cost(costs: Costs | None, layer: str, option: _Option) -> float:
    if costs is None:
        return option.size_bytes
    row: Mapping[Any, float] = costs.get(layer, {})
    if option.bits not in row:
        raise InputError("no cost is given", where=f"least_loss.costs, {layer}", expected=f"a number for {option.bits}")
    return row[option.bits]


def _budgets(chosen: Mapping[str, _Option], costs: Costs | None, reasons: dict[str, str]) -> BitBudgets:
    return BitBudgets(
        {name: option.bits for name, option in chosen.items()},
        sum(option.size_bytes for option in chosen.values()),
        sum(_cost(costs, name, option) for name, option in chosen.items()),
        sum(option.increase for option in chosen.values()),
        {name: reasons[name] for name, option in chosen.items() if option.bits is None and name in reasons},
    )
