import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.errors import ArtifactError
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.core.plan import Plan
from tersor.measure.size import effective_weights, file_bytes, nonzeros, parameters


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 2, bias=False))


def edited(model):
    weight = TensorPlace("0", "weight")
    keep = torch.ones(5, 10, dtype=torch.bool)
    keep[:, :4] = False
    zero = torch.zeros((), dtype=torch.int32)
    return apply(
        model,
        Plan(
            "by hand",
            (
                Mask(weight, keep),
                Quantizer((weight,), torch.full((5,), 0.01), torch.zeros(5, dtype=torch.int32), -128, 127, axis=0),
                Quantizer((ActivationPlace("", "relu"),), torch.tensor(0.1), zero, 0, 255),
                Quantizer((ActivationPlace("", "input"),), torch.tensor(0.1), zero, 0, 255),
            ),
        ),
    )


def test_parameters_of_a_plain_model_are_torchs():
    assert parameters(net()).value == sum(p.numel() for p in net().parameters())


def test_masks_and_quantisers_are_no_parameters():
    assert parameters(edited(net())).value == parameters(net()).value


def test_masked_weights_are_no_nonzeros():
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    assert nonzeros(model).value == parameters(model).value
    assert nonzeros(edited(model)).value == parameters(model).value - 5 * 4


def test_weights_that_round_to_zero_are_no_nonzeros():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.004, 0.3], [0.2, -0.004]]))
    scale, zero = torch.tensor(0.01), torch.zeros((), dtype=torch.int32)
    quantised = apply(model, Plan("", (Quantizer((TensorPlace("", "weight"),), scale, zero, -128, 127),)))
    assert nonzeros(quantised).value == 2


def test_tied_weights_count_once_with_and_without_a_mask():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            self.head.weight = self.embedding.weight

    assert parameters(Tied()).value == 21
    masked = apply(Tied(), Plan("", (Mask(TensorPlace("head", "weight"), torch.ones(7, 3, dtype=torch.bool)),)))
    assert parametrize.is_parametrized(masked.embedding) and parameters(masked).value == 21


def test_a_parametrization_of_several_tensors_counts_as_the_weight_it_makes():
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    assert parameters(layer).value == 4 * 3 + 3


def test_effective_weights_are_what_the_forward_uses():
    model = edited(net())
    found = {str(place): tensor for place, tensor in effective_weights(model)}
    assert list(found) == ["0.bias", "0.weight", "2.weight", "2.bias", "3.weight"]
    assert torch.equal(found["0.weight"], model[0].weight) and not found["0.weight"].requires_grad


def test_file_bytes_of_a_folder_sums_its_files(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "inner" / "b").write_bytes(b"123")
    assert (file_bytes(tmp_path / "a").value, file_bytes(tmp_path).value) == (5, 8)


def external(path):
    weight = numpy_helper.from_array(torch.ones(300, 2).numpy(), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 300), ("y", 2)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="w.bin")
    return path


def test_file_bytes_of_an_onnx_file_counts_its_data_files(tmp_path):
    path = external(tmp_path / "m.onnx")
    assert file_bytes(path).value == path.stat().st_size + 300 * 2 * 4


def test_an_onnx_file_without_its_data_file_is_refused(tmp_path):
    path = external(tmp_path / "m.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ArtifactError, match="w.bin"):
        file_bytes(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        file_bytes(tmp_path / "nothing.onnx")
