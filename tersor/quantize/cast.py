"""Weights stored in half precision: files half the size, and the model computes in float32 as before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.core.check_fields import check_fields
from tersor.core.edit import Precision
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.quantize.weight_only import LayerWeight, layer_weights

Half = Literal["float16", "bfloat16"]


@final
@dataclass(frozen=True)
class Cast(Method):
    """Store the weights of layers in half precision.

    ŵ = w rounded to the nearest float16 (11 bits, up to 65504) or bfloat16 (8 bits, the range of float32), ties to
    even. What is stored, saved and exported has half the bytes; layers read ŵ in float32, so that inputs, outputs and
    arithmetic stay float32. Meant are the weights of convolutions, linear layers, embeddings, recurrent layers and
    attention projections, tied ones once, masks kept; vectors (biases, norms), whose bytes are few, stay float32. Use
    it last: training updates half-precision weights, which loses small steps. Put ``FoldBatchNorm()`` before: what is
    exported has batch norms folded into convolutions, in float32 where that happens after the cast.

    Args:
        dtype: float16 is finer, bfloat16 never overflows. Where float16 would overflow, a layer is a skip.
        where: which layers.
    """

    dtype: Half = "float16"
    where: Selector = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype not in get_args(Half):
            raise InputError("unknown type", where="Cast.dtype", got=self.dtype, expected=get_args(Half))

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """One Precision for each weight; each line says the bytes before and after, and the weight's relative error.

        Raises InputError where every weight meant is quantised already, and where one is not finite.
        """
        skips: list[Skip] = []
        edits, lines = [], []
        for weight in layer_weights(model, self.where, skips):
            reason = self._refusal(weight.value)
            if reason:
                skips.append(Skip(str(weight.place), reason))
                continue
            edits.append(Precision(weight.place, getattr(torch, self.dtype)))
            lines.append((", ".join(map(str, weight.places)), self._line(weight)))
        norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
        if norms:
            advice = "what is folded into weights on export is float32 there; put FoldBatchNorm() before"
            lines.insert(0, ("the model", f"has {norms} batch norms: {advice}"))
        return Plan("Cast", tuple(edits), tuple(skips), tuple(lines))

    def _refusal(self, value: Tensor) -> str:
        if value.element_size() <= 2:
            return "stored in half precision already"
        if not bool(torch.isfinite(value.to(getattr(torch, self.dtype))).all()):
            return f"stays float: {float(value.abs().max()):.3g} is beyond float16's 65504; bfloat16 reaches it"
        return ""

    def _line(self, weight: LayerWeight) -> str:
        value = weight.value.double()
        lost = value - weight.value.to(getattr(torch, self.dtype)).double()
        size = float(value.square().sum())
        error = float(lost.square().sum()) / size if size else 0.0
        sizes = f"{2 * value.numel():,} bytes instead of {weight.value.nbytes:,}"
        return f"{self.dtype}, {sizes}, relative squared error {error:.3g}"
