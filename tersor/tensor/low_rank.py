"""Low-rank approximation of a matrix by its singular values. NumPy and torch alike."""

from __future__ import annotations

import math
from typing import Any

from array_api_compat import array_namespace

Array = Any  # a NumPy array or a torch tensor


def truncated_svd(matrix: Array, rank: int) -> tuple[Array, Array, Array]:
    """(U [m, r], S [r], V [r, n]): U · diag(S) · V is the matrix of rank r nearest to ``matrix`` [m, n].

    Nearest in the Frobenius norm, which then differs by √(Σ σᵢ²) over the singular values left out (Eckart and Young
    1936). V's rows are the right singular vectors, so that nothing is transposed to multiply back. Raises ValueError
    unless the matrix has two axes and finite numbers, and 1 ≤ rank ≤ min(m, n).

    >>> import numpy as np
    >>> u, s, v = truncated_svd(np.array([[2.0, 2.0], [1.0, 1.0]]), 1)
    >>> (u * s @ v).round(6).tolist()
    [[2.0, 2.0], [1.0, 1.0]]
    """
    xp = array_namespace(matrix)
    if len(matrix.shape) != 2 or not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} of {list(matrix.shape)}: expected a matrix [m, n] and 1 <= rank <= min(m, n)")
    if not bool(xp.all(xp.isfinite(matrix))):
        raise ValueError(f"a matrix {list(matrix.shape)} with NaN or infinite numbers has no singular values")
    u, s, v = xp.linalg.svd(matrix, full_matrices=False)
    # Copies, so that the parts left out do not stay in memory behind a view.
    return xp.asarray(u[:, :rank], copy=True), xp.asarray(s[:rank], copy=True), xp.asarray(v[:rank, :], copy=True)


def break_even_rank(m: int, n: int) -> int:
    """The largest rank at which factors [m, r] and [r, n] hold no more numbers than a matrix [m, n]: ⌊mn / (m + n)⌋.

    >>> break_even_rank(100, 50)
    33
    """
    return math.floor(m * n / (m + n))
