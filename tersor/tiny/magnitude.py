"""Small weights go: pruning one array by magnitude, and what an array looks like before and after."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.tensor.change import change
from tersor.tensor.masks import count, keep_largest
from tersor.tiny.layers import Array, as_array
from tersor.tiny.tables import show

PERCENTILES = (50, 70, 80, 90, 95, 99)


def checked(weights: Any, name: str = "weights") -> Array:
    """``weights`` as an array. Raises ValueError where they are empty, not floating, or not all finite (counted)."""
    w = as_array(weights)
    if w.dtype.kind != "f":
        raise ValueError(f"{name}: {w.dtype}, expected floating numbers; convert or dequantise them first")
    if w.size == 0:
        raise ValueError(f"{name}: {list(w.shape)} is empty, expected at least one number")
    if not np.all(np.isfinite(w)):
        nan, infinite = int(np.isnan(w).sum()), int(np.isinf(w).sum())
        raise ValueError(f"{name}: {nan} NaN and {infinite} infinite of {w.size} numbers, expected finite ones")
    return w


def analyze_weight_redundancy(weights: Any, title: str = "Weight Analysis") -> dict[str, Any]:
    """What share of the weights is nearly zero: total_params, mean_abs, std, natural_sparsity, percentiles.

    ``std`` is of |w|, as in the classic (which printed it as that of w; the label here says so). ``natural_sparsity``
    is the percentage with |w| ≤ 0.1 × mean |w|. ``percentiles`` of |w| by 50, 70, 80, 90, 95, 99. What changed: NaN,
    infinite, integer and empty weights are refused, and half precision is summed in double.

    >>> import contextlib, io
    >>> with contextlib.redirect_stdout(io.StringIO()):
    ...     found = analyze_weight_redundancy(np.array([0.0, 1.0, -1.0, 2.0]))
    >>> found["total_params"], found["natural_sparsity"], found["percentiles"][50]
    (4, 25.0, 1.0)
    """
    size = np.abs(checked(weights)).astype(np.float64).ravel()
    near_zero = int(np.sum(size <= 0.1 * size.mean()))
    found: dict[str, Any] = {
        "total_params": size.size,
        "mean_abs": float(size.mean()),
        "std": float(size.std()),
        "natural_sparsity": near_zero / size.size * 100,
        "percentiles": {p: float(np.percentile(size, p)) for p in PERCENTILES},
    }
    rows = [(f"{p} % of |w| are at most", f"{value:.6f}") for p, value in found["percentiles"].items()]
    show(
        title,
        ("of the weights", "value"),
        [
            ("how many", f"{size.size:,}"),
            ("mean |w|", f"{found['mean_abs']:.6f}"),
            ("standard deviation of |w|", f"{found['std']:.6f}"),
            *rows,
            ("|w| at most a tenth of the mean", f"{near_zero:,} ({found['natural_sparsity']:.1f} %)"),
        ],
    )
    return found


def prune_array(weights: Array, sparsity: float) -> tuple[Array, Array]:
    """(weights with exactly ⌊sparsity · n + 1e-9⌋ of the smallest set to zero, the mask as bool)."""
    keep = keep_largest(np.abs(weights), count(sparsity, weights.size))
    return np.where(keep, weights, weights.dtype.type(0)), keep


class MagnitudePruner:
    """Prunes arrays by magnitude; ``pruning_masks``, ``original_weights`` and ``pruning_stats`` keep each by its name.

    What changed: the classic's percentile misses the target where magnitudes are tied (all equal: nothing goes) and is
    one off where sparsity · n falls badly; ``prune`` counts. The three dictionaries, which the classic left empty, are
    filled.
    """

    def __init__(self) -> None:
        self.pruning_masks: dict[str, Array] = {}
        self.original_weights: dict[str, Array] = {}
        self.pruning_stats: dict[str, dict[str, Any]] = {}

    def calculate_threshold(self, weights: Any, sparsity: float) -> float:
        """The ``sparsity``-quantile of |w|, but never above the smallest |w| that is to stay.

        What changed: the bound, without which ``create_mask`` removes one weight too many for some n. Only ties can
        make the mask from a threshold miss the target now.
        """
        size = np.abs(checked(weights)).astype(np.float64).ravel()
        zeros = min(count(sparsity, size.size), size.size - 1)
        return float(min(np.percentile(size, sparsity * 100), np.partition(size, zeros)[zeros]))

    def create_mask(self, weights: Any, threshold: float) -> Array:
        """1 where |w| ≥ threshold, else 0, as float32; the same as the classic."""
        return (np.abs(checked(weights)) >= threshold).astype(np.float32)

    def prune(
        self, weights: Any, sparsity: float = 0.7, name: str | None = None
    ) -> tuple[Array, Array, dict[str, Any]]:
        """(pruned, mask, stats): exactly ⌊sparsity · n + 1e-9⌋ weights go, of equal ones the earlier first.

        ``stats``: target_sparsity, actual_sparsity, threshold, original_params, remaining_params, pruned_params,
        compression_ratio (of counts: original / remaining). The mask is float32 of 0 and 1, the weights keep their
        dtype. ``name`` is the key under which the pruner remembers it (by default weights_0, weights_1, …).
        """
        w = checked(weights, name or "weights")
        pruned, keep = prune_array(w, sparsity)
        remaining = int(keep.sum())
        stats = {
            "target_sparsity": sparsity,
            "actual_sparsity": (w.size - remaining) / w.size,
            "threshold": self.calculate_threshold(w, sparsity),
            "original_params": w.size,
            "remaining_params": remaining,
            "pruned_params": w.size - remaining,
            "compression_ratio": w.size / remaining if remaining else float("inf"),
        }
        key = name or f"weights_{len(self.pruning_stats)}"
        mask = keep.astype(np.float32)
        self.pruning_masks[key], self.original_weights[key], self.pruning_stats[key] = mask, w.copy(), stats
        return pruned, mask, stats

    def measure_accuracy_impact(self, original: Any, pruned: Any) -> dict[str, float]:
        """mean_absolute_error, max_absolute_error, mean_relative_error, weight_norm_preservation.

        What changed: the relative error is averaged over the weights that are not zero, instead of adding 1e-8 to every
        divisor (which is wrong where weights are that small); weights that are all zero keep their norm instead of
        giving NaN. This measures weights, not accuracy: that is ``evaluate``.
        """
        found = change(checked(original, "original weights"), checked(pruned, "pruned weights"))
        return {
            "mean_absolute_error": found.mean_error,
            "max_absolute_error": found.max_error,
            "mean_relative_error": found.mean_relative_error,
            "weight_norm_preservation": found.norm_kept,
        }
