"""Linear layers in 8-bit integers without calibration: activations are rounded on a grid of their own in each pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from tersor.core.check_fields import check_fields
from tersor.core.edit import Quantizer
from tersor.core.errors import InputError
from tersor.core.place import ActivationPlace, Everything, Selector, TensorPlace, select, tensor_at
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.graph.cost import COUNTED
from tersor.graph.trace import Call, Graph, trace
from tersor.observe.reach import unreachable
from tersor.quantize.points import INPUT, Flow
from tersor.quantize.ranges import MinMax, Range
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import expect_finite_weight, quantizer
from tersor.quantize.weights import is_quantized, weight_place

WEIGHTS = Int(8)


@dataclass(frozen=True)
class QuantizeDynamically(Method):
    """Run linear layers in integers: int8 weights with a scale for each output, uint8 activations with their own.

    What a layer reads is rounded between the extremes of the tensor that passes, so nothing is calibrated; its result
    stays float, and so does what others read. In ONNX Runtime: DynamicQuantizeLinear and MatMulInteger, fused. For
    models of linear layers (transformers, recommenders); convolutions are skips, for which ONNX Runtime has only slow
    kernels of this kind. The numbers of one sample depend a little on the batch that it is in.

    Args:
        weight_range: which reals the weights' integers reach.
        where: which linear layers.
    """

    weight_range: Range = field(default_factory=MinMax)
    where: Selector = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_fields(self)

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """Two Quantizers for each layer. What cannot be intercepted, what where leaves out, and whatever else
        multiplies (convolutions, recurrent layers, attention's products) are skips. Raises InputError where a weight is
        quantised or not finite."""
        example = task.demand_example()
        graph = trace(model, example)
        flow = Flow(graph)
        found, skips = self._linear(model, graph)
        places = _sources(model, flow, found, example)
        activations: dict[ActivationPlace, Quantizer] = {}
        weights: dict[TensorPlace, Quantizer] = {}
        for call in found:
            activation, place = places.get(call.name), weight_place(model, graph, call)
            if activation is None or place is None:
                skips.append(Skip(str(call.place), "stays float: what it reads cannot be intercepted"))
                continue
            activations[activation] = _dynamic(activation)
            if place not in weights:
                value = tensor_at(model, place).detach()
                expect_finite_weight(place, value)
                edit = quantizer(place, value, 0, WEIGHTS, self.weight_range)
                weights[place] = replace(edit, learn=False)
        edits = [*activations.values(), *weights.values()]
        lines = [(str(place), "uint8 on each tensor's own grid") for place in activations]
        lines += [(str(place), f"int8, {len(edit.scale)} channel scales") for place, edit in weights.items()]
        return Plan("QuantizeDynamically", tuple(edits), tuple(skips), tuple(lines))

    def _linear(self, model: nn.Module, graph: Graph) -> tuple[list[Call], list[Skip]]:
        chosen = select(model, self.where)
        found, skips = [], []
        for call in graph.calls:
            if call.operator != "linear":
                if call.operator.startswith("conv"):
                    skips.append(Skip(call.module, "stays float: convolutions with dynamic activations are slow"))
                elif call.operator in COUNTED:
                    skips.append(Skip(str(call.place), f"stays float: {call.operator} is no linear layer"))
                continue
            place = weight_place(model, graph, call)
            if call.module not in chosen:
                skips.append(Skip(call.module or "<model>", "left out by where"))
            elif place is None:
                skips.append(Skip(call.module or "<model>", "stays float: its weight is computed, not a parameter"))
            elif is_quantized(model, place):
                raise InputError("the model is quantised already", where=str(place), do="Quantise it as it was before")
            else:
                found.append(call)
        return found, skips


def _sources(
    model: nn.Module, flow: Flow, calls: Sequence[Call], example_inputs: tuple[torch.Tensor, ...]
) -> dict[str, ActivationPlace]:
    """call → where what it reads is handed to its module, or else made; without those that neither intercepts.

    Where it is made others may read it (a residual sum), who then get rounded numbers too.
    """
    found: dict[str, ActivationPlace] = {}
    given = {call.name: call.name + INPUT for call in calls if flow.is_whole_module(call)}
    made = {call.name: flow.source(call.args[0]) for call in calls}
    for candidates in (given, made):
        places = {name: flow.place(value) for name, value in candidates.items() if name not in found}
        shapes = {place: flow.shape(candidates[name]) for name, place in places.items()}
        lost = unreachable(model, flow.graph, shapes, example_inputs)
        found |= {name: place for name, place in places.items() if place not in lost}
    return found


def _dynamic(place: ActivationPlace) -> Quantizer:
    nothing = torch.ones(()), torch.zeros((), dtype=torch.int32)
    return Quantizer((place,), *nothing, 0, 255, learn=False, dynamic=True)
