"""Post-training quantisation and quantisation-aware training in a bare loop, on real digits."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.task import Task
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int
from tersor.testing import check_method


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


def network(width=12):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), Block(width), nn.MaxPool2d(2),
        Block(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


def train(model, x, y, epochs, rate):
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, epochs * -(-len(x) // 32))
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(32):
            optimiser.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def errors(model, x, y):
    with torch.no_grad():
        return int((model(x).argmax(1) != y).sum())


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train_set, test_set = (x[order[360:]], y[order[360:]]), (x[order[:360]], y[order[:360]])
    model = train(network(), *train_set, epochs=5, rate=0.1)
    batches = list(zip(train_set[0].split(64), train_set[1].split(64), strict=True))
    task = Task(model, calibration=batches, example_inputs=(x[:2],))
    return FoldBatchNorm().run(model, task).model, task, train_set, test_set


def test_eight_bits_after_training_lose_at_most_one_digit_in_a_hundred(digits, deploy):
    model, task, _, test_set = digits
    assert errors(model, *test_set) <= 14
    quantised = Quantize().run(model, task).model.eval()
    assert errors(quantised, *test_set) <= errors(model, *test_set) + 3
    deployed = deploy(quantised, test_set[0][:2])
    with torch.no_grad():
        agreement = (deployed(test_set[0]).argmax(1) == quantised(test_set[0]).argmax(1)).float().mean()
    assert agreement >= 0.99
    assert deployed.histogram["QLinearConv"] == 5 and deployed.histogram["QLinearAdd"] == 2
    assert deployed.histogram["QGemm"] == 1


def test_training_in_a_bare_loop_repairs_three_bit_weights_and_moves_the_learnt_steps(digits):
    torch.manual_seed(0)
    model, task, train_set, test_set = digits
    scheme = Quantize(weights=Int(3))
    quantised = apply(model, scheme.plan(model, task)).eval()
    before = {name: value.clone() for name, value in quantised.state_dict().items()}
    damaged = errors(quantised, *test_set)
    train(quantised, *train_set, epochs=2, rate=0.005)
    assert errors(quantised, *test_set) < damaged / 2
    steps = [name for name in before if name.endswith("log_growth")]
    moved = [name for name in steps if not torch.equal(before[name], quantised.state_dict()[name])]
    assert len(steps) == 16 and len(moved) == 16
    for module in quantised.modules():
        if isinstance(module, nn.Conv2d):  # training keeps every weight on three bits
            quantiser = next(m for m in module.modules() if isinstance(m, FakeQuantize) and m.axis == 0)
            integers = module.weight / quantiser.scale.reshape(-1, 1, 1, 1)
            assert torch.allclose(integers, integers.round(), atol=1e-3) and integers.round().unique().numel() <= 8


def test_eight_bits_keep_their_accuracy_in_training_and_onnx_runtime_follows(digits, deploy):
    torch.manual_seed(0)
    model, task, train_set, test_set = digits
    quantised = train(Quantize().run(model, task).model, *train_set, epochs=1, rate=0.01)
    assert errors(quantised, *test_set) <= errors(model, *test_set) + 3
    deployed = deploy(quantised, test_set[0][:2])
    with torch.no_grad():
        agreement = (deployed(test_set[0]).argmax(1) == quantised(test_set[0]).argmax(1)).float().mean()
    assert agreement >= 0.99 and deployed.histogram["QLinearConv"] == 5


def test_a_copy_and_a_reloaded_state_compute_the_same(digits):
    model, task, _, test_set = digits
    plan = Quantize().plan(model, task)
    quantised, fresh = apply(model, plan).eval(), apply(model, plan).eval()
    with torch.no_grad():
        for parameter in quantised.parameters():
            parameter.add_(0.01)
        expected = quantised(test_set[0])
        assert not torch.equal(fresh(test_set[0]), expected)
        fresh.load_state_dict(quantised.state_dict())
        assert torch.equal(fresh(test_set[0]), expected)
        assert torch.equal(copy.deepcopy(quantised)(test_set[0]), expected)


@pytest.mark.parametrize("method", [Quantize(calibration_batches=2), FoldBatchNorm()])
def test_the_methods_keep_the_contract(method):
    torch.manual_seed(0)
    model = network(4)
    if isinstance(method, Quantize):
        model = FoldBatchNorm().run(model, Task(model, example_inputs=(torch.rand(2, 1, 8, 8),))).model
    data = [(torch.rand(8, 1, 8, 8), torch.arange(8)) for _ in range(2)]
    result = check_method(method, model, Task(model, data, data, data))
    assert result.plans[0].edits
