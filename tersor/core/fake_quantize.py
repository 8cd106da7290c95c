"""The quantiser that stands on a model: fake quantisation with a learnt step size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.place import ActivationPlace
from tersor.tensor.affine import join_groups, split_groups


class _LearntStep(torch.autograd.Function):
    """x̂ = (clamp(round(x / s) + z, q_min, q_max) − z) · s with LSQ's gradients.

    Esser et al. 2020, "Learned Step Size Quantization" (arXiv 1902.08153), equations 1 to 3 and section 2.2: the
    gradient of s is (round(x / s) − x / s) inside the range and the clipped integer outside, scaled by
    1 / sqrt(n · q_max); x passes its gradient straight through inside the range. We add a fixed zero point.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int, axis: int | None
    ) -> Tensor:
        shape = _broadcast_shape(x, axis)
        s, z = scale.reshape(shape), zero_point.reshape(shape)
        # In place on one buffer, with 0-dim bounds: memory traffic is what this costs in training.
        clipped = torch.div(x.float(), s).round_()  # rounds half to even
        torch.maximum(clipped, (q_min - z).to(clipped.dtype), out=clipped)
        torch.minimum(clipped, (q_max - z).to(clipped.dtype), out=clipped)
        # The operator's result may be changed in place by the model (``out += identity``), so it is not kept.
        ctx.save_for_backward(x, clipped, scale, zero_point)
        ctx.q_min, ctx.q_max, ctx.axis = q_min, q_max, axis
        return (clipped * s).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, clipped, scale, zero_point = ctx.saved_tensors
        shape = _broadcast_shape(x, ctx.axis)
        s, z = scale.reshape(shape), zero_point.reshape(shape)
        low, high = (ctx.q_min - 0.5 - z) * s, (ctx.q_max + 0.5 - z) * s
        if ctx.axis is None and x.device.type == "cpu":  # one fused pass; its bounds are plain numbers
            to_x = torch.ops.aten.hardtanh_backward(gradient, x, float(low), float(high))
        else:
            to_x = gradient * ((x > low) & (x < high))
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None, None, None
        # Σ g · (inside ? clipped − x / s : clipped) = Σ g · clipped − Σ (g inside) · x / s
        total = _inner(gradient, clipped, ctx.axis) - _inner(to_x, x, ctx.axis) / scale
        total /= (x.numel() / scale.numel() * ctx.q_max) ** 0.5
        return to_x, total.reshape(scale.shape), None, None, None, None


def _inner(a: Tensor, b: Tensor, axis: int | None) -> Tensor:
    """Σ a · b over every axis but ``axis``, in float32: [] or [channels]."""
    a, b = a.float(), b.float()
    if axis is None and a.ndim > 1:
        return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).sum()  # makes no tensor of products
    return (a * b).sum([d for d in range(a.ndim) if d != axis])


def _broadcast_shape(x: Tensor, axis: int | None) -> list[int]:
    return [] if axis is None else [-1 if d == axis else 1 for d in range(x.ndim)]


