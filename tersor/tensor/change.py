"""How far changed weights are from the original ones: errors, the norm that is left, a score. NumPy and torch alike."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from array_api_compat import array_namespace

Array = Any  # a NumPy array or a torch tensor


class Change(NamedTuple):
    """What ``change`` finds, plain floats.

    ``mean_error``, ``max_error``: of |ŵ − w|. ``mean_relative_error``, ``max_relative_error``: of |ŵ − w| / |w| over
    the weights w ≠ 0. ``norm_kept``: ‖ŵ‖ / ‖w‖. ``quality``: norm_kept · (1 − mean_error / mean |w|), held to [0, 1].
    """

    mean_error: float
    max_error: float
    mean_relative_error: float
    max_relative_error: float
    norm_kept: float
    quality: float


def change(original: Array, changed: Array) -> Change:
    """How far ``changed`` is from ``original``: arrays of one shape and kind, at least one element; float64 inside.

    Of an original that is all zero, the norm kept is 1 where nothing changed and 0 otherwise. Raises ValueError for
    shapes that differ, no element, and values that are not finite.

    >>> import numpy as np
    >>> found = change(np.array([3.0, -4.0, 0.0, 1.0]), np.array([3.0, -4.0, 0.0, 0.0]))
    >>> found.mean_error, found.mean_relative_error, round(found.norm_kept, 4), round(found.quality, 4)
    (0.25, 0.3333333333333333, 0.9806, 0.858)
    """
    if tuple(original.shape) != tuple(changed.shape):
        raise ValueError(f"shapes {tuple(original.shape)} and {tuple(changed.shape)}: expected one shape")
    if math.prod(original.shape) == 0:
        raise ValueError(f"an array of shape {tuple(original.shape)} has no element to compare")
    xp = array_namespace(original, changed)
    w, new = xp.astype(original, xp.float64), xp.astype(changed, xp.float64)
    if not bool(xp.all(xp.isfinite(w) & xp.isfinite(new))):
        raise ValueError("weights that are not finite cannot be compared: expected finite numbers")
    error, size = xp.abs(new - w), xp.abs(w)
    there = size > 0
    relative = error[there] / size[there]
    some = math.prod(relative.shape) > 0
    mean_error, mean_size = float(xp.mean(error)), float(xp.mean(size))
    kept = _ratio(math.sqrt(float(xp.sum(new * new))), math.sqrt(float(xp.sum(w * w))))
    return Change(
        mean_error, float(xp.max(error)), float(xp.mean(relative)) if some else 0.0,
        float(xp.max(relative)) if some else 0.0, kept, quality(kept, mean_error, mean_size),
    )  # fmt: skip


def quality(norm_kept: float, mean_error: float, mean_size: float) -> float:
    """norm_kept · (1 − mean_error / mean_size), held to [0, 1]; without an error, an original of zeros has 1.

    >>> quality(0.9, 0.1, 1.0), quality(2.0, 0.0, 1.0), quality(0.5, 3.0, 1.0)
    (0.81, 1.0, 0.0)
    """
    if mean_size == 0:
        return 1.0 if mean_error == 0 else 0.0
    return min(1.0, max(0.0, norm_kept * (1 - mean_error / mean_size)))


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 1.0 if part == 0 else 0.0
    return part / whole
