"""Each pass on a graph of a few nodes, the runtime's answer before and after being the reference."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tersor.export import passes


def model_of(nodes, initializers, inputs, outputs):
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def run(model, *arrays):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: array for value, array in zip(session.get_inputs(), arrays, strict=True)})


def operators(model):
    return [node.op_type for node in model.graph.node]


def initializer(model, name):
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


def weight_quantizer(weight, scale, zero, low=-128, high=127):
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0),
        helper.make_node("Clip", ["q", "low", "high"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["d"], axis=0),
        helper.make_node("Mul", ["x", "d"], ["y"]),
    ]
    constants = {"w": weight, "s": scale, "z": zero, "low": np.int8(low), "high": np.int8(high)}
    return model_of(nodes, {k: np.asarray(v) for k, v in constants.items()}, {"x": [2, 5]}, {"y": [2, 5]})


def test_weights_are_rounded_half_to_even_and_clipped_per_channel():
    weight = np.array([[0.5, 1.5, 2.5, -0.5, 500], [0.25, 0.75, 1.25, -0.75, -500]], dtype=np.float32)
    model = weight_quantizer(weight, np.array([1, 0.5], dtype=np.float32), np.zeros(2, dtype=np.int8))
    x = np.ones((2, 5), dtype=np.float32)
    before = run(model, x)
    passes.fold_weight_quantizers(model)
    assert operators(model) == ["DequantizeLinear", "Mul"]
    assert initializer(model, "c").tolist() == [[0, 2, 2, 0, 127], [0, 2, 2, -2, -128]]
    assert np.array_equal(run(model, x)[0], before[0])


def test_a_narrower_range_is_kept_in_the_integers():
    weight = np.array([[100, -100, 3, -3, 0]] * 2, dtype=np.float32)
    model = weight_quantizer(weight, np.ones(2, dtype=np.float32), np.zeros(2, dtype=np.int8), -8, 7)
    passes.ship(model)
    assert operators(model) == ["Cast", "Mul", "Mul"]  # the layer computes in float: its weight is stored as integers
    stored = next(numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) == 2)
    assert stored[0].tolist() == [7, -8, 3, -3, 0]


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_spatial_mean_becomes_a_pool(keepdims, axes):
    out = [2, 3, 1, 1] if keepdims else [2, 3]
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)]
    model = model_of(nodes, {"axes": np.array(axes)}, {"x": [2, 3, 4, 5]}, {"y": out})
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    before = run(model, x)[0]
    passes.mean_to_pool(model)
    assert operators(model) == ["GlobalAveragePool"] + ["Flatten"] * (1 - keepdims)
    np.testing.assert_allclose(run(model, x)[0], before, rtol=1e-5, atol=1e-6)


def test_a_mean_over_other_axes_is_left_alone():
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)]
    model = model_of(nodes, {"axes": np.array([1, 2])}, {"x": [2, 3, 4, 5]}, {"y": [2, 5]})
    passes.mean_to_pool(model)
    assert operators(model) == ["ReduceMean"]


def test_no_ops_go_but_a_passed_through_input_stays_an_output():
    nodes = [
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Identity", ["b"], ["y"]),
        helper.make_node("Identity", ["x"], ["same"]),
    ]
    model = model_of(nodes, {}, {"x": [3]}, {"y": [3], "same": [3]})
    passes.ship(model)
    x = np.array([-1, 0, 2], dtype=np.float32)
    assert operators(model) == ["Relu", "Identity", "Identity"]
    assert [value.tolist() for value in run(model, x)] == [[0, 0, 2], [-1, 0, 2]]


def test_a_clip_that_clips_stays():
    nodes = [helper.make_node("Clip", ["x", "low", "high"], ["y"])]
    model = model_of(nodes, {"low": np.float32(0), "high": np.float32(6)}, {"x": [3]}, {"y": [3]})
    passes.ship(model)
    assert operators(model) == ["Clip"]


def test_equal_tensors_are_stored_once_and_unused_ones_not_at_all():
    same = np.arange(4, dtype=np.float32)
    nodes = [helper.make_node("Add", ["x", "p"], ["a"]), helper.make_node("Mul", ["a", "q"], ["y"])]
    constants = {"p": same, "q": same.copy(), "like": same.astype(np.int32), "unused": np.ones(9, dtype=np.float32)}
    model = model_of(nodes, constants, {"x": [4]}, {"y": [4]})
    passes.ship(model)
    assert len(model.graph.initializer) == 1
    assert run(model, same)[0].tolist() == [0, 2, 8, 18]


def test_attributes_that_repeat_the_default_go_and_others_stay():
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], alpha=1.0, beta=1.0, transA=0, transB=1)]
    model = model_of(nodes, {"w": np.eye(3, dtype=np.float32)}, {"x": [2, 3]}, {"y": [2, 3]})
    passes.drop_default_attributes(model)
    assert [attribute.name for attribute in model.graph.node[0].attribute] == ["transB"]


def test_short_names_are_distinct_even_beside_an_input_that_has_one():
    nodes, last = [], "a"
    for number in range(800):
        nodes.append(helper.make_node("Relu", [last], [f"value_{number}"]))
        last = f"value_{number}"
    model = model_of(nodes, {}, {"a": [2]}, {last: [2]})
    passes.shorten_names(model)
    onnx.checker.check_model(model)
    assert model.graph.input[0].name == "a" and model.graph.output[0].name == "output"
    assert run(model, np.array([-1, 1], dtype=np.float32))[0].tolist() == [0, 1]
