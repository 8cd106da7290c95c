"""Capture a model's ATen graph with torch.export and name everything in it by the model's own places."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import GraphError
from tersor.core.intercept import base_name, operator_name
from tersor.core.place import ActivationPlace, TensorPlace

_BATCH_NORM = {"native_batch_norm_legit_no_training", "native_batch_norm_legit", "native_batch_norm"}


@dataclass(frozen=True)
class Call:
    """One operator call of the graph.

    ``operator``: ATen base name (``conv2d``, ``add``, ``batch_norm``); ``overload`` the full one. ``args``: values are
    names (``Ref``) of calls, inputs and tensors, or plain constants, nested in lists as ATen has them. ``module``: path of
    the innermost module whose forward made the call; ``ordinal``: how many calls of that operator it made before.
    ``shape``: of the (first) result, None where it is no tensor.
    """

    name: str
    operator: str
    overload: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    ordinal: int
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None

    @property
    def place(self) -> ActivationPlace:
        """Where this call's result is, in the model."""
        return ActivationPlace(self.module, self.operator, self.ordinal)

    def refs(self) -> Iterator[str]:
        """The names that the call reads, in order."""
        yield from _refs((self.args, self.kwargs))


class Ref(str):
    """The name of a call, an input or a tensor, as opposed to a string constant."""


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _refs(item)
    elif isinstance(value, dict):
        yield from _refs(list(value.values()))


@dataclass(frozen=True)
class Graph:
    """A captured, functional forward: ``calls`` in execution order.

    ``inputs``: name → shape. ``tensors``: name → place of the parameter or buffer it is. ``shapes``: name → shape, of
    tensors too. ``outputs``: names that the model returns. ``constants``: tensors that the forward makes or closes over
    and that no place holds.
    """

    calls: tuple[Call, ...]
    inputs: dict[str, tuple[int, ...]]
    tensors: dict[str, TensorPlace]
    shapes: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    constants: dict[str, Tensor]

    def users(self) -> dict[str, list[Call]]:
        """name → the calls that read it, in order."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            for name in dict.fromkeys(call.refs()):
                found.setdefault(name, []).append(call)
        return found

    def by_name(self) -> dict[str, Call]:
        """name → call."""
        return {call.name: call for call in self.calls}


def trace(model: nn.Module, example_inputs: tuple[Any, ...]) -> Graph:
    """Capture ``model``'s forward in eval mode. The model is not changed.

    Raises GraphError, saying where the capture stopped and the usual mend.
    """
    training = {path: module.training for path, module in model.named_modules()}
    try:
        model.eval()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, example_inputs, strict=False).run_decompositions({})
    except Exception as error:  # torch.export raises whatever the user's forward or its own passes raise
        raise GraphError(
            "the graph cannot be captured", where=_where(error) or type(model).__name__,
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            do="Usual mend: no branching on tensor values in forward, and example inputs of the shape that training uses",
        ) from error  # fmt: skip
    finally:
        for path, module in model.named_modules():
            module.training = training.get(path, module.training)
    return _read(program)


def _where(error: BaseException) -> str:
    """file:line of the innermost frame of the user's code in a traceback."""
    found, frame = "", error.__traceback__
    while frame is not None:
        name = frame.tb_frame.f_code.co_filename
        if "/torch/" not in name and "/tersor/" not in name and not name.startswith("<"):
            found = f"{name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found


def _read(program: torch.export.ExportedProgram) -> Graph:
    signature = program.graph_signature
    places = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    tensors: dict[str, TensorPlace] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    inputs: dict[str, tuple[int, ...]] = {}
    constants: dict[str, Tensor] = {}
    calls: list[Call] = []
    ordinals: Counter[tuple[str, str]] = Counter()
    renamed: dict[fx.Node, Ref] = {}
    outputs: tuple[str, ...] = ()

    def value_of(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return renamed.get(value, Ref(value.name))
        if isinstance(value, (list, tuple)):
            return type(value)(value_of(item) for item in value) if type(value) in (list, tuple) else [value_of(i) for i in value]
        return value

    for node in program.graph.nodes:
        shape = _shape(node)
        if shape is not None:
            shapes[node.name] = shape
        if node.op == "placeholder":
            if node.name in places:
                module, _, tensor = places[node.name].rpartition(".")
                tensors[node.name] = TensorPlace(module, tensor)
            elif node.name in lifted:
                constants[node.name] = program.constants[lifted[node.name]]
            elif shape is not None:
                inputs[node.name] = shape
        elif node.op == "output":
            skip = len(signature.buffers_to_mutate)
            outputs = tuple(_refs(value_of(list(node.args[0])[skip:])))
        elif node.op == "call_function":
            base = operator_name(node.target) if node.target is operator.getitem else _base_name(node.target)
            if base in _BATCH_NORM:
                base = "batch_norm"
            if base == "getitem" and calls and _is_batch_norm(calls, node):
                renamed[node] = Ref(node.args[0].name)
                shapes[node.args[0].name] = shape or ()
                last = next(i for i, call in enumerate(calls) if call.name == node.args[0].name)
                calls[last] = _with_shape(calls[last], shape, node)
                continue
            module = _module(node)
            ordinal = ordinals[module, base]
            ordinals[module, base] += 1
            kwargs = {key: value_of(value) for key, value in node.kwargs.items()}
            calls.append(
                Call(
                    node.name, base, str(node.target), value_of(node.args), kwargs, module, ordinal, shape,
                    getattr(node.meta.get("val"), "dtype", None),
                )  # fmt: skip
            )
    return Graph(tuple(calls), inputs, tensors, shapes, outputs, constants)


def _base_name(target: Any) -> str:
    name = target._schema.name.split("::")[-1] if hasattr(target, "_schema") else getattr(target, "__name__", str(target))
    return base_name(name)


def _is_batch_norm(calls: list[Call], node: fx.Node) -> bool:
    source = node.args[0]
    return node.args[1] == 0 and any(call.name == source.name and call.operator == "batch_norm" for call in calls)


def _with_shape(call: Call, shape: tuple[int, ...] | None, node: fx.Node) -> Call:
    return dataclasses.replace(call, shape=shape, dtype=getattr(node.meta.get("val"), "dtype", None))


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return paths[-1] if paths else ""
