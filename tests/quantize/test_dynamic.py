"""Linear layers in integers without calibration: what is planned, what it computes, what ONNX Runtime runs."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.dynamic_quantize import DynamicQuantize
from tersor.core.edit import edit_from_json, edit_to_json
from tersor.core.errors import InputError
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, save_artifact
from tersor.export.onnx import export_onnx
from tersor.export.verify import integer_share, operator_histogram, verify_onnx
from tersor.quantize.dynamic import QuantizeDynamically
from tersor.quantize.unquantized import without_quantizers


class Net(nn.Module):
    """Two layers read one tensor; a call of a function reads what a view made; a convolution before them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.a, self.b = nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.c = nn.Parameter(0.05 * torch.randn(5, 8 * 24))

    def forward(self, x):
        x = torch.tanh(self.conv(x))
        return nn.functional.linear((torch.relu(self.a(x)) * self.b(x)).flatten(1), self.c) + x.mean((1, 2))[:, None]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().eval()
    inputs = torch.randn(64, 4, 16)
    with torch.no_grad():
        data = [(inputs, model(inputs).argmax(1))]
    return model, Task(model, data, data, data, example_inputs=(inputs[:2],)).complete()


def naive(x):
    """DynamicQuantizeLinear and back, as the operator's definition has it."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_a_tensor_is_rounded_between_its_own_extremes(shift):
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)) + shift
    torch.testing.assert_close(DynamicQuantize()(x), torch.from_numpy(naive(x.numpy())).float())
    assert DynamicQuantize()(torch.zeros(3)).tolist() == [0, 0, 0]


def test_gradients_pass_straight_through():
    x = torch.randn(9, requires_grad=True)
    (DynamicQuantize()(x) * torch.arange(9.0)).sum().backward()
    assert x.grad.tolist() == list(range(9))


def test_each_layer_rounds_what_it_is_given_and_a_function_what_was_made_for_it(net):
    model, task = net
    plan = QuantizeDynamically().plan(model, task)
    activations = [str(edit.places[0]) for edit in plan.edits if edit.dynamic]
    assert activations == ["a:input[0]", "b:input[0]", "<model>:mul[0]"]
    assert [str(edit.places[0]) for edit in plan.edits if not edit.dynamic] == ["a.weight", "b.weight", "c"]
    assert [skip.place for skip in plan.skips] == ["conv"]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        states, _ = self.lstm(x)
        return self.head(torch.einsum("btc,bt->bc", states, x.mean(-1)))


def test_what_else_multiplies_is_said_and_a_weight_that_is_not_finite_is_refused():
    model, x = Reader().eval(), torch.randn(2, 5, 4)
    plan = QuantizeDynamically().plan(model, Task(model, example_inputs=(x,)))
    assert [skip.place for skip in plan.skips] == ["lstm:lstm[0]", "<model>:einsum[0]"]
    assert plan.skips[0].reason == "stays float: lstm is no linear layer"
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"head.weight: a weight that is not finite has no range. Got 1 NaN"):
        QuantizeDynamically().plan(model, Task(model, example_inputs=(x,)))


def test_the_file_runs_in_integers_and_gives_what_pytorch_gives(net, tmp_path):
    model, task = net
    rounded = QuantizeDynamically().run(model, task).model.eval()
    file = export_onnx(rounded, task.example_inputs, tmp_path / "model.onnx")
    histogram = operator_histogram(file.path)
    fused = histogram.get("DynamicQuantizeMatMul", 0) + histogram.get("MatMulIntegerToFloat", 0)
    assert fused == 3 and not {"MatMul", "Gemm", "DequantizeLinear"} & set(histogram)
    assert integer_share(file.path)["float_layers"] == ["conv"]
    facts = verify_onnx(file.path, rounded, task, quantized=True)
    assert facts["relative_error"] < 1e-3 and facts["equal"]
    x = torch.randn(64, 4, 16, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected, was = rounded(x), model(x)
    got = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    assert (got - expected).norm() < 0.1 * (was - expected).norm() < 0.1 * 0.05 * expected.norm()


def test_an_artifact_brings_the_dynamic_quantisers_back(net, tmp_path):
    model, task = net
    plan = QuantizeDynamically().plan(model, task)
    rounded = apply(model, plan).eval()
    save_artifact(tmp_path / "saved", rounded, original=model, plans=(plan,))
    again = load_artifact(tmp_path / "saved", Net()).eval()
    x = torch.randn(3, 4, 16)
    assert torch.equal(again(x), rounded(x))


def test_a_model_without_its_quantisers_is_the_one_before(net):
    model, task = net
    rounded = apply(model, QuantizeDynamically().plan(model, task))
    x = torch.randn(3, 4, 16)
    assert not torch.equal(rounded.eval()(x), model(x))
    assert torch.equal(without_quantizers(rounded)(x), model(x))


def test_a_dynamic_quantiser_is_saved_as_such_and_stands_on_no_weight(net):
    model, task = net
    edit = QuantizeDynamically().plan(model, task).edits[0]
    said = edit_to_json(edit, "edit", {})
    assert said["dynamic"] and edit_from_json(said, {}).dynamic
    with pytest.raises(InputError, match="grid of its own"):
        apply(model, Plan("by hand", (replace(edit, places=(TensorPlace("a", "weight"),)),)))


def test_what_where_leaves_out_stays_and_what_is_quantised_is_refused(net):
    model, task = net
    plan = QuantizeDynamically(where=ByName("b")).plan(model, task)
    assert [str(edit.places[0]) for edit in plan.edits] == ["b:input[0]", "b.weight"]
    with pytest.raises(InputError, match="quantised already"):
        QuantizeDynamically().plan(apply(model, plan), task)
