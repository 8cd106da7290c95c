"""Find the weight and the bias that a convolution or a linear call reads."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.place import TensorPlace, module_at, tensor_at
from tersor.core.standing import quantizer_on
from tersor.graph.trace import Call, Graph, Ref

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
WEIGHTED = CONVOLUTIONS | TRANSPOSED | {"linear"}


def weight_place(model: nn.Module, graph: Graph, call: Call) -> TensorPlace | None:
    """The place of the weight that ``call`` reads, also under a mask; None where it is computed or an input."""
    name = call.args[1]
    if name in graph.tensors:
        return graph.tensors[name]
    module = model.get_submodule(call.module)
    if parametrize.is_parametrized(module, "weight"):
        shape = tuple(tensor_at(model, TensorPlace(call.module, "weight")).shape)
        return TensorPlace(call.module, "weight") if shape == graph.shapes.get(name) else None
    return None


def bias_place(graph: Graph, call: Call) -> TensorPlace | None:
    """The place of the bias that ``call`` reads; where it has none, the ``bias`` beside its weight may be written.

    None where the bias is computed.
    """
    name = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    if isinstance(name, Ref):
        return graph.tensors.get(name)
    return TensorPlace(call.module, "bias")


def has_bias(call: Call) -> bool:
    """Whether the call adds a bias."""
    return isinstance(call.args[2] if len(call.args) > 2 else call.kwargs.get("bias"), Ref)


def output_axis(call: Call) -> int:
    """The weight's axis of output channels."""
    return 1 if call.operator in TRANSPOSED else 0


def groups(call: Call) -> int:
    """A convolution's number of groups."""
    position = {"linear": None, **dict.fromkeys(TRANSPOSED, 6)}.get(call.operator, 6)
    if position is None:
        return 1
    return int(call.args[position]) if len(call.args) > position else int(call.kwargs.get("groups", 1))


def stored(model: nn.Module, place: TensorPlace) -> Tensor:
    """The values behind a parametrization (a mask, for instance), or the tensor itself; detached."""
    module = module_at(model, place.module)
    if parametrize.is_parametrized(module, place.tensor):
        entry = module.get_submodule(f"parametrizations.{place.tensor}")
        return entry.get_parameter("original").detach()
    return tensor_at(model, place).detach()


def is_quantized(model: nn.Module, place: TensorPlace) -> bool:
    """Whether a quantiser stands on the tensor already."""
    return quantizer_on(model, place) is not None
