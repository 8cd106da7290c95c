"""Channels that must keep their width are computed no more all the same: a layer shrinks behind an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.check_fields import check_fields
from tersor.core.edit import Edit, Swap, Write
from tersor.core.errors import InputError, TrainingError, user_code
from tersor.core.loading import batches_of
from tersor.core.place import Everything, Selector, TensorPlace, aliases, module_at, select, tensor_at
from tersor.core.plan import Plan, Skip
from tersor.core.randomness import seeded
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.graph.group import Group
from tersor.graph.groups import find_groups
from tersor.graph.residual import above
from tersor.graph.trace import Call, Graph, Ref, trace
from tersor.prune.blocks.gates import sharing_copy

_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d",
}  # fmt: skip


@dataclass(frozen=True)
class PruneBehindAdapter(Method):
    """Shrink layers whose channels are frozen: what stays is computed, what goes is a constant, the width remains.

    ``PruneChannels`` leaves a group alone that an unknown operator reads, or that must have its size. Its makers can
    still compute less: a layer with weight [out, in, …] keeps the rows of the channels that vary most over calibration
    data, and an index scatter puts them where they were (``core/scattered.py``). Who reads the channels saves nothing.

    Args:
        sparsity: fraction of each such layer's channels that become constant, in [0, 1), rounded down.
        where: layers that may shrink.
        fill: "mean": a removed channel is its mean over calibration data, its bias from now on, so that what is lost is
            exactly its variance; "bias": it is the bias that it had, 0 without one.
        worth: a layer shrinks only if that saves at least this fraction of all layers' multiply-accumulates.
        outputs: whether layers whose result the model returns may shrink too (logits that never change).
        batches: calibration batches that are looked at.

    The rows that stay are chosen by the channel's variance, behind the batch norm where one alone reads the layer.

    Raises InputError where a setting is out of range or ``where`` matches nothing; GraphError where the graph cannot be
    captured; TrainingError where a channel is not finite on calibration data.
    """

    sparsity: float = 0.5
    where: Selector = field(default_factory=Everything)
    fill: Literal["mean", "bias"] = "mean"
    worth: float = 0.01
    outputs: bool = False
    batches: int = 8

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("sparsity", "worth"):
            if not 0 <= (got := getattr(self, name)) < 1:
                raise InputError("out of range", where=f"PruneBehindAdapter.{name}", got=got, expected="[0, 1)")
        if self.batches < 1:
            raise InputError("at least one batch is needed", where="PruneBehindAdapter.batches", got=self.batches)
        if self.fill not in ("mean", "bias"):
            raise InputError("unknown fill", where="PruneBehindAdapter.fill", got=self.fill, expected="mean or bias")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        if task.example_inputs is None:
            raise InputError("the task has no example inputs", where="PruneBehindAdapter", do="Pass task.complete()")
        chosen = select(model, self.where)
        graph = trace(model, task.example_inputs)
        groups = find_groups(graph, model).prunable()
        frozen = list(_frozen_layers(graph, model, groups))
        skips = [skip for skip in _others(model, groups, frozen) if skip.place in chosen]
        layers = [layer for layer in frozen if layer.path in chosen and self._may(layer, model, graph, skips)]
        if not layers and not skips:
            skips.append(Skip("the model", "has no frozen layer that where= means"))
        moments = _moments(model, task, [layer.path for layer in layers], self.batches) if layers else {}
        masked = sharing_copy(model)
        edits: list[Edit] = []
        lines = []
        for layer in layers:
            mean, variance = moments[layer.path]
            module: Any = module_at(model, layer.path)
            kept = _largest(variance * layer.gain.to(variance), layer.width - self._gone(layer.width))
            weight, bias = module.weight.detach(), _bias(module)
            removed = torch.ones(layer.width, dtype=torch.bool).index_fill(0, kept, False).to(weight.device)
            if self.fill == "mean":
                bias = torch.where(removed, mean.to(bias), bias)
            _mask(module_at(masked, layer.path), removed, bias)
            edits += _edits(layer, module, weight, bias, kept)
            share = variance[removed.cpu()].sum() / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
            text = f"{layer.width} -> {len(kept)} computed channels, {share:.2%} of their variance lost"
            lines.append((layer.path, f"{text}; frozen: {layer.reason}"))
        return Plan(
            "prune behind adapters", tuple(edits), tuple(skips), tuple(lines), reference=masked if edits else None
        )

    def _gone(self, width: int) -> int:
        return min(math.floor(Fraction(str(self.sparsity)) * width), width - 1)

    def _may(self, layer: _Layer, model: nn.Module, graph: Graph, skips: list[Skip]) -> bool:
        reason = _objection(layer, model, graph)
        if reason is None and layer.returned and not self.outputs:
            reason = "the model returns its channels: constant ones are asked for with outputs=True"
        saved = layer.share * self._gone(layer.width) / layer.width
        if reason is None and self._gone(layer.width) == 0:
            reason = f"sparsity {self.sparsity} of {layer.width} channels is none"
        if reason is None and saved < self.worth:
            reason = f"would save {saved:.2%} of the multiply-accumulates, less than worth={self.worth:g}"
        if reason is not None:
            skips.append(Skip(layer.path, reason))
        return reason is None


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer that makes frozen channels. ``share``: of all layers' multiply-accumulates; ``gain`` [width]: by what a
    batch norm behind it multiplies the variance; ``returned``: whether the model returns its result."""

    path: str
    reason: str
    width: int
    share: float
    gain: Tensor
    returned: bool


