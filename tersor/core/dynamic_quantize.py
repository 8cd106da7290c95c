"""The quantiser of activations whose grid is found anew for each tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DynamicQuantize(nn.Module):
    """Rounds each tensor to 256 steps between its own extremes, as ONNX's DynamicQuantizeLinear does.

    scale = (max(0, max x) − min(0, min x)) / 255, zero point z = round(−min(0, min x) / scale),
    x̂ = (clamp(round(x / scale) + z, 0, 255) − z) · scale; halves are rounded to even. The extremes are the whole
    tensor's, so that what else is in a batch moves the grid. The gradient passes straight through.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            return _as_onnx_operators(x.float()).to(x.dtype)
        return x + (_rounded(x.detach().float()).to(x.dtype) - x).detach()


def _rounded(x: Tensor) -> Tensor:
    low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # all zeros
    zero_point = torch.round(-low / scale).clamp(0, 255)
    return ((torch.round(x / scale) + zero_point).clamp(0, 255) - zero_point) * scale


def _as_onnx_operators(x: Tensor) -> Tensor:
    q, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
        "DynamicQuantizeLinear", (x,), dtypes=(torch.uint8, torch.float32, torch.uint8), shapes=(x.shape, [], [])
    )
    return torch.onnx.ops.symbolic("DequantizeLinear", (q, scale, zero_point), dtype=torch.float32, shape=x.shape)