class FakeQuantize(nn.Module):
    """Rounds a tensor to the integers ``quant_min`` … ``quant_max`` and back, as integer hardware will.

    ``scale``: [], [channels along ``axis``] or, with ``group_size``, [rows along ``axis``, groups of a row], float32,
    positive; ``zero_point``: the same shape, int32. Where it is learnt (``learn``), scale = calibrated ·
    exp(log_growth) and log_growth, at first 0, is the parameter: steps of 1e-4 and of 1e-1 then learn at the same
    relative pace under any optimiser, cannot cross zero, and weight decay pulls them
    to where calibration put them. (Trained as it is, the step of a channel with small weights diverges at learning
    rates that the weights bear. Jain et al. 2020, arXiv 1903.08066, learn the logarithm for the same reason.) Under
    ``torch.export`` and ``torch.onnx.export`` the rounding is written as the quantize / dequantize pair of either.
    """

    calibrated: Tensor
    zero_point: Tensor
    log_growth: nn.Parameter | None

    def __init__(
        self, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, *,
        axis: int | None, learn: bool, group_size: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.reads: ActivationPlace | None = None  # of a weight: the quantised activation that it is multiplied with
        assert group_size is None or axis is not None, "groups are of the rows along an axis"
        self.quant_min, self.quant_max, self.axis, self.group_size = quant_min, quant_max, axis, group_size
        self.register_buffer("calibrated", scale.detach().clone().to(torch.float32))
        self.log_growth = nn.Parameter(torch.zeros_like(self.calibrated)) if learn else None
        self.register_buffer("zero_point", zero_point.detach().clone().to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.group_size is None or self.axis is None:
            return self._round(x, self.scale, self.zero_point, self.axis)
        runs = split_groups(x, self.group_size, self.axis).flatten(0, 1)
        rounded = self._round(runs, self.scale.flatten(), self.zero_point.flatten(), 0)
        return join_groups(rounded, x.shape, self.axis)

    def _round(self, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
        if torch.compiler.is_exporting():
            return self._as_operator_pair(x, scale, zero_point, axis)
        return _LearntStep.apply(x, scale, zero_point, self.quant_min, self.quant_max, axis)

    @property
    def scale(self) -> Tensor:
        """The step in force, positive; its gradient flows to ``log_growth``."""
        return self.calibrated if self.log_growth is None else self.calibrated * self.log_growth.exp()

    def integer_type(self) -> torch.dtype:
        """The storage type: uint8 where no negative integer is used, int8 otherwise (int16 beyond eight bits)."""
        if self.quant_min >= 0:
            return torch.uint8 if self.quant_max <= 255 else torch.uint16
        return torch.int8 if self.quant_max <= 127 else torch.int16

    def freeze(self) -> None:
        """Stop learning: the step in force becomes a constant. The values stay as they are."""
        self.calibrated, self.log_growth = self.scale.detach(), None

    def _as_operator_pair(self, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
        """The rounding as operators, its scale computed in the graph: whatever was learnt or loaded is in force."""
        if torch.onnx.is_in_onnx_export():
            return self._as_onnx_operators(x.float(), scale, zero_point, axis).to(x.dtype)
        from torch.ao.quantization.fx import _decomposed  # noqa: F401  (declares torch.ops.quantized_decomposed)

        ops = torch.ops.quantized_decomposed
        numbers, integers = (scale, zero_point.long()), (self.quant_min, self.quant_max, self.integer_type())
        if axis is None:
            q = ops.quantize_per_tensor.tensor(x.float(), *numbers, *integers)
            return ops.dequantize_per_tensor.tensor(q, *numbers, *integers).to(x.dtype)
        q = ops.quantize_per_channel(x.float(), *numbers, axis, *integers)
        return ops.dequantize_per_channel(q, *numbers, axis, *integers).to(x.dtype)

    def _as_onnx_operators(self, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
        """ONNX's own operators. (torch's translation of the pair takes plain numbers only, ignores ranges narrower than
        the type, and is known only where torch.ao was imported before the exporter.)"""
        symbolic, dtype = torch.onnx.ops.symbolic, self.integer_type()
        numbers = (scale, zero_point.to(dtype))
        along: dict[str, Any] = {} if axis is None else {"axis": axis}
        q = symbolic("QuantizeLinear", (x, *numbers), along, dtype=dtype, shape=x.shape)
        if (self.quant_min, self.quant_max) != (torch.iinfo(dtype).min, torch.iinfo(dtype).max):
            bounds = (torch.full((), self.quant_min, dtype=dtype), torch.full((), self.quant_max, dtype=dtype))
            q = symbolic("Clip", (q, *bounds), dtype=dtype, shape=x.shape)
        return symbolic("DequantizeLinear", (q, *numbers), along, dtype=torch.float32, shape=x.shape)

    def extra_repr(self) -> str:
        grid = f"axis={self.axis}" + (f", group_size={self.group_size}" if self.group_size is not None else "")
        return f"[{self.quant_min}, {self.quant_max}], {grid}, learn={self.log_growth is not None}"
