"""A 64-bit hash of each row of a tensor's bits: what is stored for a row is believed only where the row is the same."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # numbers that are multiplied at a time, in int64
_LANES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def row_hash(rows: Tensor, seed: int = 0) -> Tensor:
    """h = Σ_i w_i · b_i mod 2⁶⁴ over the 32-bit pieces b of each row, w odd and fixed: [n, …] → int64 [n], on the CPU.

    The same bits give the same hash on every device and machine. A single piece that differs always shows; several do
    but for a chance of about 2⁻³². No protection against who means to deceive. ``seed`` chooses other w.

    Source: multilinear hashing; Carter and Wegman 1979, *Universal classes of hash functions*, section 3.

    >>> a, b, c = row_hash(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])).tolist()
    >>> a == c != b
    True
    """
    count = len(rows)
    values = torch.view_as_real(rows) if rows.is_complex() else rows
    if values.numel() == 0:
        return torch.full((count,), seed, dtype=torch.int64)
    flat = values.detach().reshape(count, -1).contiguous()
    size = flat.shape[1] * flat.element_size()
    lanes = torch.int32 if size % 4 == 0 else _LANES[flat.element_size()]
    if flat.storage_offset() * flat.element_size() % 4:  # such a tensor cannot be seen as wider numbers
        flat = flat.clone()
    bits = flat.view(torch.uint8).view(lanes)
    weights = _weights(bits.shape[1], seed, str(bits.device))
    step = max(1, _AT_ONCE // bits.shape[1])
    return torch.cat([(part.to(torch.int64) * weights).sum(dim=1) for part in bits.split(step)]).cpu()


@lru_cache(maxsize=16)
def _weights(length: int, seed: int, device: str) -> Tensor:
    """``length`` odd numbers that look random: splitmix64 of their positions."""
    with np.errstate(over="ignore"):
        x = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(seed & 0xFFFFFFFFFFFFFFFF) * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(x.view(np.int64)).to(device)
