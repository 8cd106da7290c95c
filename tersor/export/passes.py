"""Graph passes that turn what the exporter writes into the file one would ship. Each edits an ONNX model in place."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper

from tersor.core.intercept import CHILD
from tersor.core.place import ActivationPlace
from tersor.export.dynamic import dynamic_products
from tersor.export.few_bits import (
    fold_constant_moves,
    look_up_integers,
    products_of_few_bits,
    weights_of_float_layers,
)
from tersor.export.gates import requantized_gates
from tersor.export.integers import (
    fold_weight_quantizers,
    integer_biases,
    keep_float,
    linears_to_gemm,
    own_int8,
    scales_into_dequantizers,
)
from tersor.export.narrow import narrow_integers
from tersor.export.onnx_graph import constants_of, has_subgraph, read_names, set_nodes, shapes_of, users_of
from tersor.export.uniform import drop_uniform_masks

# The operators whose nodes keep a name (their module's path), so that reports can say which layer is meant.
NAMED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def ship(model: ModelProto, inputs: Sequence[str] = ()) -> ModelProto:
    """All passes, in the order in which they help each other. The model computes what it computed before.

    ``inputs``: new names for the graph's inputs, in order.
    """
    name_layers(model)
    constants_to_initializers(model)
    remove_no_ops(model)
    drop_uniform_masks(model)
    fold_constant_moves(model)
    fold_weight_quantizers(model)
    dynamic_products(model)
    products_of_few_bits(model)
    look_up_integers(model)
    scales_into_dequantizers(model)
    linears_to_gemm(model)
    integer_biases(model)
    weights_of_float_layers(model)
    requantized_gates(model)
    keep_float(model)
    mean_to_pool(model)
    strip(model)
    drop_default_attributes(model)
    merge_equal_initializers(model)
    own_int8(model)
    remove_unused(model)
    narrow_integers(model)
    shorten_names(model, inputs)
    return model


def name_layers(model: ModelProto) -> None:
    """Name convolutions and matrix products by the module that made them, from the exporter's metadata, and the
    quantisers of activations by their place.

    Other nodes lose their names. ``layers.0.conv1``, and ``layers.0.conv1:2`` for the second one that a module makes.
    """
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
        path = _innermost_module(scopes)
        if node.op_type not in NAMED:
            node.name = _place(scopes) if node.op_type == "QuantizeLinear" else ""
            continue
        path = path or node.name
        seen[path] += 1
        node.name = path if seen[path] == 1 else f"{path}:{seen[path]}"


def _innermost_module(scopes: str) -> str:
    """``"['', 'layers', 'layers.0', 'conv2d']"`` → ``"layers.0"``: the last entry is the call itself."""
    names = _names(scopes)
    return names[-2] if len(names) > 1 else ""


def _place(scopes: str) -> str:
    """``"['', 'layers.0', 'layers.0.tersor_taps.taps.conv2d_0', '_symbolic']"`` → ``"layers.0:conv2d[0]"``; "" of what
    is no tap."""
    *_, module, path, _ = ["", "", *_names(scopes)]
    owner, found, key = path.rpartition("taps.")
    operator, _, ordinal = key.rpartition("_")
    is_tap = found and (not owner or owner.endswith(f"{CHILD}.")) and ordinal.isdigit()
    return str(ActivationPlace(module, operator, int(ordinal))) if is_tap else ""


def _names(scopes: str) -> list[str]:
    return [part.strip().strip("'\"") for part in scopes.strip("[] ").split(",")]


def constants_to_initializers(model: ModelProto) -> None:
    """Constant nodes become initialisers, which other passes and the runtime share and fold."""
    graph = model.graph
    for node in [n for n in graph.node if n.op_type == "Constant" and not n.domain]:
        value = next((a for a in node.attribute if a.name == "value"), None)
        if value is None:
            continue
        tensor = TensorProto()
        tensor.CopyFrom(value.t)
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)


def remove_no_ops(model: ModelProto) -> None:
    """Take out Identity, inference-time Dropout, and Clips that clip nothing (integers to their own type's range)."""
    graph = model.graph
    constants = constants_of(graph)
    results = {output.name for output in graph.output}
    renamed: dict[str, str] = {}
    keep: list[NodeProto] = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        no_op = node.op_type in {"Identity", "Dropout"} or (node.op_type == "Clip" and _clips_nothing(node, constants))
        if no_op and not any(output in results for output in node.output):
            renamed[node.output[0]] = node.input[0]
        else:
            keep.append(node)
    set_nodes(graph, keep)


def _clips_nothing(node: NodeProto, constants: dict[str, TensorProto]) -> bool:
    bounds = [numpy_helper.to_array(constants[name]) for name in node.input[1:] if name in constants]
    if len(bounds) != 2 or bounds[0].dtype.kind not in "iu":
        return False
    full = np.iinfo(bounds[0].dtype)
    return int(bounds[0]) == full.min and int(bounds[1]) == full.max


def mean_to_pool(model: ModelProto) -> None:
    """ReduceMean over all spatial axes becomes GlobalAveragePool, which ONNX Runtime also has in integers.

    Without ``keepdims`` a Flatten follows: after the QuantizeLinear if one is there (so that pool and quantiser stay
    neighbours, and quantiser and whatever comes next).
    """
    graph = model.graph
    constants, users, shapes = constants_of(graph), users_of(graph), shapes_of(graph)
    nodes: list[NodeProto] = []
    unflat: set[str] = set()
    for node in graph.node:
        if node.op_type == "ReduceMean" and _is_spatial(node, constants, shapes):
            keepdims = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
            readers = users[node.output[0]]
            node = helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output))
            if not keepdims:
                quantized = len(readers) == 1 and readers[0].op_type == "QuantizeLinear"
                unflat.add(readers[0].output[0] if quantized else node.output[0])
        nodes.append(node)
        if node.output[0] in unflat:
            flat, node.output[0] = node.output[0], f"{node.output[0]}/unflat"
            nodes.append(helper.make_node("Flatten", [node.output[0]], [flat], axis=1))
    set_nodes(graph, nodes)


