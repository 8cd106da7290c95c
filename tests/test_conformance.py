"""Every Method of the package keeps the contract of a Method, on every small network here."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tersor.prune
import tersor.quantize
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.quantize import Quantize
from tersor.testing import check_method
from tersor.zoo.batches import TensorBatches
from tersor.zoo.residual import ResidualNet

FAMILIES = (tersor.prune, tersor.quantize)
COMES_AFTER = {
    "Quantize": (FoldBatchNorm(),),
    "CorrectBias": (FoldBatchNorm(), Quantize(learn=False)),
    "RoundBiases": (FoldBatchNorm(), Quantize(learn=False)),
}
QUICK = {"AdaRound": {"steps": 8}}


class Depthwise(nn.Module):
    """A grouped and a depthwise convolution, a concatenation and a multiplication by a gate."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.gate = nn.Linear(8, 8)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu6(self.norm(self.depthwise(x)))
        y = self.grouped(y) * self.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(torch.cat([x, y], 1).mean((2, 3)))


def residual():
    return ResidualNet((8, 12), 1, in_channels=3, classes=5)


def perceptron():
    layers = [nn.Linear(3 * 6 * 6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)]
    return nn.Sequential(nn.Flatten(), *layers)


NETWORKS = {"residual": residual, "depthwise": Depthwise, "perceptron": perceptron}


def methods():
    """Every concrete Method that a module of the families defines."""
    found = {}
    for family in FAMILIES:
        for entry in pkgutil.walk_packages(family.__path__, family.__name__ + "."):
            for _, value in inspect.getmembers(importlib.import_module(entry.name), inspect.isclass):
                if issubclass(value, Method) and value.__module__ == entry.name and not inspect.isabstract(value):
                    found[value.__name__] = value
    return found


@pytest.fixture(params=NETWORKS)
def task(request):
    torch.manual_seed(1)
    model = NETWORKS[request.param]()
    for value in [*model.parameters(), *model.buffers()]:  # fresh networks hide mistakes: unit scales, zero means
        if value.is_floating_point() and value.ndim == 1:
            nn.init.uniform_(value.data, 0.5, 1.5)
    images, targets = torch.randn(24, 3, 6, 6), torch.arange(24) % 5
    batches = TensorBatches(images, targets, 8)
    train = TensorBatches(images, targets, 8, shuffle=True)
    return Task(model.eval(), train, batches, batches, batches)


def test_the_families_have_methods():
    assert {"PruneChannels", "FoldBatchNorm", "Quantize"} <= methods().keys()


def prepared(name, model, task):
    """The model as the method wants it: what it must come after has been done."""
    for step in COMES_AFTER.get(name, ()):
        model = step.run(model, task.complete()).model
    return model


@pytest.mark.parametrize("name", methods())
def test_every_method_keeps_the_contract(name, task):
    result = check_method(methods()[name](**QUICK.get(name, {})), prepared(name, task.model, task), task)
    assert any(plan.edits or plan.skips for plan in result.plans)


@pytest.mark.parametrize("name", methods())
def test_every_method_keeps_the_contract_in_mixed_train_mode_with_shuffled_calibration(name, task):
    shuffled = TensorBatches(task.train.images, task.train.targets, 8, shuffle=True)
    mixed = prepared(name, task.model, task).train()
    next(iter(mixed.children())).eval()
    check_method(
        methods()[name](**QUICK.get(name, {})), mixed, Task(mixed, task.train, task.validation, task.test, shuffled)
    )
