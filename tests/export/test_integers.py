"""Passes for quantised files on graphs of a few nodes: the answer stays, and the runtime finds its integer kernels."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tersor.export import integers, passes, uniform


def model_of(nodes, constants, x, y, shapes=()):
    graph = helper.make_graph(
        nodes, "test", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
        value_info=[helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in shapes],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def run(model, x, folder=None):
    """The answer, and the operators of the graph that the runtime makes of the model."""
    options = onnxruntime.SessionOptions()
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimised.onnx")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result = session.run(None, {"x": x})[0]
    return result if folder is None else (result, operators(onnx.load(options.optimized_model_filepath)))


def operators(model):
    return [node.op_type for node in model.graph.node]


X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
GRID = {"s": np.float32(0.02), "z": np.uint8(128), "s2": np.float32(0.05), "z2": np.uint8(120)}
SEEN = [("m", TensorProto.FLOAT, ["batch", 3, 4])]


def linear(result_rounded):
    """x · wᵀ + b on the exporter's pattern, x and w rounded."""
    random = np.random.default_rng(1)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["dw"], axis=0),
        helper.make_node("Transpose", ["dw"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["d", "t"], ["m"], name="fc"),
        helper.make_node("Add", ["m", "b"], ["a" if result_rounded else "y"]),
    ]
    if result_rounded:
        nodes.append(helper.make_node("QuantizeLinear", ["a", "s2", "z2"], ["q2"], name="fc:linear[0]"))
        nodes.append(helper.make_node("DequantizeLinear", ["q2", "s2", "z2"], ["y"]))
    constants = GRID | {
        "w": random.integers(-128, 128, (4, 8)).astype(np.int8), "sw": random.uniform(0.01, 0.02, 4).astype(np.float32),
        "zw": np.zeros(4, np.int8), "b": random.standard_normal(4).astype(np.float32),
    }  # fmt: skip
    return model_of(nodes, constants, ["batch", 3, 8], ["batch", 3, 4], SEEN)


@pytest.mark.parametrize("result_rounded", [True, False])
def test_a_linear_layer_on_three_axes_is_one_integer_kernel(result_rounded, tmp_path):
    model = linear(result_rounded)
    before = run(model, X)
    integers.linears_to_gemm(model)
    integers.integer_biases(model)
    onnx.checker.check_model(model)
    after, ran = run(model, X, tmp_path)
    assert "QGemm" in ran and not {"MatMulIntegerToFloat", "Gemm", "MatMul", "Add"} & set(ran)
    names = {node.op_type: node.name for node in model.graph.node if node.name}
    assert names == {"Gemm": "fc"} | ({"QuantizeLinear": "fc:linear[0]"} if result_rounded else {})
    # half a step of the bias in each sum, and one of the result where that falls on the other side of a half
    assert np.abs(after - before).max() <= (0.0501 if result_rounded else 0.5 * 0.02 * 0.02 + 1e-6)


def test_biases_are_whole_steps_of_the_products():
    model = linear(False)
    integers.linears_to_gemm(model)
    integers.integer_biases(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    bias = next(value for value in constants.values() if value.dtype == np.int32)
    expected = [round(float(b) / (0.02 * float(s))) for b, s in zip(constants["b"], constants["sw"], strict=True)]
    assert np.abs(bias - expected).max() <= 1 and bias.any()


@pytest.mark.parametrize("operator, factor", [("Mul", 0.25), ("Div", 4.0)])
@pytest.mark.parametrize("others", [False, True])
def test_a_positive_factor_becomes_part_of_the_scale(operator, factor, others):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Transpose", ["d"], ["t"], perm=[0, 2, 1]),
        helper.make_node(operator, ["t", "f"], ["m"]),
        helper.make_node("Transpose", ["d" if others else "m"], ["o"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["m", "o"] if others else ["o", "m"], ["y"]),
    ]
    sides = [2, 8, 8] if others else [2, 3, 3]
    if others:
        nodes[4] = helper.make_node("Identity", ["d"], ["o"])
    model = model_of(nodes, GRID | {"f": np.float32(factor)}, [2, 3, 8], sides, [("t", TensorProto.FLOAT, [2, 8, 3])])
    before = run(model, X)
    integers.scales_into_dequantizers(model)
    assert operator not in operators(model)
    np.testing.assert_allclose(run(model, X), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [-0.5, 0.0])
def test_other_factors_stay(factor):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Mul", ["d", "f"], ["y"]),
    ]
    model = model_of(nodes, GRID | {"f": np.float32(factor)}, [2, 3, 8], [2, 3, 8])
    integers.scales_into_dequantizers(model)
    assert "Mul" in operators(model)


