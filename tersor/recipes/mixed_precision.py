"""Quantise each layer to as many bits as it needs, by measurement; those that hurt stay float, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

from torch import nn

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.measure.bit_budgets import BitBudgets, fewest_bits, least_loss
from tersor.measure.bit_sensitivity import BitProbe, BitSensitivity, bit_sensitivity
from tersor.measure.layer_curves import in_own_unit
from tersor.quantize.quantize import Quantize


@final
@dataclass(frozen=True)
class MixedPrecision(Method):
    """``Quantize`` with a width for each layer: measured one layer at a time, then assigned by a tolerance or a size.

    Args:
        bits: the widths to choose from; float is a choice too.
        max_drop: what one layer alone may cost of the metric on validation data, in percentage points (in the metric's
            own unit where it is no fraction): each layer gets the fewest bits within it, float where none are.
        max_size: bytes of all these layers' weights and scales together, or at most 1: of what they take in float. The
            widths that meet it at the least predicted loss, exactly; instead of ``max_drop``.
        quantize: everything else.
        samples: of validation, to judge by.

    Raises InputError for numbers out of range, where the size cannot be met, and what ``Quantize`` raises.
    """

    bits: tuple[int, ...] = (8, 4)
    max_drop: float = 0.5
    max_size: float | None = None
    quantize: Quantize = field(default_factory=Quantize)
    samples: int = 1024

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.max_drop < float("inf"):
            raise InputError("must be 0 or more", where="MixedPrecision.max_drop", got=self.max_drop)
        if self.max_size is not None and not 0 < self.max_size < float("inf"):
            raise InputError("must be positive", where="MixedPrecision.max_size", got=self.max_size)
        self._probe()

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """What ``Quantize`` plans with the widths that were assigned; a layer that stays float is a skip that says why.

        The first lines have each layer's increase of the loss at the width it gets, and the size of all.
        """
        found = bit_sensitivity(model, task, self._probe())
        budgets = self._budgets(found, task)
        per_layer = {**self.quantize.per_layer, **budgets.per_layer(self.quantize.weights)}
        plan = replace(self.quantize, per_layer=per_layer).plan(model, task)
        skips = tuple(_told(skip, budgets) for skip in plan.skips)
        return replace(plan, method="MixedPrecision", skips=skips, lines=(*_lines(found, budgets), *plan.lines))

    def _probe(self) -> BitProbe:
        return BitProbe(self.bits, self.quantize, self.samples)

    def _budgets(self, found: BitSensitivity, task: Task) -> BitBudgets:
        if self.max_size is not None:
            whole = sum(layer.float_bytes for layer in found.layers) if self.max_size <= 1 else 1
            try:
                return least_loss(found, self.max_size * whole)
            except InputError as error:
                raise error.at("MixedPrecision.max_size") from error
        return fewest_bits(found, drop=in_own_unit(task, self.max_drop))


def _told(skip: Skip, budgets: BitBudgets) -> Skip:
    reason = budgets.kept_float.get(skip.place)
    return skip if reason is None else Skip(skip.place, f"stays float: {reason}")


def _lines(found: BitSensitivity, budgets: BitBudgets) -> list[tuple[str, str]]:
    lines = []
    for layer in found.layers:
        bits = budgets.bits[layer.layer]
        rises = {point.bits: rise for point, rise in zip(layer.points, found.increases(layer), strict=True)}
        told = ", ".join(f"{width} bits: loss +{rise:.3g}" for width, rise in rises.items())
        lines.append((layer.layer, f"{'float' if bits is None else f'{bits} bits'} ({told})"))
    whole = sum(layer.float_bytes for layer in found.layers)
    text = f"{budgets.size_bytes:,} bytes of weights and scales, {whole:,} in float; predicted: loss"
    return [*lines, ("<model>", f"{text} +{budgets.loss_increase:.3g}")]
