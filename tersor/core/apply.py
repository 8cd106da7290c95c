"""``apply``: the only function that writes to a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.dynamic_quantize import DynamicQuantize
from tersor.core.edit import Attribute, Cut, Edit, Mask, Precision, Quantizer, Slice, Swap, Write
from tersor.core.errors import InputError
from tersor.core.eval_mode import eval_mode
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.gated import Gated
from tersor.core.integer_bias import rounded_bias
from tersor.core.intercept import intercept_at, welcome
from tersor.core.masked import Masked, standing_mask
from tersor.core.place import TensorPlace, aliases, module_at, stored_at, tensor_at, tied_places
from tersor.core.plan import Plan
from tersor.core.recurrent import list_weights_anew
from tersor.core.removed import Removed
from tersor.core.scattered import Scattered
from tersor.core.widened import HALVES, is_narrow, narrow

# Swap builds from these and nothing else, so that an artifact cannot name arbitrary code.
CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {
    "Gated": Gated, "Identity": nn.Identity, "ReLU": nn.ReLU, "Removed": Removed, "Scattered": Scattered,
}  # fmt: skip
CHILDREN = "Children"  # what a Swap leaves of the module that stood there, by ``names``: a Sequential of these


def apply(model: nn.Module, plan: Plan, *, in_place: bool = False) -> nn.Module:
    """Carry out a plan's edits and return the edited model.

    A copy is edited unless ``in_place`` (which saves the memory of the copy). Every edit is checked against the model
    as it stands before it is written; with a copy, an error leaves the model given untouched.

    >>> layer = nn.Linear(2, 1)
    >>> masked = apply(layer, Plan("by hand", (Mask(TensorPlace("", "weight"), torch.tensor([[True, False]])),)))
    >>> float(masked.weight[0, 1]), type(layer.weight).__name__
    (0.0, 'Parameter')
    """
    target = model if in_place else copy.deepcopy(model)
    for edit in plan.edits:
        write(target, edit)
    if any(isinstance(edit, Slice) for edit in plan.edits):
        with eval_mode(target, training=True):
            pass  # modules that keep what they computed of their weights forget it when they begin to train
    return target


def write(model: nn.Module, edit: Edit) -> None:
    """Carry out one edit on the model itself. Raises InputError, naming the place, where it does not fit."""
    match edit:
        case Mask():
            _mask(model, edit)
        case Write():
            _write(model, edit)
        case Quantizer():
            _quantizer(model, edit)
        case Precision():
            _precision(model, edit)
        case Slice():
            _slice(model, edit)
        case Swap():
            _swap(model, edit)
        case Attribute():
            _attribute(model, edit)


def _expect_shape(place: object, got: torch.Size, expected: torch.Size) -> None:
    if got != expected:
        raise InputError(
            "the edit has another shape than the tensor", where=str(place), got=list(got), expected=list(expected)
        )


def _mask(model: nn.Module, edit: Mask) -> None:
    tensor = tensor_at(model, edit.place)
    _expect_shape(edit.place, edit.keep.shape, tensor.shape)
    for place in aliases(model, edit.place):
        module = module_at(model, place.module)
        standing = standing_mask(module, place.tensor)
        # In the weight's own memory format: kernels are chosen by it, and so is the last bit of what they compute.
        keep = torch.empty_like(tensor, dtype=torch.bool).copy_(edit.keep)
        if standing is None:
            _parametrize(model, module, place.tensor, Masked(keep))
        else:
            standing.keep.copy_(standing.keep & keep if edit.merge else keep)


def _parametrize(model: nn.Module, module: nn.Module, tensor: str, entry: nn.Module) -> None:
    parametrize.register_parametrization(module, tensor, entry)
    list_weights_anew(module)
    welcome(model, _parametrizations(module, tensor))


def _parametrizations(module: nn.Module, tensor: str) -> parametrize.ParametrizationList:
    return cast(nn.ModuleDict, module.parametrizations)[tensor]  # type: ignore[return-value]


def _write(model: nn.Module, edit: Write) -> None:
    module = module_at(model, edit.place.module)
    name = edit.place.tensor
    if getattr(module, name, None) is None:
        if name not in module._parameters:
            raise InputError("no such parameter", where=str(edit.place), expected=f"one of {list(module._parameters)}")
        module._parameters[name] = nn.Parameter(edit.value.detach().clone())
        return
    tensor = tensor_at(model, edit.place)
    _expect_shape(edit.place, edit.value.shape, tensor.shape)
    with torch.no_grad():
        if parametrize.is_parametrized(module, name):
            _parametrizations(module, name).original.copy_(edit.value)
        else:
            tensor.copy_(edit.value)


def _quantizer(model: nn.Module, edit: Quantizer) -> None:
    if edit.dynamic:
        _dynamic_quantizer(model, edit)
        return
    if edit.group_size is not None and edit.axis is None:
        raise InputError("groups are of the rows along an axis", where=str(edit.places[0]), expected="an axis")
    quantizer = FakeQuantize(
        edit.scale, edit.zero_point, edit.quant_min, edit.quant_max,
        axis=edit.axis, learn=edit.learn, group_size=edit.group_size,
    )  # fmt: skip
    quantizer.reads = edit.reads
    for place in edit.places:
        if isinstance(place, TensorPlace):
            tensor = tensor_at(model, place)
            _expect_grid(place, edit, tensor)
            for alias in aliases(model, place):
                module = module_at(model, alias.module)
                _stand(model, module, alias.tensor, quantizer.to(tensor.device))
            rounded = rounded_bias(model, place.module) if edit.reads is not None else None
            if rounded is not None:
                _write(model, Write(TensorPlace(place.module, "bias"), rounded))
        else:
            module_at(model, place.module)
            if edit.group_size is not None:
                raise InputError(
                    "an activation has no groups", where=str(place), got=f"group_size {edit.group_size}", expected=None
                )
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            intercept_at(model, place.module).add(place.operator, place.ordinal, quantizer.to(device))


def _stand(model: nn.Module, module: nn.Module, tensor: str, quantizer: FakeQuantize) -> None:
    """Put a quantiser on a tensor, or in the place of the one that stands there."""
    entries = list(_parametrizations(module, tensor)) if parametrize.is_parametrized(module, tensor) else []
    number = next((n for n, entry in enumerate(entries) if isinstance(entry, FakeQuantize)), None)
    if number is None:
        _parametrize(model, module, tensor, quantizer)
    else:
        _parametrizations(module, tensor)[number] = quantizer


def _dynamic_quantizer(model: nn.Module, edit: Quantizer) -> None:
    for place in edit.places:
        if isinstance(place, TensorPlace):
            raise InputError("a stored tensor has a grid of its own", where=str(place), got="dynamic", expected=False)
        module_at(model, place.module)
        intercept_at(model, place.module).add(place.operator, place.ordinal, DynamicQuantize())


def _expect_grid(place: TensorPlace, edit: Quantizer, tensor: Tensor) -> None:
    if edit.axis is None:
        return
    channels = tensor.shape[edit.axis]
    expected, what = [channels], "one scale per channel is needed"
    if edit.group_size is not None:
        row = tensor.numel() // channels
        if edit.group_size < 1 or row % edit.group_size:
            raise InputError(
                "the groups do not divide a row of the tensor", where=str(place),
                got=f"group_size {edit.group_size}", expected=f"a divisor of {row}",
            )  # fmt: skip
        expected, what = [channels, row // edit.group_size], "one scale per row and group is needed"
    if list(edit.scale.shape) != expected:
        raise InputError(what, where=str(place), got=list(edit.scale.shape), expected=expected)


def _precision(model: nn.Module, edit: Precision) -> None:
    stored, module = stored_at(model, edit.place), module_at(model, edit.place.module)
    own = isinstance(stored, nn.Parameter) and stored.is_floating_point() and not is_narrow(module, edit.place.tensor)
    if not own or edit.dtype not in HALVES:
        raise InputError(
            "only a floating parameter can be stored in half precision, once", where=str(edit.place),
            got=f"{stored.dtype} to {edit.dtype}", expected=f"one of {HALVES}",
        )  # fmt: skip
    half = nn.Parameter(stored.detach().to(edit.dtype), requires_grad=stored.requires_grad)
    for place in aliases(model, edit.place):
        module = module_at(model, place.module)
        chain = narrow(module, place.tensor, half)
        list_weights_anew(module)
        welcome(model, chain)


def _slice(model: nn.Module, edit: Slice) -> None:
    new: dict[int, tuple[tuple[TensorPlace, ...], Tensor]] = {}
    done: dict[tuple[int, int], Tensor] = {}
    tied = tied_places(model)
    for cut in edit.cuts:
        tensor = tensor_at(model, cut.place)
        _check_cut(model, cut, tensor)
        if (id(tensor), cut.dim) in done:  # tied weights: cut once
            if not torch.equal(done[id(tensor), cut.dim], cut.keep):
                raise InputError(f"dimension {cut.dim} is to be cut in two different ways", where=str(cut.place))
            continue
        done[id(tensor), cut.dim] = cut.keep
        places, value = new.get(id(tensor), (tied[id(tensor)], tensor.detach()))
        new[id(tensor)] = places, value.index_select(cut.dim, cut.keep.to(value.device))
    for places, value in new.values():
        _replace(model, places, value)


def _check_cut(model: nn.Module, cut: Cut, tensor: Tensor) -> None:
    module = module_at(model, cut.place.module)
    if parametrize.is_parametrized(module, cut.place.tensor):
        raise InputError(
            "a masked or quantised tensor cannot be sliced", where=str(cut.place), do="Prune channels first, or bake"
        )
    keep = cut.keep.tolist()
    inside = 0 <= cut.dim < tensor.ndim and bool(keep) and 0 <= keep[0] and keep[-1] < tensor.shape[cut.dim]
    if not inside or any(a >= b for a, b in pairwise(keep)):
        raise InputError(
            f"dimension {cut.dim} cannot keep these indices", where=str(cut.place),
            got=f"{len(keep)} indices{f' from {min(keep)} to {max(keep)}' if keep else ''}",
            expected=f"at least one, increasing, within {list(tensor.shape)}",
        )  # fmt: skip


def _replace(model: nn.Module, places: tuple[TensorPlace, ...], value: Tensor) -> None:
    old = tensor_at(model, places[0])
    if old.ndim == 4 and old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        value = value.contiguous(memory_format=torch.channels_last)
    new: Tensor = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for place in places:
        module = module_at(model, place.module)
        holder = module._parameters if place.tensor in module._parameters else module._buffers
        holder[place.tensor] = new  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):
            setattr(module, place.tensor, new)  # it keeps a list of its weights beside


def _swap(model: nn.Module, edit: Swap) -> None:
    known = {*CONSTRUCTORS, CHILDREN}
    if edit.constructor not in known:
        raise InputError("unknown constructor", where=edit.module, got=edit.constructor, expected=sorted(known))
    old = module_at(model, edit.module)
    if edit.constructor == CHILDREN:
        new: nn.Module = _children(old, edit)
    else:
        new = CONSTRUCTORS[edit.constructor](**edit.arguments).train(old.training)
    parent, _, name = edit.module.rpartition(".")
    if not name:
        raise InputError("the whole model cannot be swapped", where="<model>")
    module_at(model, parent)._modules[name] = new
    welcome(model, new)


def _children(old: nn.Module, edit: Swap) -> nn.Sequential:
    """The children of ``old`` that are named, one after the other, under their names and in their modes."""
    children, names = dict(old.named_children()), list(edit.arguments["names"])
    if lost := [name for name in names if name not in children]:
        raise InputError("no such child", where=edit.module, got=lost, expected=list(children))
    kept = nn.Sequential(OrderedDict((name, children[name]) for name in names))
    kept.training = old.training
    return kept


def _attribute(model: nn.Module, edit: Attribute) -> None:
    module = module_at(model, edit.module)
    *path, name = edit.name.split(".")
    taken = {*module._parameters, *module._buffers, *module._modules, *vars(nn.Module())}  # hooks, training, …
    if name.startswith("__") or edit.name in taken:
        raise InputError("not a plain attribute", where=f"{edit.module}.{edit.name}")
    holder: Any = module
    try:
        for part in path:  # a config that the module holds
            holder = vars(holder)[part]
        known = name in vars(holder)
    except (KeyError, TypeError):
        known = False
    if not known:
        raise InputError("no such attribute", where=f"{edit.module}.{edit.name}")
    if holder is module:
        setattr(holder, name, edit.value)
    else:
        vars(holder)[name] = edit.value  # a config may be frozen, or rename what is set
