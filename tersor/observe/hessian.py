"""The inverse of a layer's Hessian, as those need it who change one weight and let the others take over what it did."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.core.errors import InputError


def inverse_factor(H: Tensor, damping: float, where: str) -> Tensor:
    """The upper U with (H + λ I)⁻¹ = Uᵀ U, λ being ``damping`` times the mean of H's diagonal: [groups, n, n].

    H [groups, n, n], float64, symmetric. Inputs that were always zero get next to nothing on the diagonal, so that
    their weights go first. Raises InputError, naming the setting ``where``, where the damped matrix is not positive
    definite.
    """
    diagonal = H.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    added = torch.where(diagonal == 0, 1e-6 * mean, damping * mean)
    factor, failed = torch.linalg.cholesky_ex(H + torch.diag_embed(added))
    if not bool(failed.any()):
        U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not bool(failed.any()) and bool(torch.isfinite(U).all()):
            return U
    raise InputError(
        "the layer's inputs hang together linearly and the damping does not help", where=where, got=damping,
        expected="more damping (0.01 is usual), or more calibration rows",
    )  # fmt: skip