def _frozen_layers(graph: Graph, model: nn.Module, groups: Sequence[Group]) -> Iterator[_Layer]:
    """The layers all of whose channels are frozen, in the order of the forward."""
    holders: dict[int, list[Group]] = {}  # by the tensor itself: tied ones have several names
    for group in groups:
        for axis in group.producers:
            if axis.dim == 0:
                holders.setdefault(id(tensor_at(model, axis.place)), []).append(group)
    readers, names = graph.users(), _first_names(model)
    calls: dict[TensorPlace, list[Call]] = {}
    for call in graph.calls:
        weight = call.args[1] if len(call.args) > 1 else None
        if isinstance(weight, Ref) and weight in graph.tensors and call.operator in _KINDS.values():
            calls.setdefault(graph.tensors[weight], []).append(call)
    work = {place: sum(_work(call, graph) for call in made) for place, made in calls.items()}
    total = sum(work.values())
    for place, made in calls.items():
        held = holders.get(id(tensor_at(model, place)), [])
        if place.tensor == "weight" and held and all(group.frozen is not None for group in held):
            width = graph.shapes[str(made[0].args[1])][0]
            returned = any(call.name in graph.outputs for call in made)
            gain = _gain(model, made, readers, width)
            path = names[_owner(model, made[0], place)]
            yield _Layer(path, str(held[0].frozen), width, work[place] / total, gain, returned)


def _owner(model: nn.Module, call: Call, place: TensorPlace) -> int:
    """The identity of the module whose weight a call reads; of tied ones, of the one that makes the call."""
    caller = module_at(model, call.module)
    owns = caller._parameters.get("weight") is tensor_at(model, place)
    return id(caller if owns else module_at(model, place.module))


def _others(model: nn.Module, groups: Sequence[Group], layers: Sequence[_Layer]) -> Iterator[Skip]:
    """What else makes frozen channels, once for each module."""
    names, modules = _first_names(model), [module_at(model, layer.path) for layer in layers]
    known = {id(module) for module in modules} | {id(module.weight) for module in modules}
    for group in groups:
        for axis in group.producers if group.frozen is not None else ():
            module, tensor = module_at(model, axis.place.module), tensor_at(model, axis.place)
            if known.isdisjoint((id(module), id(tensor))):
                known |= {id(module), id(tensor)}
                kind = type(module).__name__
                reason = f"its channels are frozen ({group.frozen}), and a {kind} has no adapter"
                yield Skip(names[id(module)], reason)


def _first_names(model: nn.Module) -> dict[int, str]:
    """Identity of a module → the path that selectors know it by."""
    return {id(module): path for path, module in model.named_modules()}


def _work(call: Call, graph: Graph) -> int:
    """Multiply-accumulates: every element of the result takes a row of the weight."""
    return math.prod(call.shape or ()) * math.prod(graph.shapes[str(call.args[1])][1:])


def _gain(model: nn.Module, made: Sequence[Call], readers: Mapping[str, Sequence[Call]], width: int) -> Tensor:
    behind = [call for one in made for call in readers.get(one.name, ())]
    if len(behind) == 1 and behind[0].operator == "batch_norm":
        norm = module_at(model, behind[0].module)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None:
            scale = torch.ones(width) if norm.weight is None else norm.weight.detach()
            return (scale.double().square() / (norm.running_var.double() + norm.eps)).cpu()
    return torch.ones(width, dtype=torch.float64)


