"""Weights alone as integers: the file's kernels, and the numbers that they compute with."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Quantizer
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.export import few_bits
from tersor.export.onnx import export_onnx
from tersor.export.verify import integer_share, operator_histogram
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int


def model_of(nodes, constants, x, y):
    graph = helper.make_graph(
        nodes, "test", [helper.make_tensor_value_info("x", *x)], [helper.make_tensor_value_info("y", *y)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def stored(model, name):
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


def linear(integers, scale, zero, inputs, bias):
    """x · wᵀ + bias with w = (integers − zero) · scale, each row of ``integers`` a group of a row of w."""
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=0),
        helper.make_node("Reshape", ["d", "shape"], ["w"]),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["m"], name="fc"),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    constants = {"q": integers, "s": scale, "z": zero, "shape": np.array([-1, inputs]), "b": bias}
    constants["shape"][0] = integers.size // inputs
    return model_of(nodes, constants, (TensorProto.FLOAT, [2, 3, inputs]), (TensorProto.FLOAT, [2, 3, len(bias)]))


def some_linear(bits, signed, size, groups, seed=0):
    random = np.random.default_rng(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    kind = np.int8 if signed else np.uint8
    runs, rows = 6 * groups, 6
    integers = random.integers(low, high, (runs, size)).astype(kind)
    zero = np.zeros(runs, kind) if signed else random.integers(low, high, runs).astype(kind)
    scale = random.uniform(0.01, 0.1, runs).astype(np.float32)
    return linear(integers, scale, zero, groups * size, random.standard_normal(rows).astype(np.float32))


def weights_naively(node, model):
    """What MatMulNBits multiplies by, number by number."""
    said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    packed, scale = stored(model, node.input[1]), stored(model, node.input[2])
    zeros = stored(model, node.input[3]) if node.input[3] else None
    weight, bits = np.zeros((said["N"], said["K"]), np.float32), said["bits"]
    for row in range(said["N"]):
        for column in range(said["K"]):
            block, inside = divmod(column, said["block_size"])
            if bits == 8:
                number, zero = packed[row, block, inside], 128 if zeros is None else zeros[row, block]
            else:
                number = packed[row, block, inside // 2] >> 4 * (inside % 2) & 15
                zero = 8 if zeros is None else zeros[row, block // 2] >> 4 * (block % 2) & 15
            weight[row, column] = (float(number) - float(zero)) * scale[row, block]
    return weight


@pytest.mark.parametrize("bits, signed", [(4, True), (4, False), (8, True), (8, False), (3, True)])
@pytest.mark.parametrize("size, groups, block", [(16, 3, 16), (64, 2, 64), (48, 2, 16), (512, 2, 256), (40, 1, 32)])
def test_a_linear_layer_with_groups_becomes_matmulnbits_of_the_same_weights(bits, signed, size, groups, block):
    model = some_linear(bits, signed, size, groups)
    x = np.random.default_rng(1).standard_normal((2, 3, groups * size)).astype(np.float32)
    before, d = run(model, x), {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    expected = ((d["q"].astype(np.float32) - d["z"][:, None]) * d["s"][:, None]).reshape(6, -1)
    few_bits.products_of_few_bits(model)
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert (said["block_size"], said["bits"], said["accuracy_level"]) == (block, 8 if bits == 8 else 4, 4)
    assert node.name == "fc" and not {"MatMul", "Add"} & {other.op_type for other in model.graph.node}
    np.testing.assert_allclose(weights_naively(node, model), expected, rtol=1e-6)
    after = run(model, x)
    assert np.linalg.norm(after - before) < 0.02 * np.linalg.norm(before)  # the kernel rounds activations to int8


@pytest.mark.parametrize("scheme", [Int(4, group_size=16), Int(8, group_size=16, symmetric=False)])
def test_activations_that_are_rounded_already_are_not_rounded_again(scheme, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 7)).eval(), torch.randn(64, 64)
    rounded = Quantize(weights=scheme, learn=False).run(model, Task(model, calibration=[x])).model
    file = export_onnx(rounded, x[:2], tmp_path / "model.onnx")
    assert [node.op_type for node in onnx.load(file.path).graph.node].count("MatMulNBits") == 2
    session = onnxruntime.InferenceSession(file.path, providers=["CPUExecutionProvider"])
    got, expected = torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), rounded(x).detach()
    assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_groups_that_no_block_divides_stay_float_and_integers_in_the_file():
    model = some_linear(4, True, 24, 2)
    x = np.random.default_rng(1).standard_normal((2, 3, 48)).astype(np.float32)
    before = run(model, x)
    few_bits.products_of_few_bits(model)
    few_bits.weights_of_float_layers(model)
    operators = {node.op_type for node in model.graph.node}
    assert "MatMul" in operators and not {"MatMulNBits", "DequantizeLinear"} & operators
    assert stored(model, "q").dtype == np.int8
    np.testing.assert_allclose(run(model, x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_an_embedding_looks_up_integers(kind, groups):
    random = np.random.default_rng(0)
    limits = np.iinfo(kind)
    integers = random.integers(limits.min, limits.max, (20 * groups, 8)).astype(kind)
    zero = (
        random.integers(limits.min, limits.max, 20 * groups).astype(kind)
        if kind == np.uint8
        else np.zeros(20 * groups, kind)
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=0),
        helper.make_node("Reshape", ["d", "shape"], ["w"]),
        helper.make_node("Gather", ["w", "x"], ["y"]),
    ]
    scale = random.uniform(0.01, 0.1, 20 * groups).astype(np.float32)
    constants = {"q": integers, "s": scale, "z": zero, "shape": np.array([20, 8 * groups])}
    model = model_of(nodes, constants, (TensorProto.INT64, [2, 5]), (TensorProto.FLOAT, [2, 5, 8 * groups]))
    ids = random.integers(0, 20, (2, 5))
    before = run(model, ids)
    few_bits.look_up_integers(model)
    assert "DequantizeLinear" not in [node.op_type for node in model.graph.node if node.output[0] in _read(model)]
    np.testing.assert_allclose(run(model, ids), before, rtol=1e-6)


def _read(model):
    """What is needed for the output."""
    needed = {"y"}
    for node in reversed(model.graph.node):
        if set(node.output) & needed:
            needed |= set(node.input)
    return needed


class Mixed(nn.Module):
    """A transformer's kinds of weights, and a convolution."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(50, 64), nn.Conv1d(64, 64, 3, padding=1)
        self.wide, self.narrow = nn.Linear(64, 96), nn.Linear(96, 32, bias=False)

    def forward(self, ids):
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return self.narrow(torch.relu(self.wide(x))).mean(1)


