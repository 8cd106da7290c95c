"""Export: the numbers stay, the file is small, and nothing else is touched."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.errors import GraphError, InputError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.export.onnx import export_onnx
from tersor.export.verify import integer_share, operator_histogram


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def test_a_float_file_gives_the_models_outputs_at_any_batch_size(learnt, make_images, tmp_path):
    model, inputs = learnt("Residual"), make_images(5, 7)[0]
    file = export_onnx(model, (inputs[:1],), tmp_path / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(run(file.path, inputs), model(inputs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(file.path, inputs[:1]), model(inputs[:1]), rtol=1e-4, atol=1e-5)
    assert (file.inputs, file.outputs) == (("input",), ("output",))
    assert file.size_bytes == file.path.stat().st_size


def test_a_fixed_batch_is_fixed(tmp_path):
    file = export_onnx(nn.Linear(3, 2), (torch.randn(4, 3),), tmp_path / "model.onnx", dynamic_batch=False)
    assert onnx.load(file.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


def test_export_leaves_the_model_the_folder_and_the_terminal_alone(tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, (torch.randn(2, 3),), Path("model.onnx"))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_every_layer_of_a_residual_network_runs_in_integers(files):
    path, _ = files("Residual", True)
    histogram = operator_histogram(path)
    transposes = histogram.pop("Transpose")  # to the runtime's channels-last layout and back
    assert transposes <= 2
    assert histogram == {
        "QLinearConv": 9, "QLinearAdd": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1, "Reshape": 1,
        "QuantizeLinear": 1, "DequantizeLinear": 1,
    }  # fmt: skip
    assert integer_share(path) == {"integer": 10, "total": 10, "share": 1.0, "float_layers": []}


def test_depthwise_convolutions_and_a_spatial_mean_run_in_integers(files):
    histogram = operator_histogram(files("Depthwise", True)[0])
    assert {name: histogram[name] for name in ("QLinearConv", "QLinearGlobalAveragePool", "QGemm", "Flatten")} == {
        "QLinearConv": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1, "Flatten": 1,
    }  # fmt: skip


def test_every_layer_of_a_perceptron_runs_in_integers(files):
    histogram = operator_histogram(files("Mlp", True)[0])
    assert histogram == {"QGemm": 3, "Flatten": 1, "QuantizeLinear": 1, "DequantizeLinear": 1} or histogram == {
        "QGemm": 3, "Reshape": 1, "QuantizeLinear": 1, "DequantizeLinear": 1
    }  # fmt: skip


def test_a_layer_that_stays_float_is_named(learnt, quantized, tmp_path):
    model = learnt("Mlp")
    _, plan = quantized(model)
    but_one = tuple(edit for edit in plan.edits if edit.places != (TensorPlace("5", "weight"),))
    file = export_onnx(apply(model, Plan("but one", but_one)), (torch.randn(2, 1, 8, 8),), tmp_path / "model.onnx")
    share = integer_share(file.path)
    assert share["float_layers"] == ["5"] and (share["integer"], share["total"]) == (2, 3)


def test_a_linear_layer_whose_result_is_not_rounded_runs_in_integers_too(learnt, quantized, make_images, tmp_path):
    _, plan = quantized(learnt("Mlp"))
    model = apply(learnt("Mlp"), Plan("all but the logits", plan.edits[:-1]))
    inputs = make_images(16, 3)[0]
    file = export_onnx(model, (inputs[:2],), tmp_path / "model.onnx")
    assert operator_histogram(file.path)["QGemm"] == 3
    with torch.no_grad():
        torch.testing.assert_close(run(file.path, inputs), model(inputs), rtol=0, atol=0.05)


def test_an_int8_file_takes_a_byte_for_each_parameter(models, quantized, tmp_path):
    torch.manual_seed(0)
    model = models["Residual"](48)
    parameters = sum(p.numel() for p in model.parameters())
    assert 0.6e6 < parameters < 0.8e6
    small = export_onnx(quantized(model)[0], (torch.randn(2, 1, 8, 8),), tmp_path / "int8.onnx")
    assert small.size_bytes < 1.03 * parameters


def test_a_float_file_holds_hardly_more_than_its_weights(files):
    path, model = files("Residual", False)
    assert path.stat().st_size < 4 * sum(p.numel() for p in model.parameters()) + 2500


def test_the_files_integers_are_those_of_the_fake_quantisers(learnt, quantized, files):
    original = learnt("Residual")
    plan = quantized(original)[1]
    stored = {
        tuple(tensor.dims): numpy_helper.to_array(tensor)
        for tensor in onnx.load(files("Residual", True)[0]).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    }
    scales = {edit.places[0]: edit.scale for edit in plan.edits if edit.axis == 0}
    for path in ("stem", "layers.1.short", "fc"):
        weight = original.get_submodule(path).weight.detach().numpy()
        scale = scales[TensorPlace(path, "weight")].numpy()
        naive = np.stack([np.rint(row / s).clip(-128, 127) for row, s in zip(weight, scale, strict=True)])
        assert np.array_equal(stored[weight.shape], naive.astype(np.int8))


@pytest.mark.parametrize("mask_first", [True, False])
def test_masks_are_zeros_in_the_file_and_cost_nothing(mask_first, learnt, quantized, make_images, tmp_path):
    original = learnt("Mlp")
    keep = torch.rand(32, 64, generator=torch.Generator().manual_seed(1)) > 0.5
    mask = Mask(TensorPlace("1", "weight"), keep)
    edits = quantized(original)[1].edits
    model = apply(original, Plan("both", (mask, *edits) if mask_first else (*edits, mask))).eval()
    inputs = make_images(64, 5)[0]
    file = export_onnx(model, (inputs[:2],), tmp_path / "model.onnx")
    weights = next(numpy_helper.to_array(t) for t in onnx.load(file.path).graph.initializer if list(t.dims) == [32, 64])
    assert weights.dtype == np.int8 and not weights[~keep.numpy()].any() and weights[keep.numpy()].any()
    assert operator_histogram(file.path)["QGemm"] == 3
    with torch.no_grad():
        assert (run(file.path, inputs).argmax(1) == model(inputs).argmax(1)).float().mean() > 0.95


def test_layers_keep_their_paths_and_the_exporters_notes_are_gone(files):
    model = onnx.load(files("Residual", False)[0])
    names = [node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert names[:3] == ["stem", "layers.0.conv1", "layers.0.conv2"] and names[-1] == "fc"
    assert not model.metadata_props and not model.graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_several_inputs_keep_their_names(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(6, 4)

        def forward(self, left, right):
            return self.a(left) + self.b(right), left

    left, right = torch.randn(3, 5), torch.randn(3, 6)
    file = export_onnx(Two().eval(), (left, right), tmp_path / "model.onnx")
    assert file.inputs == ("left", "right") and file.outputs == ("output_0", "output_1")


def test_the_only_input_may_be_a_bare_tensor(tmp_path):
    one = export_onnx(nn.Linear(3, 3), torch.randn(2, 3), str(tmp_path / "one.onnx"))
    other = export_onnx(nn.Linear(3, 3), (torch.randn(2, 3),), tmp_path / "other.onnx")
    assert dataclasses.replace(one, path=other.path) == other


def test_what_cannot_be_exported_is_refused_in_one_sentence(tmp_path, capfd):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match="Branch: the model cannot be exported"):
        export_onnx(Branch(), (torch.randn(2, 3),), tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"example_inputs\[0\].*Got list"):
        export_onnx(nn.Linear(3, 3), ([1, 2],), tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"Got dict; expected a tensor, or a tuple .* of a dict: its values"):
        export_onnx(nn.Linear(3, 3), {"x": torch.randn(2, 3)}, tmp_path / "model.onnx")
    with pytest.raises(GraphError, match="cannot be exported"):
        export_onnx(nn.Linear(4, 3), (torch.randn(2, 3),), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("low, high", [(-127, 127), (-8, 7), (0, 7)])
def test_a_range_narrower_than_its_type_is_kept(low, high, tmp_path):
    torch.manual_seed(0)
    narrow = Quantizer((TensorPlace("", "weight"),), torch.tensor(0.01), torch.tensor(0), low, high)
    model, x = apply(nn.Linear(3, 3), Plan("narrow", (narrow,))).eval(), torch.randint(-127, 128, (4, 3)).float()
    x[:, 0] = 127.0  # MatMulNBits rounds what it reads to 127 steps: these are on them
    file = export_onnx(model, (x,), tmp_path / "model.onnx")
    assert round(float(model.weight.max()) / 0.01) == high or high == 127
    torch.testing.assert_close(run(file.path, x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_quantised_file_loads_and_agrees_where_the_processor_lacks_vnni(files, make_images):
    path, model = files("Residual", True)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # uint8 weights instead of int8
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = make_images(5, 7)[0]
    (got,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), run(path, inputs), rtol=1e-3, atol=0.2)