def _objection(layer: _Layer, model: nn.Module, graph: Graph) -> str | None:
    """Why the layer cannot be another one; None where it can."""
    module: Any = module_at(model, layer.path)
    if type(module) not in _KINDS:
        return f"its channels are frozen ({layer.reason}), and a {type(module).__name__} has no adapter"
    if parametrize.is_parametrized(module):
        return "masks, quantisers or other parametrizations stand on it"
    if _KINDS[type(module)] != "linear" and (module.groups > 1 or module.padding_mode != "zeros"):
        return f"a convolution with groups={module.groups}, padding_mode={module.padding_mode!r} has no adapter"
    if [path for path, other in model.named_modules(remove_duplicate=False) if other is module] != [layer.path]:
        return "it is the same module as another one"
    tied = [str(place) for name in module._parameters if module._parameters[name] is not None
            for place in aliases(model, TensorPlace(layer.path, name)) if place.module != layer.path]  # fmt: skip
    if tied:
        return f"its weights are tied with {tied[0]}"
    own = {name for name, place in graph.tensors.items() if place.module == layer.path}
    others = [call for call in graph.calls if not own.isdisjoint(call.refs()) and layer.path not in above(call.module)]
    return f"its weights are read at {others[0].place} too" if others else None


def _moments(model: nn.Module, task: Task, paths: Sequence[str], batches: int) -> dict[str, tuple[Tensor, Tensor]]:
    """path → mean and variance of each of the layer's channels over calibration data, float64 [width]."""
    if task.calibration is None:
        raise InputError("the task has no calibration data", where="PruneBehindAdapter", do="Pass task.complete()")
    target = sharing_copy(model).eval()
    seen = {path: _Moments(type(module_at(target, path)) is nn.Linear) for path in paths}
    for path, moments in seen.items():
        module_at(target, path).register_forward_hook(moments)
    ran = 0
    with seeded(0, task.calibration), torch.no_grad():
        for batch in islice(batches_of(task.calibration, "task.calibration"), batches):
            with user_code("the model fails", where=f"PruneBehindAdapter, calibration batch {ran}"):
                task.outputs(target, batch)
            ran += 1
    if not ran:
        raise InputError("the loader is empty", where="task.calibration", got="no batch")
    return {path: moments.result(path) for path, moments in seen.items()}


class _Moments:
    """A forward hook that gathers mean and variance per channel, merged batch by batch (Chan, Golub, LeVeque 1983)."""

    def __init__(self, last: bool):
        self.last = last
        self.count, self.mean, self.squares = 0, torch.zeros(1), torch.zeros(1)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        rows = output.detach().double().cpu()
        rows = rows.flatten(0, -2) if self.last else rows.transpose(0, 1).flatten(1).T
        mean = rows.mean(0)
        count = self.count + len(rows)
        delta = mean - self.mean
        self.squares = self.squares + (rows - mean).square().sum(0) + delta.square() * self.count * len(rows) / count
        self.mean = self.mean + delta * len(rows) / count
        self.count = count

    def result(self, path: str) -> tuple[Tensor, Tensor]:
        """Mean and variance. Raises TrainingError where they are not finite or nothing was seen."""
        if not self.count or not bool(torch.isfinite(self.squares).all()):
            raise TrainingError("its channels have no finite variance", where=path, got=f"{self.count} values")
        return self.mean, self.squares / self.count


def _largest(score: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` largest, increasing; of equal ones the first."""
    return torch.argsort(score, descending=True, stable=True)[:count].sort().values


def _bias(module: Any) -> Tensor:
    weight: Tensor = module.weight.detach()
    return weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()


def _mask(module: nn.Module, removed: Tensor, bias: Tensor) -> None:
    """The layer at its full size with zeros for the removed rows: what the shrunk one must equal."""
    weight = module._parameters["weight"]
    assert weight is not None, "a layer has a weight"
    zeroed = weight.detach().clone()
    zeroed[removed] = 0
    module._parameters.update(weight=nn.Parameter(zeroed), bias=nn.Parameter(bias.clone()))


def _edits(layer: _Layer, module: Any, weight: Tensor, bias: Tensor, kept: Tensor) -> Iterator[Edit]:
    kind = _KINDS[type(module)]
    arguments: dict[str, Any] = {"kind": kind, "width": layer.width, "kept": len(kept)}
    names = ("in_features", "out_features") if kind == "linear" else ("in_channels", "out_channels")
    arguments["attributes"] = {name: getattr(module, name) for name in names}
    if kind != "linear":
        arguments["options"] = {
            name: value if isinstance(value, str) else list(value)
            for name in ("stride", "padding", "dilation")
            for value in [getattr(module, name)]
        }
    table = torch.full((layer.width,), len(kept)).index_copy(0, kept, torch.arange(len(kept)))
    yield Swap(layer.path, "Scattered", arguments)
    yield Write(TensorPlace(layer.path, "weight"), weight[kept.to(weight.device)])
    yield Write(TensorPlace(layer.path, "bias"), bias)
    yield Write(TensorPlace(layer.path, "table"), table)
