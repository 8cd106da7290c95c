"""Capture a model's ATen graph with torch.export and name everything in it by the model's own places."""

from __future__ import annotations

import dataclasses
import operator
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from tersor.core import errors
from tersor.core.errors import GraphError
from tersor.core.eval_mode import eval_mode
from tersor.core.intercept import base_name, end_passes, operator_name
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.graph.sizes import Book, Said, watched

_NOT_THE_USERS = (str(Path(torch.__file__).parent) + os.sep, str(Path(errors.__file__).parents[1]) + os.sep)
_BATCH_NORM = {
    "native_batch_norm_legit_no_training", "native_batch_norm_legit", "native_batch_norm",
    "native_batch_norm_legit_functional",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One operator call of the graph.

    ``operator``: ATen base name (``conv2d``, ``add``, ``batch_norm``); ``overload`` the full one. ``args``: values are
    names (``Ref``) of calls, inputs and tensors, or plain constants, nested in lists as ATen has them. ``module``: path
    of the innermost module whose forward made the call; ``ordinal``: how many calls of that operator it made before.
    ``shape``: of the (first) result, None where it is no tensor. ``function``: the torch function that the forward
    called, and ``said``: what it was given, sizes with their sources.
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
    function: str = ""
    said: Said | None = None

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
    and that no place holds. ``program``: the exported program, whose nodes bear the calls' names. ``values``: results
    of torch functions, inputs and parameters, as ``Dim`` names them → their names here. ``equal``: pairs of sizes
    that the forward found equal.
    """

    calls: tuple[Call, ...]
    inputs: dict[str, tuple[int, ...]]
    tensors: dict[str, TensorPlace]
    shapes: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    constants: dict[str, Tensor]
    program: torch.export.ExportedProgram
    book: Book
    values: dict[tuple[str | None, int | str], str]

    def users(self) -> dict[str, list[Call]]:
        """name → the calls that read it, in order."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            for name in dict.fromkeys(call.refs()):
                found.setdefault(name, []).append(call)
        return found

    def outputs_of(self, output_of: Callable[[Any], Any]) -> tuple[str, ...]:
        """The one output that ``output_of`` picks of what the model returns; all, where it computes with them."""
        given = self.program.graph_signature.user_outputs
        leaves = [torch.empty(self.shapes[name], device="meta") if name in self.shapes else name for name in given]
        picked = output_of(torch.utils._pytree.tree_unflatten(leaves, cast(Any, self.program.call_spec.out_spec)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        names = zip(self.outputs, tensors, strict=True)
        return tuple(name for name, tensor in names if tensor is picked) or self.outputs

    def by_name(self) -> dict[str, Call]:
        """name → call."""
        return {call.name: call for call in self.calls}


def trace(model: nn.Module, example_inputs: tuple[Any, ...], *, training: bool = False) -> Graph:
    """Capture ``model``'s forward in eval mode, or as it trains. The model is not changed, but for what its modules
    keep of their weights until they train again.

    Raises GraphError, saying where the capture stopped and the usual mend.
    """
    try:
        with eval_mode(model, training=training), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model.train().train(training)  # modules that keep what they computed of their weights forget it
            with watched(model) as book:
                program = torch.export.export(model, example_inputs, strict=False)
            program = program.run_decompositions({})
    except Exception as error:  # torch.export raises whatever the user's forward or its own passes raise
        end_passes(model)
        raise GraphError(
            "the graph cannot be captured", where=_where(error) or type(model).__name__,
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            do="Usual mend: no branching on tensor values in forward; example inputs of the shape used in training; "
            "plain outputs (transformers: config.use_cache = False)",
        ) from error  # fmt: skip
    return _Reader(program, book).graph()


def _where(error: BaseException) -> str:
    """file:line of the innermost frame outside torch and Tersor in a traceback."""
    found, frame = "", error.__traceback__
    while frame is not None:
        name = frame.tb_frame.f_code.co_filename
        if not name.startswith(("<", *_NOT_THE_USERS)):
            found = f"{name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return found


class _Reader:
    """Reads an exported program's nodes, in order, into a Graph."""

    def __init__(self, program: torch.export.ExportedProgram, book: Book):
        self.program, self.book = program, book
        self.signature = program.graph_signature
        self.places = {**self.signature.inputs_to_parameters, **self.signature.inputs_to_buffers}
        self.calls: dict[str, Call] = {}
        self.tensors: dict[str, TensorPlace] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, Tensor] = {}
        self.outputs: tuple[str, ...] = ()
        self.ordinals: Counter[tuple[str, str]] = Counter()
        self.made: dict[str, list[tuple[str, int | None]]] = {}  # torch function call → (node, number among results)
        self.same_as: dict[fx.Node, Ref] = {}  # the first result of a batch norm is the call itself

    def graph(self) -> Graph:
        """The graph of the whole program."""
        for node in self.program.graph.nodes:
            shape = _shape(node)
            if shape is not None:
                self.shapes[node.name] = shape
            if node.op == "placeholder":
                self._placeholder(node, shape)
            elif node.op == "output":
                mutated = len(self.signature.buffers_to_mutate) + len(self.signature.user_inputs_to_mutate)
                self.outputs = tuple(_refs(self._value(list(_nodes(node.args[0]))[mutated:])))
            elif node.op == "call_function":
                self._call(node, shape)
        calls = tuple(self.calls.values())
        return Graph(
            calls, self.inputs, self.tensors, self.shapes, self.outputs, self.constants,
            self.program, self.book, self._values(),
        )  # fmt: skip

    def _values(self) -> dict[tuple[str | None, int | str], str]:
        """Every tensor that a size may be a dimension of, as the watch named it → its name here."""
        found: dict[tuple[str | None, int | str], str] = {(None, i): name for i, name in enumerate(self.inputs)}
        found.update({(None, str(place)): name for name, place in self.tensors.items()})
        for (function, index), shape in self.book.shapes.items():
            nodes = [(name, number) for name, number in self.made.get(function, ()) if self.shapes.get(name) == shape]
            exact = [name for name, number in nodes if number == index]
            if exact or nodes:
                found[function, index] = exact[-1] if exact else nodes[-1][0]
            elif self.book.same.get((function, index)) in found:
                found[function, index] = found[self.book.same[function, index]]
        return found

    def _placeholder(self, node: fx.Node, shape: tuple[int, ...] | None) -> None:
        lifted = self.signature.inputs_to_lifted_tensor_constants
        if node.name in self.places:
            module, _, tensor = self.places[node.name].rpartition(".")
            self.tensors[node.name] = TensorPlace(module, tensor)
        elif node.name in lifted:
            self.constants[node.name] = self.program.constants[lifted[node.name]]
        elif shape is not None:
            self.inputs[node.name] = shape

    def _call(self, node: fx.Node, shape: tuple[int, ...] | None) -> None:
        dtype = getattr(node.meta.get("val"), "dtype", None)
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(source, fx.Node) and node.args[1] == 0:
            call = self.calls.get(source.name)
            if call is not None and call.operator == "batch_norm":
                self.same_as[node] = Ref(source.name)
                self.shapes[source.name] = shape or ()
                self.calls[source.name] = dataclasses.replace(call, shape=shape, dtype=dtype)
                self.made.setdefault(call.function, []).append((source.name, None))
                return
        base = operator_name(operator.getitem) if node.target is operator.getitem else _base_name(node.target)
        base = "batch_norm" if base in _BATCH_NORM else base
        module = _module(node)
        ordinal = self.ordinals[module, base]
        self.ordinals[module, base] += 1
        args, kwargs = self._value(tuple(node.args)), {key: self._value(value) for key, value in node.kwargs.items()}
        function = " ".join(node.meta.get("torch_fn", ()))
        number = cast(int, node.args[1]) if node.target is operator.getitem else None
        self.made.setdefault(function, []).append((node.name, number))
        self.calls[node.name] = Call(
            node.name, base, str(node.target), args, kwargs, module, ordinal, shape, dtype,
            function, self.book.calls.get(function),
        )  # fmt: skip

    def _value(self, value: Any) -> Any:
        """An argument with its nodes replaced by their names."""
        if isinstance(value, fx.Node):
            return self.same_as.get(value, Ref(value.name))
        if isinstance(value, tuple):
            return tuple(self._value(item) for item in value)
        if isinstance(value, (list, fx.immutable_collections.immutable_list)):
            return [self._value(item) for item in value]
        return value


def _nodes(outputs: Any) -> Iterator[Any]:
    yield from outputs if isinstance(outputs, (tuple, list)) else (outputs,)


def _base_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(target, "__name__", str(target))
    return base_name(name)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None  # no tensor, or one whose shape depends on the data
    return tuple(int(size) for size in value.shape)


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return paths[-1] if paths else ""
