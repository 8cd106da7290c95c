"""Which numbers stay: exact counts, N:M, blocks and rows, ties broken by position. NumPy and torch alike.

A score says how much a number matters; a mask is bool, True where it stays. Counts are exact. Of equal scores the one
that stands earlier (flattened, last axis fastest) goes first, so that the same scores always give the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from array_api_compat import array_namespace, is_torch_namespace

Array = Any  # a NumPy array or a torch tensor


def count(sparsity: float, n: int) -> int:
    """How many of ``n`` go: ⌊sparsity · n + 1e-9⌋, the 1e-9 for products such as 0.29 · 100 = 28.999999999999996.

    Raises ValueError unless 0 ≤ sparsity < 1.

    >>> count(0.29, 100), count(0.5, 3)
    (29, 1)
    """
    if not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity!r}: expected a number, at least 0 and below 1")
    return math.floor(sparsity * n + 1e-9)


def keep_largest(scores: Array, zeros: int) -> Array:
    """The mask, shaped like ``scores``, in which exactly the ``zeros`` smallest scores are False.

    ``scores``: any shape; −∞ goes first, +∞ last. Raises ValueError on NaN, or unless 0 ≤ zeros ≤ the number of scores.

    >>> import numpy as np
    >>> keep_largest(np.array([3.0, 1.0, 2.0, 1.0, 1.0]), 2).tolist()
    [True, False, True, False, True]
    """
    xp = array_namespace(scores)
    n = math.prod(scores.shape)
    if not 0 <= zeros <= n:
        raise ValueError(f"{zeros} zeros of {n} scores: expected at least 0 and at most {n}")
    _refuse_nan(scores)
    if zeros == 0:
        return xp.ones_like(scores, dtype=xp.bool)
    flat = xp.reshape(scores, (-1,))
    largest_gone = _kth_smallest(flat, zeros)
    keep = flat > largest_gone
    # Of the scores equal to the largest that goes, the first few go and the others stay.
    tied = xp.nonzero(flat == largest_gone)[0]
    below = n - int(xp.count_nonzero(keep)) - tied.shape[0]
    keep[tied[zeros - below :]] = True
    return xp.reshape(keep, tuple(scores.shape))


def allocate(scores: Sequence[Array], zeros: int) -> list[Array]:
    """A mask for each of several arrays of scores that compete with each other; exactly ``zeros`` are False in total.

    Of equal scores those of the earlier array go first. An array may lose everything: look, and say so. Raises
    ValueError as ``keep_largest``.

    >>> import numpy as np
    >>> [mask.tolist() for mask in allocate([np.array([1.0, 9.0]), np.array([2.0, 3.0])], 2)]
    [[False, True], [False, True]]
    """
    if not scores:
        return []
    xp = array_namespace(*scores)
    keep = keep_largest(xp.concat([xp.reshape(each, (-1,)) for each in scores]), zeros)
    masks, start = [], 0
    for each in scores:
        end = start + math.prod(each.shape)
        masks.append(xp.reshape(keep[start:end], tuple(each.shape)))
        start = end
    return masks


def n_of_m(scores: Array, n: int, m: int, axis: int = -1) -> Array:
    """The mask, shaped like ``scores``, that keeps the ``n`` largest of every ``m`` consecutive scores along ``axis``.

    2:4 along the input axis of ``weight [out, in]`` (the last) is what sparse tensor cores take; along the input
    channels of a convolution's ``weight [out, in, h, w]`` it is ``axis=1``. Mishra et al. 2021 (arXiv 2104.08378),
    section 3. Raises ValueError on NaN, unless 0 < n ≤ m, and where m does not divide the axis, with the arithmetic.

    >>> import numpy as np
    >>> n_of_m(np.array([[4.0, 1.0, 2.0, 3.0]]), 2, 4).tolist()
    [[True, False, False, True]]
    """
    if not 0 < n <= m:
        raise ValueError(f"{n}:{m} keeps {n} of every {m}: expected 0 < n <= m")
    if not scores.shape:
        raise ValueError(f"{n}:{m} needs an axis; a single number has none")
    length = scores.shape[axis]
    if length % m:
        raise ValueError(f"m={m} does not divide axis {axis} of {list(scores.shape)}: {_remainder(length, m)}")
    _refuse_nan(scores)
    xp = array_namespace(scores)
    last = xp.moveaxis(scores, axis, -1)
    groups = xp.reshape(last, (-1, m))
    columns = [groups[:, i] for i in range(m)]
    # How many of its group go before each: those that are smaller, and the equal ones that stand earlier.
    ranks = [xp.zeros_like(column, dtype=xp.uint8 if m <= 256 else xp.int32) for column in columns]
    for j in range(m):
        for i in range(j):
            i_first = columns[i] <= columns[j]
            ranks[j] += xp.astype(i_first, ranks[j].dtype)
            ranks[i] += xp.astype(~i_first, ranks[i].dtype)
    keep = xp.stack([rank >= m - n for rank in ranks], axis=-1)
    return xp.moveaxis(xp.reshape(keep, tuple(last.shape)), -1, axis)


def blocks(scores: Array, shape: Sequence[int]) -> Array:
    """The sum of the scores of each block.

    ``shape``: the block's size along the first axes, 1 along those it leaves out: (4, 1) on ``weight [out, in]`` gives
    [out / 4, in], on ``weight [out, in, h, w]`` [out / 4, in, h, w]. Sums of half precision are float32. Raises
    ValueError where it does not divide the axes, with the arithmetic.

    >>> import numpy as np
    >>> blocks(np.array([[1.0, 2.0], [3.0, 4.0]]), (2, 1)).tolist()
    [[4.0, 6.0]]
    """
    xp = array_namespace(scores)
    split = [size for pair in _block_pairs(tuple(scores.shape), shape) for size in pair]
    return xp.sum(xp.reshape(_wide(scores), tuple(split)), axis=tuple(range(1, len(split), 2)))


def spread(block_mask: Array, shape: Sequence[int], like: Array) -> Array:
    """The mask shaped like ``like`` in which each block has its value in ``block_mask``, the inverse of ``blocks``.

    >>> import numpy as np
    >>> spread(np.array([[True, False]]), (2, 1), np.zeros((2, 2))).tolist()
    [[True, False], [True, False]]
    """
    xp = array_namespace(block_mask)
    pairs = _block_pairs(tuple(like.shape), shape)
    if tuple(block_mask.shape) != tuple(pair[0] for pair in pairs):
        expected = [pair[0] for pair in pairs]
        raise ValueError(f"a mask {list(block_mask.shape)} of blocks {list(shape)}: expected {expected}")
    single = xp.reshape(block_mask, tuple(size for outer, _ in pairs for size in (outer, 1)))
    full = xp.broadcast_to(single, tuple(size for pair in pairs for size in pair))
    return xp.reshape(full, tuple(like.shape))


def rows(scores: Array, axis: int = 0) -> Array:
    """The sum of the scores of each index of ``axis``: [n] for n output channels (0) or input channels (1)."""
    xp = array_namespace(scores)
    others = tuple(i for i in range(len(scores.shape)) if i != axis % len(scores.shape))
    return xp.sum(_wide(scores), axis=others) if others else _wide(scores)


def spread_rows(row_mask: Array, like: Array, axis: int = 0) -> Array:
    """The mask shaped like ``like`` in which each index of ``axis`` has its value in ``row_mask`` [n]."""
    xp = array_namespace(row_mask)
    shape = [1] * len(like.shape)
    shape[axis] = row_mask.shape[0]
    return xp.broadcast_to(xp.reshape(row_mask, tuple(shape)), tuple(like.shape))


def _refuse_nan(scores: Array) -> None:
    xp = array_namespace(scores)
    if not xp.isdtype(scores.dtype, "real floating"):
        return
    found = int(xp.count_nonzero(xp.isnan(scores)))
    if found:
        raise ValueError(f"{found} of {math.prod(scores.shape)} scores are NaN: expected numbers that can be compared")


def _kth_smallest(flat: Array, k: int) -> Array:
    xp = array_namespace(flat)
    if is_torch_namespace(xp):
        return xp.kthvalue(flat, k).values
    return xp.partition(flat, k - 1)[k - 1]


def _wide(scores: Array) -> Array:
    xp = array_namespace(scores)
    return xp.astype(scores, xp.float32) if scores.dtype.itemsize < 4 else scores


def _block_pairs(sizes: tuple[int, ...], shape: Sequence[int]) -> list[tuple[int, int]]:
    """(number of blocks, size of a block) along each axis."""
    if len(shape) > len(sizes) or any(size < 1 for size in shape):
        raise ValueError(f"blocks {list(shape)} of {list(sizes)}: expected at most {len(sizes)} sizes of 1 or more")
    pairs = []
    for axis, size in enumerate(sizes):
        block = shape[axis] if axis < len(shape) else 1
        if size % block:
            raise ValueError(
                f"blocks {list(shape)} do not divide axis {axis} of {list(sizes)}: {_remainder(size, block)}"
            )
        pairs.append((size // block, block))
    return pairs


def _remainder(size: int, part: int) -> str:
    return f"{size} = {size // part} × {part} + {size % part}"
