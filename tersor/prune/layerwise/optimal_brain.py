"""Optimal brain surgery for one layer: which weights go, column by column, and what the others do about it."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.tensor.masks import keep_largest, n_of_m


def zeros_by_block(zeros: int, sizes: list[int], standing: list[int]) -> list[int]:
    """``zeros`` divided over blocks of ``sizes`` weights as evenly as their sizes allow: in all exactly ``zeros``.

    Each block gets at least the zeros that are ``standing`` in it, of which there are at most ``zeros`` together.

    >>> zeros_by_block(5, [4, 4, 2], [0, 0, 0]), zeros_by_block(5, [4, 4, 2], [0, 0, 2])
    ([2, 2, 1], [2, 1, 2])
    """
    total, later = sum(sizes), sum(standing)
    assert later <= zeros <= total, "more zeros stand than are wanted, or more are wanted than there are weights"
    found: list[int] = []
    passed = done = 0
    for size, held in zip(sizes, standing, strict=True):
        passed, later = passed + size, later - held
        wanted = min(max(zeros * passed // total - done, held), zeros - done - later, size)
        found.append(wanted)
        done += wanted
    return found


def surgery(
    W: Tensor, U: Tensor, zeros: int, *, pattern: tuple[int, int] | None = None, block: int = 128,
    standing: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(Ŵ, keep): W with ``zeros`` weights gone and the others moved so that Σ ‖W x − Ŵ x‖² stays small.

    Column by column, a weight that goes costs w² / [U]ⱼⱼ², and its error is spread over the columns to its right:
    w ← w − (w_j / [U]ⱼⱼ) · U_j. (``settle`` mends those to its left too.) What goes is chosen for ``block`` columns at
    a time, or, with ``pattern`` (n, m), so that n of every m columns stay (``zeros`` is then what that gives).

    W [groups, outputs, n] float64; U [groups, n, n] as of ``inverse_factor``; ``standing``: bool like W, weights that
    are zero already and stay so. The result has exactly ``zeros`` zeros in ``keep``, unless a pattern stands on more.
    Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1, whose blocks each take the same fraction too.
    """
    W, keep = W.clone(), torch.ones_like(W, dtype=torch.bool)
    gone = torch.zeros_like(keep) if standing is None else standing
    if pattern is not None:
        block = max(block - block % pattern[1], pattern[1])
    spans = [(start, min(start + block, W.shape[2])) for start in range(0, W.shape[2], block)]
    sizes, held = zip(*((W[..., a:b].numel(), int(gone[..., a:b].sum())) for a, b in spans), strict=True)
    counts = zeros_by_block(zeros, list(sizes), list(held)) if pattern is None else [0] * len(spans)
    for (start, stop), count in zip(spans, counts, strict=True):
        inside = U[:, start:stop, start:stop]
        if pattern is None:
            scores = _costs(W[..., start:stop], inside, gone[..., start:stop])
            keep[..., start:stop] = keep_largest(scores, count)
        errors = _columns(W[..., start:stop], inside, keep[..., start:stop], gone[..., start:stop], pattern)
        W[..., stop:] -= errors @ U[:, start:stop, stop:]
    return torch.where(keep, W, 0.0), keep


def _columns(W: Tensor, U: Tensor, keep: Tensor, gone: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """Take the columns of a block one by one, W and keep in place; the errors that the columns to its right inherit."""
    errors = torch.zeros_like(W)
    for j in range(W.shape[2]):
        if pattern is not None and j % pattern[1] == 0:
            span = slice(j, j + pattern[1])
            scores = _costs(W[..., span], U[:, span, span], gone[..., span])
            keep[..., span] = n_of_m(scores, *pattern) & ~gone[..., span]
        error = torch.where(keep[..., j], 0.0, W[..., j]) / U[:, j, j, None]
        W[..., j:] -= error[..., None] * U[:, j, None, j:]
        errors[..., j] = error
    return errors


def _costs(W: Tensor, U: Tensor, gone: Tensor) -> Tensor:
    """w² / [U]ⱼⱼ²; what is gone already costs less than nothing."""
    cost = (W / U.diagonal(dim1=1, dim2=2)[:, None]).square()
    return torch.where(gone, -1.0, cost)


def settle(W: Tensor, H: Tensor, keep: Tensor, damping: float) -> Tensor:
    """The weights that are left, such that Σ ‖W x − Ŵ x‖² is smallest with just these: [groups, outputs, n].

    (H_SS + λ I) ŵ_S = (H + λ I)_S w for each row, S being what it keeps; λ as of ``inverse_factor``.
    """
    diagonal = H.diagonal(dim1=1, dim2=2)
    H = H + torch.diag_embed((damping * diagonal.mean(1, keepdim=True)).clamp_min(1e-30).expand_as(diagonal))
    found = torch.zeros_like(W)
    for group, matrix in enumerate(H):
        wanted = W[group] @ matrix
        for row, kept in enumerate(keep[group]):
            S = kept.nonzero().flatten()
            found[group, row, S] = torch.linalg.solve(matrix[S][:, S], wanted[row, S])
    return found


def input_first(kernel: int, inputs: int) -> Tensor:
    """The order of a convolution's unknowns [inputs × kernel] in which the inputs of one kernel position are adjacent.

    >>> input_first(2, 3).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return torch.arange(inputs * kernel).view(inputs, kernel).T.flatten()
