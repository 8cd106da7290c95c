"""A matrix as the product of two thin ones, by its singular values."""

from __future__ import annotations

import math
import warnings
from typing import Any, TypeGuard

import numpy as np

from tersor.tensor.low_rank import break_even_rank, truncated_svd
from tersor.tiny.layers import Array, Layer, Linear, Sequential, Tensor
from tersor.tiny.magnitude import checked


def low_rank_approximate(weight_matrix: Any, rank_ratio: float = 0.5) -> tuple[Array, Array, Array]:
    """(U [m, r], S [r], V [r, n]) with U · diag(S) · V ≈ ``weight_matrix`` [m, n], r = max(1, ⌊ratio · min(m, n)⌋).

    V's rows are the singular vectors: ``U @ np.diag(S) @ V`` as in the course. What changed: a rank at which the
    factors hold more numbers than the matrix is warned of (half the ranks of a square matrix save nothing), half
    precision is decomposed in single, and 0.29 · 100 is 29.

    >>> U, S, V = low_rank_approximate(np.eye(8)[:, :4] * 2.0, 0.5)
    >>> U.shape, S.tolist(), V.shape
    ((8, 2), [2.0, 2.0], (2, 4))
    """
    w = checked(weight_matrix, "weight_matrix")
    if w.ndim != 2:
        raise ValueError(f"weight_matrix {list(w.shape)}: expected two axes")
    m, n = w.shape
    rank = _rank(w, rank_ratio)
    if rank > break_even_rank(m, n):
        warnings.warn(
            f"rank {rank} of {m} × {n} stores {rank * (m + n):,} numbers instead of {m * n:,}: rank_ratio of at most "
            f"{break_even_rank(m, n) / min(m, n):.3f} saves some", stacklevel=2,
        )  # fmt: skip
    return truncated_svd(w.astype(np.float32) if w.dtype.itemsize < 4 else w, rank)


def factorize(model: Layer, rank_ratio: float) -> Layer:
    """Replaces, in place, each Linear of a Sequential by two, x · (U·√S) · (√S·V) + b, where those hold fewer numbers.

    Gives the model back. A Linear of which the factors would be larger stays as it is. The classic did not do this.
    """
    if not isinstance(model, Sequential):
        raise ValueError(f"a {type(model).__name__}: expected a Sequential, in which one layer can become two")
    layers: list[Layer] = []
    for layer in model.layers:
        if isinstance(layer, Sequential):
            factorize(layer, rank_ratio)
        layers += _factors(layer, rank_ratio) if saves_numbers(layer, rank_ratio) else [layer]
    model.layers = layers
    return model


def saves_numbers(layer: Layer, rank_ratio: float) -> TypeGuard[Linear]:
    """Whether this is a Linear of which two factors of that rank hold no more numbers than its weight."""
    return isinstance(layer, Linear) and _rank(layer.weight.data, rank_ratio) <= break_even_rank(*layer.weight.shape)


def _factors(layer: Linear, rank_ratio: float) -> list[Layer]:
    u, s, v = low_rank_approximate(layer.weight, rank_ratio)
    first, second = Linear(len(u), len(s), bias=False), Linear(len(s), v.shape[1], bias=False)
    first.weight, second.weight, second.bias = Tensor(u * np.sqrt(s)), Tensor(np.sqrt(s)[:, None] * v), layer.bias
    return [first, second]


def _rank(w: Array, rank_ratio: float) -> int:
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio {rank_ratio}: expected above 0 and at most 1")
    return max(1, math.floor(rank_ratio * min(w.shape) + 1e-9))
