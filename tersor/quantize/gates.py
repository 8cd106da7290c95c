"""SiLU and hard swish in integers: a gate and a product, which have integer kernels, where neither whole has one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.copies import sharing_copy
from tersor.core.edit import Quantizer, Swap
from tersor.core.errors import VerificationError
from tersor.core.place import ActivationPlace
from tersor.core.plan import Plan, Skip
from tersor.core.task import Task
from tersor.core.verify import verify_edits
from tersor.graph.trace import Call
from tersor.quantize.points import LIGHT, MADE_OF, Flow, decide
from tersor.quantize.schemes import Int

_OPERATORS: dict[type[nn.Module], str] = {nn.SiLU: "silu", nn.Hardswish: "hardswish"}
_MODULES = {"silu": "nn.SiLU", "hardswish": "nn.Hardswish"}


def split_gates(
    model: nn.Module, task: Task, flow: Flow, weighted: Iterable[Call], products: Iterable[Call]
) -> tuple[nn.Module, list[Swap], list[Skip]]:
    """The model with each nn.SiLU and nn.Hardswish that reads integers as ``Gated``, the Swaps that make it so, under
    each of a module's names, and why others stay. The model given is left alone; the new one shares its tensors.

    What reads a linear layer on three and more axes stays whole: such results are floats at no cost. Modules that work
    in place, on whose doing so the model relies, stay as well.
    """
    points = decide(flow, weighted, products=products, light=LIGHT | MADE_OF.keys())
    calls = [call for call in points.light if call.operator in MADE_OF and not _reads_wide_linear(flow, call)]
    owners = {call.place: model.get_submodule(call.module) for call in calls}
    skips = [
        Skip(
            str(place),
            f"called as a function: as {_MODULES[place.operator]} it would be a gate and a product in integers",
        )
        for place, owner in owners.items()
        if type(owner) not in _OPERATORS
    ]
    meant = {id(owner) for owner in owners.values()}
    named = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if id(module) in meant and type(module) in _OPERATORS
    ]
    swaps = [Swap(path, "Gated", {"gate": MADE_OF[_OPERATORS[type(module)]]}) for path, module in named]
    if not swaps:
        return model, [], skips
    plan = Plan("Quantize", tuple(swaps), preserves=True)
    split = apply(sharing_copy(model), plan, in_place=True)
    if any(module.inplace for _, module in named):
        try:
            verify_edits(model, split, plan, task, draws=0)
        except VerificationError as error:
            reason = f"stays whole: the model relies on its working in place ({error.got})"
            return model, [], [*skips, *(Skip(path, reason) for path, _ in named)]
    return split, swaps, skips


def _reads_wide_linear(flow: Flow, call: Call) -> bool:
    origin = flow.calls.get(flow.origin(call.args[0]))
    return origin is not None and origin.operator == "linear" and len(origin.shape or ()) > 2


def gate_quantizer(
    flow: Flow, group: Iterable[str], places: tuple[ActivationPlace, ...], scheme: Int
) -> Quantizer | None:
    """The quantiser of hard sigmoid's results alone, on the grid 0, 1/256 … 255/256, which is not learnt; None of
    anything else.

    On it round(256 · hardsigmoid(x)) = round(x / (6/256)) + 128, clipped to 0 … 255: the gate is x on another grid, and
    needs no kernel but one that requantises.
    """
    origins = [flow.calls.get(flow.origin(name)) for name in group]
    if (scheme.quant_min, scheme.quant_max) != (0, 255):
        return None
    if any(origin is None or origin.operator != "hardsigmoid" for origin in origins):
        return None
    step, zero = torch.tensor(1 / 256), torch.tensor(0, dtype=torch.int32)
    return Quantizer(places, step, zero, 0, 255, axis=None, learn=False)
