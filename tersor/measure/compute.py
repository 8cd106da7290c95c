"""Compute: multiply-accumulates of a forward pass, of the whole model and layer by layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tersor.core.errors import InputError, user_code
from tersor.core.eval_mode import eval_mode
from tersor.core.in_type import in_type_of
from tersor.core.measurement import Measurement
from tersor.measure.size import effective_weights, own_modules, own_parameters

REMAINDER = "<elsewhere>"  # the row of products that no module with parameters of its own makes


def macs(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> Measurement:
    """Multiply-accumulates of one sample's forward pass: convolutions, matrix products and attention, biases left out.

    Counted on ``example_inputs`` (batch first) in eval mode, the batch divided out; zeros count as any other weight.
    Floats are given in the type of the model's parameters. Raises InputError where the model does not run on them.
    """
    total = _count(model, example_inputs, []) / 2
    batch = len(example_inputs[0])
    shapes = [list(x.shape[1:]) for x in example_inputs]
    return Measurement(total / batch, "MACs", conditions={"per": "sample", "shapes": shapes})


def layer_table(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> tuple[dict[str, Any], ...]:
    """A row for each module that holds parameters itself, in order of definition.

    Keys: path, type, shape (of ``weight``, or of its largest parameter), parameters, nonzeros (tied ones in the first
    row that holds them), macs (per sample, its children's left out), output (shape of its last result for
    ``example_inputs``, None where it was not called). Products that none of these makes, such as attention's, stand in
    a last row ``<elsewhere>``, so that macs add up to the model's.
    """
    watched = [_Watched(path, module) for path, module in own_modules(model) if own_parameters(module)]
    total = _count(model, example_inputs, watched)
    batch = len(example_inputs[0])
    weights: dict[str, list[Tensor]] = {}
    for place, tensor in effective_weights(model):
        weights.setdefault(place.module, []).append(tensor)
    rows = [_row(entry, weights.get(entry.path, []), batch) for entry in watched]
    rest = total - sum(entry.flops for entry in watched)
    if rest:
        rows.append({
            "path": REMAINDER, "type": "products of other modules", "shape": None, "parameters": 0, "nonzeros": 0,
            "macs": rest / 2 / batch, "output": None,
        })  # fmt: skip
    return tuple(rows)


@dataclass(eq=False)
class _Watched:
    """A module with parameters of its own; the operations of its calls without its watched children's."""

    path: str
    module: nn.Module
    flops: int = 0
    output: list[int] | None = None


def _row(entry: _Watched, weights: list[Tensor], batch: int) -> dict[str, Any]:
    stored = own_parameters(entry.module)
    with torch.no_grad():
        shapes = {name: list(getattr(entry.module, name).shape) for name in stored}
    return {
        "path": entry.path,
        "type": type(entry.module).__name__.removeprefix("Parametrized"),
        "shape": shapes.get("weight") or max(shapes.values(), key=math.prod),
        "parameters": sum(tensor.numel() for tensor in weights),
        "nonzeros": sum(int(torch.count_nonzero(tensor)) for tensor in weights),
        "macs": entry.flops / 2 / batch,
        "output": entry.output,
    }


def _count(model: nn.Module, inputs: tuple[Tensor, ...], watched: list[_Watched]) -> int:
    """Floating-point operations of one forward pass; those of each watched module are added to it."""
    if not isinstance(inputs, tuple) or not inputs or inputs[0].ndim == 0 or len(inputs[0]) == 0:
        raise InputError("MACs need example inputs", where="example_inputs", expected="a tuple of tensors, batch first")
    with ExitStack() as stack:
        stack.enter_context(_countable_operators(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_without_gradients(model))
        stack.enter_context(eval_mode(model))
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=_MORE_OPERATORS))
        _watch(watched, counter.get_total_flops, stack)
        with user_code("the model does not run", where="example_inputs"):
            args, kwargs = in_type_of(model, (inputs, {}))
            model(*args, **kwargs)
    return int(counter.get_total_flops())


def _watch(watched: list[_Watched], total: Callable[[], int], stack: ExitStack) -> None:
    """Hook the watched modules until ``stack`` is left."""
    running: list[tuple[int, int]] = []  # (total at the start, operations of watched children) of each open call

    def enter(module: nn.Module, args: Any) -> None:
        running.append((total(), 0))

    def leave(entry: _Watched, module: nn.Module, args: Any, result: Any) -> None:
        start, of_children = running.pop()
        spent = total() - start
        entry.flops += spent - of_children
        if running:
            running[-1] = running[-1][0], running[-1][1] + spent
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        entry.output = list(first.shape) if isinstance(first, Tensor) else None

    for entry in watched:
        for handle in (
            entry.module.register_forward_pre_hook(enter),
            entry.module.register_forward_hook(partial(leave, entry)),
        ):
            stack.callback(handle.remove)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """The counter hooks what requires a gradient, and stumbles over a parameter that is expanded."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _countable_operators(model: nn.Module) -> Iterator[None]:
    """Keep torch off its fused operators, whose products the counter does not know."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")  # the switch warns about Intel GPUs
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _matrix_vector(matrix: torch.Size, vector: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


def _added_matrix_vector(bias: Any, matrix: torch.Size, vector: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


_MORE_OPERATORS = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.dot: _matrix_vector,
    torch.ops.aten.addmv: _added_matrix_vector,
}
