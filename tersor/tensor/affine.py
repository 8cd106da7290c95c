"""Affine quantisation: real numbers as integers, x ≈ (q − zero_point) · scale. NumPy and torch alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace, is_torch_array

Array = Any  # a NumPy array or a torch tensor

SMALLEST_SCALE = 1e-8  # keeps 1 / scale and scale · scale representable in float32


def choose_parameters(
    low: Array, high: Array, *, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Array, Array]:
    """(scale, zero_point) with which the reals [low, high] fill the integers ``quant_min`` … ``quant_max``.

    ``low``, ``high``: floating, any one shape, one range per element; both results have that shape, scale in their
    dtype, zero_point int32. Zero is always representable exactly, so that padding and ReLU stay exact:

        symmetric   scale = max(|low|, |high|) / quant_max, zero_point = 0 (the middle, where quant_min ≥ 0)
        otherwise   scale = (high − low) / (quant_max − quant_min), zero_point = round(quant_min − low / scale),
                    after low = min(low, 0), high = max(high, 0)

    Raises ValueError where a bound is not finite or low > high. Jacob et al. 2018 (arXiv 1712.05877), section 2.1.

    >>> import numpy as np
    >>> scale, zero_point = choose_parameters(np.array(0.0), np.array(5.1), quant_min=0, quant_max=255, symmetric=False)
    >>> round(float(scale), 6), int(zero_point)
    (0.02, 0)
    """
    xp = array_namespace(low, high)
    if not bool(xp.all(xp.isfinite(low) & xp.isfinite(high))) or bool(xp.any(low > high)):
        raise ValueError("a range needs finite bounds with low <= high")
    dtype = xp.result_type(low.dtype, high.dtype)
    low, high = (xp.astype(end, xp.result_type(dtype, xp.float32), copy=False) for end in (low, high))
    zero = xp.zeros_like(low)
    smallest = zero + max(SMALLEST_SCALE, float(xp.finfo(dtype).smallest_normal))
    if symmetric:
        middle = (quant_min + quant_max + 1) // 2 if quant_min >= 0 else 0
        largest = xp.where(xp.abs(low) > xp.abs(high), xp.abs(low), xp.abs(high))
        scale = xp.maximum(largest / (quant_max - middle), smallest)
        return xp.astype(scale, dtype, copy=False), xp.astype(zero + middle, xp.int32)
    low, high = xp.minimum(low, zero), xp.maximum(high, zero)
    scale = xp.maximum((high / 2 - low / 2) / ((quant_max - quant_min) / 2), smallest)  # high - low may overflow
    zero_point = xp.clip(xp.round(quant_min - low / scale), quant_min, quant_max)
    return xp.astype(scale, dtype, copy=False), xp.astype(zero_point, xp.int32)


def quantize(x: Array, scale: Array, zero_point: Array, *, quant_min: int, quant_max: int) -> Array:
    """q = clamp(round(x / scale) + zero_point), rounding halves to even; int32, the shape of ``x``.

    ``scale`` and ``zero_point`` broadcast against ``x``; computed in float32 where ``x`` is half precision, which does
    not hold the integers.

    >>> import numpy as np
    >>> quantize(np.array([0.25, 0.75, 9.0]), np.array(0.5), np.array(0), quant_min=-128, quant_max=127).tolist()
    [0, 2, 18]
    """
    xp = array_namespace(x, scale)
    wide = xp.result_type(x.dtype, xp.float32)
    q = xp.round(xp.astype(x, wide, copy=False) / scale) + xp.astype(zero_point, wide)
    return xp.astype(xp.clip(q, quant_min, quant_max), xp.int32)


def dequantize(q: Array, scale: Array, zero_point: Array) -> Array:
    """x̂ = (q − zero_point) · scale in the dtype of ``scale``, the shape of ``q``."""
    xp = array_namespace(q, scale)
    wide = xp.result_type(scale.dtype, xp.float32)
    return xp.astype(xp.astype(q - zero_point, wide) * xp.astype(scale, wide, copy=False), scale.dtype, copy=False)


def fake_quantize(x: Array, scale: Array, zero_point: Array, *, quant_min: int, quant_max: int) -> Array:
    """x̂ = dequantize(quantize(x)) in the dtype of ``x``; of a torch tensor with a straight-through gradient.

    The gradient of x is that of x̂ where x lies within the range, both ends included, and 0 beyond (Bengio et al. 2013,
    arXiv 1308.3432, section 4; Jacob et al. 2018, arXiv 1712.05877, section 3). Scales get none: see ``FakeQuantize``
    for learnt ones. ``scale`` and ``zero_point`` broadcast against ``x``, which must be finite.

    >>> import numpy as np
    >>> fake_quantize(np.array([0.3, 99.0]), np.array(0.5), np.array(0), quant_min=-128, quant_max=127).tolist()
    [0.5, 63.5]
    """
    xp = array_namespace(x, scale)
    q = quantize(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max)
    rounded = xp.astype(dequantize(q, scale, zero_point), x.dtype)
    if not (is_torch_array(x) and x.requires_grad):
        return rounded
    ends = (xp.astype(dequantize(xp.full_like(zero_point, end), scale, zero_point), x.dtype).detach()
            for end in (quant_min, quant_max))  # fmt: skip
    within = xp.clip(x, *ends)
    return rounded.detach() + (within - within.detach())  # adds exactly 0, and the gradient of the clip


def split_groups(x: Array, group_size: int, axis: int = 0) -> Array:
    """``x`` as [rows, groups, group_size]: the rows along ``axis``, each flattened and cut into runs.

    Raises ValueError where ``group_size`` does not divide a row.

    >>> import numpy as np
    >>> split_groups(np.arange(8).reshape(2, 2, 2), 2)[1].tolist()
    [[4, 5], [6, 7]]
    """
    xp = array_namespace(x)
    rows = x.shape[axis]
    row = math.prod(x.shape) // max(rows, 1)
    if group_size < 1 or row % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {row} numbers of a row of {list(x.shape)}")
    return xp.reshape(xp.moveaxis(x, axis, 0), (rows, row // group_size, group_size))


def join_groups(groups: Array, shape: Sequence[int], axis: int = 0) -> Array:
    """The array of ``shape`` whose rows along ``axis`` were split into ``groups`` (any shape of as many numbers)."""
    xp = array_namespace(groups)
    moved = [shape[axis], *(n for d, n in enumerate(shape) if d != axis % len(shape))]
    return xp.moveaxis(xp.reshape(groups, tuple(moved)), 0, axis)
