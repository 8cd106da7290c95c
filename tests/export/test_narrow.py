import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tersor.core.task import Task
from tersor.export.narrow import narrow_integers
from tersor.export.onnx import export_onnx
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int
from tersor.zoo.batches import TensorBatches


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 15, 3, padding=1), nn.Conv2d(15, 33, 3, padding=1), nn.Linear(33, 10)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    batches = TensorBatches(torch.rand(32, 3, 8, 8), torch.arange(32) % 10, 16)
    return Task(Net().eval(), batches, batches, batches).complete()


def exported(task, bits, path):
    quantised = Quantize(weights=Int(bits), learn=False).run(task.model, task).model
    return quantised, export_onnx(quantised, task.example_inputs, path)


def run(path, x, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    session = onnxruntime.InferenceSession(path, options)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_weights_of_few_bits_take_half_a_byte_and_give_the_same_numbers(task, bits, level, tmp_path):
    quantised, file = exported(task, bits, tmp_path / "few.onnx")
    model = onnx.load(file.path)
    stored = {t.name: (t.data_type, tuple(t.dims), len(t.raw_data)) for t in model.graph.initializer if len(t.dims) > 1}
    kinds = sorted(kind for kind, *_ in stored.values())
    assert kinds == [TensorProto.INT4] * 3 and {np.prod(dims) % 2 for _, dims, _ in stored.values()} == {0, 1}
    assert all(size == (np.prod(dims) + 1) // 2 for _, dims, size in stored.values())
    onnx.checker.check_model(model, full_check=True)
    x = task.calibration.images
    with torch.no_grad():
        expected = quantised(x).numpy()
    np.testing.assert_allclose(
        run(file.path, x, getattr(onnxruntime.GraphOptimizationLevel, level)), expected, atol=1e-6
    )


def test_kernels_stay_those_of_eight_bits(task, tmp_path):
    operators = []
    for bits in (4, 8):
        _, file = exported(task, bits, tmp_path / f"{bits}.onnx")
        run(file.path, task.calibration.images, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
        graph = onnx.load(file.path.with_suffix(".optimised.onnx")).graph
        operators.append(sorted(node.op_type for node in graph.node))
    assert operators[0] == operators[1] and operators[0].count("QLinearConv") == 2
    assert not any("Cast" in names for names in operators)


def test_weights_of_eight_bits_stay_in_eight_and_in_their_operator_set(task, tmp_path):
    _, file = exported(task, 8, tmp_path / "eight.onnx")
    kinds = {tensor.data_type for tensor in onnx.load(file.path).graph.initializer if len(tensor.dims) > 1}
    assert kinds == {TensorProto.INT8} and file.opset == 20


@pytest.mark.parametrize(
    "dtype, low, high, stored",
    [
        ("int8", -8, 7, TensorProto.INT4), ("int8", -9, 7, TensorProto.INT8), ("int8", -8, 8, TensorProto.INT8),
        ("uint8", 0, 15, TensorProto.UINT4), ("uint8", 0, 16, TensorProto.UINT8),
    ],
)  # fmt: skip
def test_only_what_fits_four_bits_is_narrowed_and_its_readers_get_the_same_numbers(dtype, low, high, stored):
    random = np.random.default_rng(0)
    weights = random.integers(low, high, (17, 33), endpoint=True).astype(dtype)
    weights[0, :2] = low, high
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["real"]),
        helper.make_node("MatMul", ["x", "real"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, size]) for name, size in (("x", 17), ("y", 33)))
    graph = helper.make_graph(nodes, "one", [x], [y], [numpy_helper.from_array(weights, "w"), scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    values = random.standard_normal((2, 17)).astype(np.float32)

    def computed():
        return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": values})[0]

    before = computed()
    narrow_integers(model)
    onnx.checker.check_model(model)
    assert model.graph.initializer[0].data_type == stored
    assert np.array_equal(computed(), before)
