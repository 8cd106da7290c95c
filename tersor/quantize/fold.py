"""Fold batch norms into the convolution or linear layer before them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.core.apply import CHILDREN
from tersor.core.check_fields import check_fields
from tersor.core.edit import Edit, Swap, Write
from tersor.core.intercept import CHILD
from tersor.core.place import Everything, Selector, aliases, select, tensor_at
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.graph.trace import Call, Graph, trace
from tersor.quantize.weights import (
    WEIGHTED,
    bias_place,
    groups,
    has_bias,
    is_quantized,
    output_axis,
    stored,
    weight_place,
)

QUANTISED = "is quantised already"  # how the reason of such a skip ends


@dataclass(frozen=True)
class FoldBatchNorm(Method):
    """Fold each batch norm that directly follows a convolution or a linear layer into its weight and bias.

    With k = γ / sqrt(σ² + ε):  W ← k · W (per output channel),  b ← k · (b − μ) + β,  and the norm becomes Identity,
    or a Sequential of its children where it has any (timm's norms hold an activation). Computed in float64. ``where``
    says which batch norms. Jacob et al. 2018 (arXiv 1712.05877), section 3.2; unlike them we fold before training, once
    and for good.
    """

    where: Selector = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_fields(self)

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """One Write for the weight, one for the bias and one Swap per norm. A norm that cannot be folded is skipped."""
        graph = trace(model, task.demand_example())
        pairs, skips = foldable(model, graph)
        chosen = select(model, self.where)
        edits: list[Edit] = []
        lines = []
        for producer, norm in pairs:
            if norm.module not in chosen:
                skips.append(Skip(norm.module, "left out by where"))
                continue
            edits += _fold(model, graph, producer, norm)
            lines.append((norm.module, f"folded into {weight_place(model, graph, producer)}"))
        return Plan("FoldBatchNorm", tuple(edits), tuple(skips), tuple(lines), preserves=True)


def foldable(model: nn.Module, graph: Graph) -> tuple[list[tuple[Call, Call]], list[Skip]]:
    """The (producer, batch norm) pairs that can be folded, and why each other batch norm cannot."""
    calls, users = graph.by_name(), graph.users()
    pairs, skips = [], []
    for norm in graph.calls:
        if norm.operator != "batch_norm":
            continue
        producer = calls.get(norm.args[0])
        reason = _refusal(model, graph, producer, norm, users)
        if producer is None or reason:
            skips.append(Skip(str(norm.place), reason))
        else:
            pairs.append((producer, norm))
    return pairs, skips


def _refusal(model: nn.Module, graph: Graph, producer: Call | None, norm: Call, users: dict[str, list[Call]]) -> str:
    """Why the norm cannot be folded into its producer; "" where it can."""
    module = model.get_submodule(norm.module)
    if not isinstance(module, _BatchNorm):
        return "called as a function, not as a module: there is nothing to replace by Identity"
    if module.running_mean is None:
        return "track_running_stats=False: it normalises by each batch's own statistics"
    if sum(call.operator == "batch_norm" and call.module == norm.module for call in graph.calls) > 1:
        return "called more than once"
    beside = {call.operator for call in graph.calls if call.module == norm.module} - {"batch_norm"}
    if beside:
        return f"its forward computes {', '.join(sorted(beside))} too"
    if producer is None or producer.operator not in WEIGHTED:
        return f"follows {producer.operator if producer else 'the model input'}, not a convolution or linear layer"
    if producer.operator == "linear" and len(producer.shape or ()) != 2:
        return f"its channels are not the output features of the linear layer before it (shape {producer.shape})"
    readers = users[producer.name]
    if len(readers) > 1 or producer.name in graph.outputs:
        others = [call.operator for call in readers if call is not norm] + ["the model's output"] * (
            producer.name in graph.outputs
        )
        return f"{producer.place} is also read by {', '.join(others)}"
    return _shared(model, graph, producer, users)


def _shared(model: nn.Module, graph: Graph, producer: Call, users: dict[str, list[Call]]) -> str:
    """Why the producer's weight or bias may not be rewritten; "" where it may."""
    weight, bias = weight_place(model, graph, producer), bias_place(graph, producer)
    if weight is None or bias is None:
        return f"the weight or bias of {producer.place} is computed, not a parameter"
    parameters = model.get_submodule(bias.module)._parameters
    if not has_bias(producer) and (bias.tensor not in parameters or parameters[bias.tensor] is not None):
        return f"{producer.place} has no bias, and no place for one"
    if is_quantized(model, weight):
        return f"{weight} {QUANTISED}"
    if sum(call.module == producer.module and call.operator == producer.operator for call in graph.calls) > 1:
        return f"{producer.module or '<model>'} is called more than once"
    places = [weight, bias] if has_bias(producer) else [weight]
    for place in places:
        name = next((name for name, found in graph.tensors.items() if found == place), None)
        if (name is not None and len(users.get(name, [])) > 1) or len(aliases(model, place)) > 1:
            return f"{place} is shared with other calls"
    return ""


def _fold(model: nn.Module, graph: Graph, producer: Call, norm: Call) -> list[Edit]:
    module = model.get_submodule(norm.module)
    assert isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    weight_at, bias_at = weight_place(model, graph, producer), bias_place(graph, producer)
    assert weight_at is not None and bias_at is not None
    weight = stored(model, weight_at)
    mean, variance = module.running_mean.double(), module.running_var.double()
    factor = (variance + module.eps).rsqrt()
    if module.weight is not None:
        factor = factor * module.weight.detach().double()
    bias = tensor_at(model, bias_at).detach().double() if has_bias(producer) else torch.zeros_like(mean)
    shift = factor * (bias - mean)
    if module.bias is not None:
        shift = shift + module.bias.detach().double()
    rest = [name for name, _ in module.named_children() if name not in ("parametrizations", CHILD)]
    new = _scale_outputs(weight.double(), factor, output_axis(producer), groups(producer))
    return [
        Write(weight_at, new.to(weight.dtype)),
        Write(bias_at, shift.to(weight.dtype)),
        Swap(norm.module, CHILDREN, {"names": rest}) if rest else Swap(norm.module, "Identity"),
    ]


def _scale_outputs(weight: Tensor, factor: Tensor, axis: int, n_groups: int) -> Tensor:
    """Multiply the weights of each output channel; a transposed convolution's are [in, out / groups, …]."""
    if axis == 0:
        return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    grouped = weight.reshape(n_groups, weight.shape[0] // n_groups, *weight.shape[1:])
    scaled = grouped * factor.reshape(n_groups, 1, -1, *[1] * (weight.ndim - 2))
    return scaled.reshape(weight.shape)
