"""Activations of which a few values are far larger than the rest: they take the integers that the rest needs."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.core.edit import Quantizer
from tersor.quantize.ranges import Entropy, Percentile, Range
from tersor.quantize.schemes import Int

SHARE = 99.9  # percent of the values that are the rest
FAR = 8.0  # times: three bits of the rest's precision are lost
FEWEST = 2000  # values, below which a thousandth of them says nothing
HELP: tuple[Range, ...] = (Percentile(SHARE), Entropy(), Percentile(99.0))


def outliers(sample: Tensor, edit: Quantizer, scheme: Int) -> str:
    """What a plan's line says of outliers within an activation's range, and the range that helps; "" without any.

    ``sample``: what passed there, [n]. Zeros are left out: they are exact on every grid, however many. The range that
    is named was tried: its step is that much finer.
    """
    sizes = sample[sample != 0].abs().sort().values
    if len(sizes) < FEWEST:
        return ""
    rest, largest = float(sizes[int(SHARE / 100 * (len(sizes) - 1))]), float(sizes[-1])
    ends = torch.tensor([edit.quant_min, edit.quant_max]) - edit.zero_point
    reached = min(largest, float((ends * edit.scale).abs().max()))
    if reached < FAR * rest:
        return ""
    said = (
        f"; outliers: {SHARE:g} % of the values lie within {rest:.3g}, the largest is {largest:.3g}, and the range "
        f"goes to {reached:.3g}"
    )
    for estimator in HELP:
        finer = float(edit.scale / estimator.parameters(sample[None], scheme)[0])
        if finer >= FAR / 2:
            return f"{said}: activation_range={estimator} makes the step {finer:.0f} times finer"
    return said
