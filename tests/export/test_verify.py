"""The check of an exported file: it lets the right one pass and catches a wrong one."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tersor.core.errors import InputError, VerificationError
from tersor.core.task import Task
from tersor.export.onnx import export_onnx
from tersor.export.parting import partings
from tersor.export.verify import float_operators, output_step, verify_onnx


def spoilt(path, folder, change):
    """A copy of the file whose largest weight tensor is changed."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = numpy_helper.to_array(largest).copy()
    largest.CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), largest.name))
    onnx.save(model, folder / "spoilt.onnx")
    return folder / "spoilt.onnx"


@pytest.mark.parametrize("name", ["Residual", "Depthwise", "Mlp"])
def test_a_float_file_agrees_to_rounding(name, files, task_of):
    path, model = files(name, False)
    facts = verify_onnx(path, model, task_of(model), quantized=False)
    assert facts["relative_difference"] < 1e-4 and facts["n"] == 302


@pytest.mark.parametrize("name", ["Residual", "Depthwise", "Mlp"])
def test_an_int8_file_agrees_with_the_fake_quantised_model(name, files, task_of):
    path, model = files(name, True)
    facts = verify_onnx(path, model, task_of(model), quantized=True)
    assert facts["top1_agreement"] >= 0.99 and facts["low"] < facts["top1_agreement"] <= facts["high"]
    assert facts["within_one_step"] >= 0.99 and facts["equal"]
    assert facts["integer_share"]["share"] == 1.0


def test_a_float_file_with_one_wrong_weight_fails(files, task_of, tmp_path):
    path, model = files("Residual", False)

    def nudge(weights):
        weights.flat[weights.size // 2] += 0.05
        return weights

    with pytest.raises(VerificationError, match="relative difference"):
        verify_onnx(spoilt(path, tmp_path, nudge), model, task_of(model), quantized=False)


def test_an_int8_file_with_wrong_weights_fails(files, task_of, tmp_path):
    path, model = files("Residual", True)
    with pytest.raises(VerificationError, match="relative error|agreement"):
        verify_onnx(spoilt(path, tmp_path, lambda w: np.roll(w, 1, axis=0)), model, task_of(model), quantized=True)


def test_an_int8_file_with_swapped_classes_fails(files, task_of, tmp_path):
    path, model = files("Residual", True)
    proto = onnx.load(path)
    logits = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) == [4, 32])
    array = numpy_helper.to_array(logits)[[1, 0, 2, 3]]
    logits.CopyFrom(numpy_helper.from_array(array, logits.name))
    onnx.save(proto, tmp_path / "swapped.onnx")
    with pytest.raises(VerificationError):
        verify_onnx(tmp_path / "swapped.onnx", model, task_of(model), quantized=True)


def test_a_nan_is_no_agreement(files, task_of, tmp_path):
    path, model = files("Mlp", False)
    with pytest.raises(VerificationError):
        verify_onnx(spoilt(path, tmp_path, lambda w: w * np.nan), model, task_of(model), quantized=False)


def test_nothing_to_compare_is_no_agreement(files):
    path, model = files("Mlp", False)
    with pytest.raises(VerificationError):
        verify_onnx(path, model, Task(model), quantized=False)


def test_a_fixed_batch_is_checked_in_pieces(tmp_path):
    model = nn.Linear(3, 2).eval()
    inputs = torch.randn(11, 3)
    task = Task(model, validation=[(inputs, torch.zeros(11, 2))], example_inputs=(inputs[:4],))
    file = export_onnx(model, (inputs[:4],), tmp_path / "model.onnx", dynamic_batch=False)
    assert verify_onnx(file.path, model, task, quantized=False)["n"] == 12


def test_regression_is_judged_by_its_relative_error(quantized, tmp_path, make_images):
    torch.manual_seed(0)
    original = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    model, _ = quantized(original)
    inputs = make_images(64, 3)[0]
    task = Task(model, validation=[(inputs, torch.zeros(64, 2))], example_inputs=(inputs[:2],))
    file = export_onnx(model, (inputs[:2],), tmp_path / "model.onnx")
    facts = verify_onnx(file.path, model, task, quantized=True)
    assert facts["relative_error"] < 0.05 and "top1_agreement" not in facts
    with pytest.raises(VerificationError, match="relative error"):
        verify_onnx(spoilt(file.path, tmp_path, lambda w: w[::-1]), model, task, quantized=True)


def test_keyword_batches_are_refused(files):
    path, model = files("Mlp", False)
    task = Task(model, validation=[{"x": torch.randn(2, 1, 8, 8), "labels": torch.zeros(2)}])
    with pytest.raises(InputError, match="positional"):
        verify_onnx(path, model, task, quantized=False)


def test_verification_leaves_the_models_mode_alone(files, task_of):
    path, model = files("Mlp", False)
    model[3].train()
    try:
        verify_onnx(path, model, task_of(model), quantized=False)
        assert [module.training for module in model] == [False, False, False, True, False, False]
    finally:
        model.eval()


def test_the_output_step_is_that_of_the_last_quantiser(files):
    path, model = files("Mlp", True)
    scale = model.get_submodule("5.tersor_taps.taps.linear_0").scale
    assert output_step(path) == pytest.approx(float(scale.detach()))
    assert output_step(files("Mlp", False)[0]) is None


def test_the_place_where_file_and_model_part_is_named(files, task_of, tmp_path):
    path, model = files("Residual", True)
    proto = onnx.load(path)
    spoilt_layer = next(node for node in proto.graph.node if node.name == "layers.1.conv2")
    dequantize = next(node for node in proto.graph.node if node.output[0] == spoilt_layer.input[1])
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == dequantize.input[0])
    array = np.roll(numpy_helper.to_array(weight), 1, axis=0)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(proto, tmp_path / "spoilt.onnx")
    with pytest.raises(VerificationError, match=r"the two part at layers\.1\.conv2:conv2d\[0\]"):
        verify_onnx(tmp_path / "spoilt.onnx", model, task_of(model), quantized=True)
    found = partings(tmp_path / "spoilt.onnx", model, task_of(model).example_inputs)
    assert found[0].place == "<model>:input[0]" and found[0].equal == 1
    assert all(each.within_one > 0.99 for each in partings(path, model, task_of(model).example_inputs))


def test_a_true_file_is_equal_to_its_model(files, task_of):
    for name in ("Residual", "Mlp"):
        path, model = files(name, True)
        facts = verify_onnx(path, model, task_of(model), quantized=True)
        assert facts["equal"] and facts["within_one_step"] >= 0.99 and "parts_at" not in facts


def test_float_operators_are_those_that_neither_move_nor_compute_integers():
    operators = {"QLinearConv": 3, "Gelu": 2, "Transpose": 4, "QGemm": 1, "QuantizeLinear": 2, "QLinearAdd": 1}
    assert float_operators(operators) == {"Gelu": 2, "QuantizeLinear": 2}
