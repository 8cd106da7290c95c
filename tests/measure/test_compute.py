import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.errors import InputError
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.core.plan import Plan
from tersor.measure.compute import REMAINDER, layer_table, macs


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 16, 12), 16 * 12 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2), (3, 9, 9), 4 * 4 * 8 * 3 * 9),
        (nn.Conv2d(8, 12, 3, groups=4, bias=False), (8, 7, 7), 5 * 5 * 12 * (8 // 4) * 9),
        (nn.Conv2d(6, 6, 5, groups=6), (6, 8, 8), 4 * 4 * 6 * 25),
        (nn.Conv1d(4, 5, 3, dilation=2), (4, 20), 16 * 5 * 4 * 3),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 5 * 5 * 4 * 6 * 4),
        (nn.Linear(20, 7), (20,), 140),
        (nn.Linear(20, 7), (11, 20), 11 * 140),
        (nn.LSTM(6, 4, batch_first=True), (5, 6), 5 * (16 * 6 + 16 * 4)),
        (nn.GRU(6, 4, batch_first=True), (5, 6), 5 * (12 * 6 + 12 * 4)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8), 5 * (4 * 64 + 2 * 8 * 16) + 2 * 5 * 5 * 8),
        (nn.BatchNorm2d(3), (3, 4, 4), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_the_hand_count_per_sample(layer, shape, expected, batch):
    assert macs(layer, (torch.randn(batch, *shape),)).value == expected


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_attention_counts_and_stands_in_the_last_row():
    rows = layer_table(Attention(), (torch.randn(2, 5, 8),))
    assert [(row["path"], row["macs"]) for row in rows] == [("project", 5 * 8 * 24), (REMAINDER, 2 * 5 * 5 * 8)]


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def quantised(model):
    zero = torch.zeros((), dtype=torch.int32)
    edits = [
        Quantizer((place,), torch.tensor(0.1), zero, -128, 127)
        for place in (TensorPlace("0", "weight"), ActivationPlace("4", "linear"), ActivationPlace("", "input"))
    ]
    keep = torch.rand(10, 144) > 0.5
    return apply(model, Plan("", (Mask(TensorPlace("4", "weight"), keep), *edits))), keep


def test_masks_and_quantisers_add_no_macs():
    x = (torch.randn(2, 3, 8, 8),)
    assert macs(quantised(convolutional())[0], x).value == macs(convolutional(), x).value == 36 * 4 * 27 + 1440


def test_layer_table_tells_the_effective_weights():
    model, keep = quantised(convolutional())
    rows = layer_table(model, (torch.randn(2, 3, 8, 8),))
    assert [row["path"] for row in rows] == ["0", "1", "4"]
    convolution, norm, linear = rows
    assert (convolution["type"], convolution["shape"], convolution["output"]) == ("Conv2d", [4, 3, 3, 3], [2, 4, 6, 6])
    assert (convolution["parameters"], convolution["macs"]) == (4 * 27 + 4, 36 * 4 * 27)
    assert (norm["type"], norm["parameters"], norm["macs"]) == ("BatchNorm2d", 8, 0)
    assert (linear["shape"], linear["nonzeros"], linear["macs"]) == ([10, 144], int(keep.sum()) + 10, 1440)


def test_layer_table_counts_a_shared_layer_once_with_both_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    (row,) = layer_table(Twice(), (torch.randn(1, 4),))
    assert (row["parameters"], row["macs"]) == (20, 32)


def test_a_holder_does_not_count_its_childrens_macs():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.inner = nn.Parameter(torch.eye(4)), nn.Linear(4, 6)

        def forward(self, x):
            return self.inner(x @ self.mix)

    rows = layer_table(Scaled(), (torch.randn(3, 4),))
    assert {row["path"]: row["macs"] for row in rows} == {"": 16, "inner": 24}


def test_the_model_is_left_as_it_was():
    model = convolutional()
    model[1].eval()
    running = model[1].running_mean.clone()
    layer_table(model.train(), (torch.randn(2, 3, 8, 8),))
    assert all(module.training for module in model.modules()) and torch.equal(running, model[1].running_mean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_hooks_go_when_the_forward_fails():
    model = convolutional()
    with pytest.raises(InputError, match="the model does not run"):
        layer_table(model, (torch.randn(2, 5, 8, 8),))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_parameter_that_is_expanded_and_read_by_a_module_is_counted():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.read = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 5)

        def forward(self, x):
            return self.read(self.token.expand(len(x), -1, -1))

    net = Token()
    assert macs(net, (torch.randn(3, 2),)).value == 20
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_macs_need_a_batch():
    with pytest.raises(InputError, match="batch first"):
        macs(convolutional(), (torch.tensor(1.0),))
