"""The model with some of its channels masked, computed on its graph: what a shrunk model must equal.

Whoever reads a removed channel reads it with weight zero; a sum over channels takes it as zero; a normalisation takes
its statistics over the channels that stay. Nothing is sliced here, so that a wrong index in the surgery shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from tersor.core.edit import Cut, Slice
from tersor.core.place import tensor_at
from tersor.core.verify import only
from tersor.graph.axis import Axis, Leaf, positions, size_of
from tersor.graph.flow import Read
from tersor.graph.group import Group, Groups, removal

_SHAPED = {"layer_norm", "rms_norm"}  # their second argument is the shape of what they normalise


_Reads = dict[str, list[tuple[Read, Tensor]]]  # call → what it sums over, and the positions there that stay


class Masked(nn.Module):
    """``model``'s graph with the units outside ``keep`` masked; called like the model, whose tensors it holds.

    ``keep``: group → bool [units].
    """

    def __init__(self, groups: Groups, model: nn.Module, keep: Mapping[Group, NDArray[np.bool_]], reads: _Reads):
        super().__init__()
        self.reads = reads
        self.program = groups.graph.program
        self.tensors = {name: tensor_at(model, place) for name, place in groups.graph.tensors.items()}
        self.constants = groups.graph.constants
        kept = _by_leaf(keep)
        self.groups_left = {name: _count(axis, kept) for name, axis in groups.grouped.items()}
        self._zeroed: dict[int, list[Cut]] = {}
        for cut in (cut for edit in removal(keep) if isinstance(edit, Slice) for cut in edit.cuts):
            if cut.role == "consumer":
                self._zeroed.setdefault(id(tensor_at(model, cut.place)), []).append(cut)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        result = _Interpreter(self, leaves).run()
        spec = self.program.call_spec.out_spec
        return torch.utils._pytree.tree_unflatten(list(result), cast(Any, spec))

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer, its removed columns zero."""
        value = self.tensors[name]
        for cut in self._zeroed.get(id(value), ()):
            value = only(value.detach(), cut.dim, cut.keep)
        return value


def _by_leaf(keep: Mapping[Group, NDArray[np.bool_]]) -> dict[Leaf, NDArray[np.bool_]]:
    return {group.leaf: mask for group, mask in keep.items()}


def _staying(axis: Axis, kept: Mapping[Leaf, NDArray[np.bool_]]) -> NDArray[np.int64] | None:
    """The positions of an axis that stay; None where all do."""
    gone = np.zeros(size_of(axis), dtype=bool)
    for leaf, where, units in positions(axis):
        if leaf in kept:
            gone[where[~kept[leaf][units]]] = True
    return np.flatnonzero(~gone) if gone.any() else None


def _count(axis: Axis, kept: Mapping[Leaf, NDArray[np.bool_]]) -> int:
    stays = _staying(axis, kept)
    return size_of(axis) if stays is None else len(stays)


class _Interpreter(fx.Interpreter):
    """Runs the program, giving calls that reduce over removed positions only what stays."""

    def __init__(self, masked: Masked, leaves: list[Any]):
        super().__init__(masked.program.graph_module)
        self.masked = masked
        self.signature = masked.program.graph_signature
        specs = [spec for spec in self.signature.input_specs if spec.kind is InputKind.USER_INPUT]
        self.given = {getattr(spec.arg, "name", ""): leaf for spec, leaf in zip(specs, leaves, strict=True)}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, without the buffers and inputs that it would update."""
        result = super().run()
        return result[len(self.signature.buffers_to_mutate) + len(self.signature.user_inputs_to_mutate) :]

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(target)
        if name in self.masked.tensors:
            return self.masked.tensor(name)
        if name in self.masked.constants:
            return self.masked.constants[name]
        return self.given[name]

    def run_node(self, n: fx.Node) -> Any:
        reads = self.masked.reads.get(n.name)
        if n.target is torch.ops.aten.view.default:  # the capture may have seen other strides
            return torch.reshape(*self.fetch_args_kwargs_from_env(n)[0])
        if not reads:
            return super().run_node(n)
        before, kwargs = self.fetch_args_kwargs_from_env(n)
        spread = n.target is torch.ops.aten.einsum.default  # its operands are one list
        before = (before[0], *before[1]) if spread else before
        args: list[Any] = list(before)
        for read, stays in reads:
            stays = stays.to(args[read.argument].device)
            if read.how == "zero":
                args[read.argument] = only(args[read.argument], read.dim, stays)
            else:
                args[read.argument] = args[read.argument].index_select(read.dim, stays)
        kept = [(read, stays) for read, stays in reads if read.how == "kept"]
        if kept:
            self._shrink_arguments(n, args, kept)
        result = self.call_function(n.target, (args[0], args[1:]) if spread else tuple(args), kwargs)
        return _put_back(result, kept, before)

    def _shrink_arguments(self, n: fx.Node, args: list[Any], kept: list[tuple[Read, Tensor]]) -> None:
        """What goes with the statistics: the shape that is normalised, scales and shifts, the number of groups."""
        name = str(n.target)
        x = args[0]
        if any(op in name for op in _SHAPED):
            count = len(args[1])
            args[1] = list(x.shape[x.ndim - count :])
            for number in range(2, min(len(args), 4)):
                if isinstance(args[number], Tensor):
                    for read, stays in kept:
                        args[number] = args[number].index_select(read.dim - (x.ndim - count), stays)
        elif "group_norm" in name:
            args[1] = self.masked.groups_left.get(n.name, args[1])
            args[2:4] = [a.index_select(0, kept[0][1]) if isinstance(a, Tensor) else a for a in args[2:4]]


def _put_back(result: Any, kept: list[tuple[Read, Tensor]], before: Any) -> Any:
    """What was computed of the positions that stay, at their old places; zero elsewhere."""
    if isinstance(result, (tuple, list)):
        return (_put_back(result[0], kept, before), *result[1:])
    for read, stays in kept:
        if read.result is not None:
            shape = list(result.shape)
            shape[read.result] = before[read.argument].shape[read.dim]
            result = result.new_zeros(shape).index_copy(read.result, stays.to(result.device), result)
    return result


def reference(groups: Groups, model: nn.Module, keep: Mapping[Group, NDArray[np.bool_]]) -> Masked | None:
    """What the model must compute once all but ``keep`` is removed; None where zero columns in the weights that read
    what is removed say it all, and no graph is needed."""
    reads: _Reads = {}
    kept = _by_leaf(keep)
    for read in groups.reads:
        stays = _staying(read.axis, kept)
        if stays is not None:
            reads.setdefault(read.call, []).append((read, torch.from_numpy(stays)))
    return Masked(groups, model, keep, reads) if reads else None
