"""Where a quantised model in PyTorch and its ONNX file begin to differ: the integers of both, place by place."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn

from tersor.core.fake_quantize import FakeQuantize
from tersor.core.intercept import Intercept
from tersor.core.place import ActivationPlace
from tersor.measure.session import OnnxRunnable

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Parting:
    """How the integers of both agree at one place: the shares that are equal, and that are at most one apart."""

    place: str
    equal: float
    within_one: float


class _Kept(nn.Module):
    """A quantiser that keeps the integers of its last result."""

    def __init__(self, quantizer: FakeQuantize, place: str, kept: dict[str, Integers]):
        super().__init__()
        self.quantizer, self.place, self.kept = quantizer, place, kept

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = self.quantizer(x)
        integers = torch.round(rounded.double() / self.quantizer.scale.double()) + self.quantizer.zero_point
        self.kept[self.place] = integers.long().cpu().numpy()
        return rounded


def partings(path: Path, model: nn.Module, args: Sequence[Tensor]) -> list[Parting]:
    """Each quantised activation in the order of execution, for one batch ``args``, the file being one that
    ``export_onnx`` wrote of ``model``. Both are left alone. Shares of the integers; a place that either lacks is none.
    """
    in_model = integers_of_model(model, args)
    return [
        Parting(place, float((ours == theirs).mean()), float((np.abs(ours - theirs) <= 1).mean()))
        for place, theirs in integers_of_file(Path(path), args).items()
        if (ours := in_model.get(place, theirs[:0]).reshape(-1)).size == theirs.size > 0
    ]


def parts_at(found: Sequence[Parting], share: float) -> Parting | None:
    """The first place where less than ``share`` of the integers are at most one apart; else where the fewest are."""
    worst = min(found, key=lambda each: (each.within_one, each.equal), default=None)
    return next((each for each in found if each.within_one < share), worst)


def integers_of_model(model: nn.Module, args: Sequence[Tensor]) -> Mapping[str, Integers]:
    """place → the integers that its quantiser gives, in one pass in eval mode."""
    watched = copy.deepcopy(model).cpu().eval()
    kept: dict[str, Integers] = {}
    for path, module in list(watched.named_modules(remove_duplicate=False)):
        if not isinstance(module, Intercept):
            continue
        for key, tap in list(module.taps.items()):
            operator, _, ordinal = key.rpartition("_")
            place = str(ActivationPlace(path.rpartition(".")[0], operator, int(ordinal)))
            if isinstance(tap, FakeQuantize):
                module.taps[key] = _Kept(tap, place, kept)
    with torch.no_grad():
        watched(*(value.cpu() for value in args))
    return kept


def integers_of_file(path: Path, args: Sequence[Tensor]) -> Mapping[str, Integers]:
    """place → the integers [n] that ONNX Runtime computes there, in the order of execution."""
    proto: Any = onnx.load(path)
    given = len(proto.graph.output)
    named = [node for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.name]
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    for node in named:
        kind = types.get(node.input[2], onnx.TensorProto.UINT8)
        proto.graph.output.append(helper.make_tensor_value_info(node.output[0], kind, None))
    with tempfile.TemporaryDirectory() as folder:
        watched = Path(folder) / "watched.onnx"
        onnx.save(proto, watched)
        result = OnnxRunnable(watched)(*args)
    results = (result,) if isinstance(result, Tensor) else result
    integers = [value.reshape(-1).long().numpy() for value in results[given:]]
    return {node.name: value for node, value in zip(named, integers, strict=True)}