def grid(path, weight, bits, group_size=None):
    rows = weight.detach().reshape(len(weight), -1)
    runs = rows if group_size is None else rows.reshape(len(rows), -1, group_size)
    scale = runs.abs().amax(-1) / (2 ** (bits - 1) - 1)
    zeros = torch.zeros(scale.shape, dtype=torch.int32)
    half = 2 ** (bits - 1)
    return Quantizer(
        (TensorPlace(path, "weight"),), scale, zeros, -half, half - 1, axis=0, learn=False, group_size=group_size
    )


def test_a_model_of_weights_in_few_bits_is_exported_and_small(tmp_path):
    torch.manual_seed(0)
    model = Mixed().eval()
    ids = torch.randint(0, 50, (4, 7))
    edits = (
        grid("table", model.table.weight, 8), grid("conv", model.conv.weight, 8),
        grid("wide", model.wide.weight, 4, 32), grid("narrow", model.narrow.weight, 4, 96),
    )  # fmt: skip
    rounded = apply(model, Plan("by hand", edits)).eval()
    file = export_onnx(rounded, (ids[:2],), tmp_path / "model.onnx")
    histogram = operator_histogram(file.path)
    assert histogram["MatMulNBits"] == 2 and not {"DequantizeLinear", "MatMul", "Gemm"} & set(histogram)
    assert integer_share(file.path)["float_layers"] == ["conv"]
    bytes_of = {"table": 50 * 64, "conv": 64 * 64 * 3, "wide": 64 * 96 / 2 * 1.25, "narrow": 96 * 32 / 2 * 1.25}
    assert file.size_bytes < sum(bytes_of.values()) + 4 * (50 + 64 + 64 + 96) + 3000
    got = torch.from_numpy(_run(file.path, ids))
    with torch.no_grad():
        expected = rounded(ids)
    assert (got - expected).norm() < 0.02 * expected.norm()


def _run(path, ids):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]


def test_a_table_of_many_rows_is_stored_as_integers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10_000, 16), nn.Linear(16, 2)).eval()
    rounded = apply(model, Plan("by hand", (grid("0", model[0].weight, 8),)))
    ids = torch.randint(10_000, (2, 5))
    file = export_onnx(rounded, (ids,), tmp_path / "model.onnx")
    assert file.size_bytes < 10_000 * (16 + 4) + 4_000  # an int8 for each number, a scale for each row
    assert {"QuantizeLinear", "DequantizeLinear"}.isdisjoint(operator_histogram(file.path))
    np.testing.assert_allclose(_answer(file.path, ids), rounded(ids).detach(), atol=1e-5)


def _answer(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})[0]