def _is_spatial(node: NodeProto, constants: dict[str, TensorProto], shapes: dict[str, list[int | None]]) -> bool:
    rank = len(shapes.get(node.input[0], ()))
    if rank not in (3, 4, 5) or len(node.input) < 2 or node.input[1] not in constants:
        return False
    axes = {int(axis) % rank for axis in numpy_helper.to_array(constants[node.input[1]]).reshape(-1)}
    return axes == set(range(2, rank))


def strip(model: ModelProto) -> None:
    """Drop what the exporter notes for people: metadata, doc strings, intermediate shapes; the producer is Tersor."""
    graph = model.graph
    del model.metadata_props[:], model.functions[:]
    del graph.metadata_props[:], graph.value_info[:], graph.quantization_annotation[:]
    model.doc_string = graph.doc_string = model.domain = ""
    model.producer_name, model.producer_version, graph.name = "tersor", "", "main"
    for thing in [*graph.node, *graph.input, *graph.output, *graph.initializer]:
        del thing.metadata_props[:]
        thing.doc_string = ""


def drop_default_attributes(model: ModelProto) -> None:
    """Attributes that repeat their operator's default say nothing."""
    version = next(entry.version for entry in model.opset_import if entry.domain == "")
    for node in model.graph.node:
        if node.domain:
            continue
        defaults = {
            name: attribute.default_value
            for name, attribute in defs.get_schema(node.op_type, version, "").attributes.items()
            if attribute.default_value.type != AttributeProto.UNDEFINED
        }
        kept = [
            attribute
            for attribute in node.attribute
            if attribute.name not in defaults
            or helper.get_attribute_value(attribute) != helper.get_attribute_value(defaults[attribute.name])
        ]
        del node.attribute[:]
        node.attribute.extend(kept)


def merge_equal_initializers(model: ModelProto) -> None:
    """One initialiser for all that hold the same bytes (tied weights, zero points, shapes)."""
    graph = model.graph
    first: dict[tuple[object, ...], str] = {}
    renamed: dict[str, str] = {}
    outputs = {output.name for output in graph.output}
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        key = tensor.data_type, tuple(tensor.dims), hashlib.sha256(array.tobytes()).digest()
        name = first.setdefault(key, tensor.name)
        if name != tensor.name and tensor.name not in outputs:
            renamed[tensor.name] = name
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def remove_unused(model: ModelProto) -> None:
    """Nodes whose results nobody reads, and initialisers that no node reads."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    keep: list[NodeProto] = []
    for node in reversed(graph.node):
        if any(output in needed for output in node.output):
            keep.append(node)
            needed.update(read_names(node))
    set_nodes(graph, keep[::-1])
    used = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(used)


def shorten_names(model: ModelProto, inputs: Sequence[str] = ()) -> None:
    """Inner values get names of a letter or two; outputs become ``output``, or ``output_0`` …; inputs as said."""
    graph = model.graph
    if any(has_subgraph(node) for node in graph.node):
        return  # values of the outer graph may be read inside: leave the names alone
    constants = constants_of(graph)
    old = [value.name for value in graph.input]
    new = dict(zip(old, [*inputs, *old[len(inputs) :]], strict=False))
    for number, value in enumerate(graph.output):
        if value.name in new or value.name in constants:  # an input, a constant or another output passed through
            graph.node.append(helper.make_node("Identity", [value.name], [f"{value.name}/{number}"]))
            value.name = f"{value.name}/{number}"
        new[value.name] = "output" if len(graph.output) == 1 else f"output_{number}"
    fresh = (name for name in _short_names() if name not in new.values())
    for name in [*constants, *(output for node in graph.node for output in node.output if output)]:
        if name not in new:
            new[name] = next(fresh)
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for thing in [*graph.input, *graph.output, *graph.initializer]:
        thing.name = new.get(thing.name, thing.name)


def _short_names() -> Iterator[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    number = 0
    while True:
        name, rest = "", number
        while True:
            name = letters[rest % 26] + name
            rest = rest // 26 - 1
            if rest < 0:
                break
        yield name
        number += 1
