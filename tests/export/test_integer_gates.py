"""Sigmoid, hard sigmoid and their products in ONNX Runtime's integers."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tersor.core.task import Task
from tersor.export.gates import requantized_gates
from tersor.export.onnx import export_onnx
from tersor.export.verify import operator_histogram
from tersor.quantize.quantize import Quantize


class Excite(nn.Module):
    def __init__(self, width, activation, gate):
        super().__init__()
        self.squeeze, self.act, self.excite = nn.Conv2d(width, 4, 1), activation(), nn.Conv2d(4, width, 1)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), gate()

    def forward(self, x):
        return x * self.gate(self.excite(self.act(self.squeeze(self.pool(x)))))


def network():
    """Depthwise blocks with squeeze-and-excitation, one as in EfficientNet and one as in MobileNet-v3."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(),
        Excite(8, nn.SiLU, nn.Sigmoid), nn.Conv2d(8, 12, 1), nn.Hardswish(inplace=True),
        nn.Conv2d(12, 12, 3, groups=12), nn.Hardswish(), Excite(12, nn.ReLU, nn.Hardsigmoid),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16), nn.Hardswish(), nn.Linear(16, 5),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= 1.5
    return model.eval()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """(file, quantised model, inputs)."""
    model, x = network(), 2 * torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    data = [(x, model(x).argmax(-1))]
    task = Task(model, data, data, data, example_inputs=(x[:2],)).complete()
    quantized = Quantize(learn=False).run(model, task).model.eval()
    path = tmp_path_factory.mktemp("onnx") / "gates.onnx"
    export_onnx(quantized, (x[:2],), path)
    return path, quantized, x


def test_gates_products_and_poolings_run_in_integers(deployed):
    histogram = operator_histogram(deployed[0])
    expected = {
        "QLinearConv": 8, "QLinearSigmoid": 4, "QLinearAdd": 4, "QLinearMul": 8, "QLinearGlobalAveragePool": 3,
        "QGemm": 2, "QuantizeLinear": 1, "DequantizeLinear": 1,
    }  # fmt: skip
    moving = {"Transpose", "Reshape", "Flatten"}
    assert {name: n for name, n in histogram.items() if name not in moving} == expected


@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"])
def test_the_file_gives_what_pytorch_gives_however_much_the_runtime_optimises(level, deployed):
    path, model, x = deployed
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    with torch.no_grad():
        steps = (got - model(x)).abs() / float(model[14].tersor_taps.taps["linear_0"].scale)
    assert (steps <= 1.01).float().mean() >= 0.99


def gate_file(scale, zero, alpha=1 / 6, kind=np.uint8):
    """A gate between integers, as the exporter writes it."""
    make, numbers = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [
        make("QuantizeLinear", ["input", "s", "z"], ["q"]),
        make("DequantizeLinear", ["q", "s", "z"], ["x"]),
        make("HardSigmoid", ["x"], ["h"], alpha=alpha, beta=0.5),
        make("QuantizeLinear", ["h", "gs", "gz"], ["gq"]),
        make("DequantizeLinear", ["gq", "gs", "gz"], ["output"]),
    ]
    middle = 0 if kind == np.int8 else 128
    values = {"s": np.float32(0.04), "z": kind(middle), "gs": np.float32(scale), "gz": kind(zero)}
    floats = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in ("input", "output")]
    given = [numbers(np.asarray(value), name) for name, value in values.items()]
    graph = onnx.helper.make_graph(nodes, "main", floats[:1], floats[1:], given)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


def outputs(model):
    x = np.linspace(-6, 6, 2001, dtype=np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]


@pytest.mark.parametrize(("zero", "alpha", "kind"), [(0, 1 / 6, np.uint8), (0, 0.2, np.uint8), (-128, 1 / 6, np.int8)])
def test_the_change_of_grid_is_the_gate_in_every_integer(zero, alpha, kind):
    model = gate_file(1 / 256, zero, alpha, kind)
    before = outputs(model)
    requantized_gates(model)
    assert "HardSigmoid" not in {node.op_type for node in model.graph.node}
    assert np.array_equal(outputs(model), before)


@pytest.mark.parametrize(
    ("scale", "zero", "kind"),
    [(1 / 255, 0, np.uint8), (1 / 200, 0, np.uint8), (1 / 256, 3, np.uint8), (1 / 256, 0, np.int8)],
)
def test_a_gate_on_another_grid_stays_what_it_is(scale, zero, kind):
    model = gate_file(scale, zero, kind=kind)
    before = model.SerializeToString()
    requantized_gates(model)
    assert model.SerializeToString() == before