def float_weight(relu):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["c"], kernel_shape=[1]),
        *([helper.make_node("Relu", ["c"], ["r"])] if relu else []),
        helper.make_node("QuantizeLinear", ["r" if relu else "c", "s2", "z2"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "s2", "z2"], ["y"]),
    ]
    weight = np.random.default_rng(2).standard_normal((4, 3, 1)).astype(np.float32)
    weight[0] *= 100  # one scale for all would leave nothing of the others
    return model_of(nodes, GRID | {"w": weight}, [2, 3, 8], [2, 4, 8])


@pytest.mark.parametrize("relu", [False, True])
def test_a_layer_that_was_left_float_is_not_rounded_by_the_runtime(relu, tmp_path):
    model = float_weight(relu)
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), plain, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": X})[0]
    integers.keep_float(model)
    got, ran = run(model, X, tmp_path)
    assert "QLinearConv" not in ran
    np.testing.assert_allclose(got, expected, atol=0.0501)
    assert (got == expected).mean() > 0.95


def masked(value):
    """Scores under a mask that is expanded to the batch, as attention without a mask of the user's has it."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], end=1),
        helper.make_node("Concat", ["n", "one", "one"], ["size"], axis=0),
        helper.make_node("Expand", ["mask", "size"], ["e"]),
        helper.make_node("Not", ["e"], ["hidden"]),
        helper.make_node("Where", ["hidden", "low", "x"], ["w"]),
        helper.make_node("Where", ["e", "zero", "low"], ["added"]),
        helper.make_node("Add", ["w", "added"], ["a"]),
        helper.make_node("Softmax", ["a"], ["y"]),
    ]
    constants = {
        "mask": np.array(value).reshape(1, 1, -1),
        "one": np.array([1]),
        "low": np.float32(-1e9),
        "zero": np.float32(0),
    }
    shapes = [(name, TensorProto.FLOAT, ["batch", 3, 8]) for name in ("w", "a")]
    return model_of(nodes, constants, ["batch", 3, 8], ["batch", 3, 8], shapes)


def test_a_mask_that_hides_nothing_goes():
    model = masked([True])
    before = run(model, X)
    uniform.drop_uniform_masks(model)
    passes.remove_unused(model)
    assert [node.op_type for node in model.graph.node] == ["Softmax"]
    np.testing.assert_allclose(run(model, X), before, rtol=1e-6)


def test_a_mask_that_hides_something_stays():
    model = masked([True] * 7 + [False])
    before = run(model, X)
    uniform.drop_uniform_masks(model)
    assert operators(model).count("Where") == 2 and "Add" in operators(model)
    np.testing.assert_array_equal(run(model, X), before)


def test_a_side_that_would_have_to_be_broadcast_stays():
    nodes = [helper.make_node("Where", ["all", "row", "x"], ["w"]), helper.make_node("Neg", ["w"], ["y"])]
    constants = {"all": np.array([True]), "row": np.ones(8, np.float32)}
    model = model_of(nodes, constants, [2, 3, 8], [2, 3, 8], [("w", TensorProto.FLOAT, [2, 3, 8])])
    uniform.drop_uniform_masks(model)
    assert operators(model) == ["Where", "Neg"]
