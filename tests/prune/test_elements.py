"""Scores of weights against ten-line references."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.place import TensorPlace
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.prune.sparse.elements import (
    MagnitudeAverage,
    Movement,
    RandomWeights,
    Wanda,
    WeightFisher,
    WeightMagnitude,
    WeightTaylor,
)
from tersor.prune.sparse.elements.score import GATHERED
from tersor.prune.sparse.gradual import GradualSparsity
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.standing import standing_masks
from tersor.train.companion import Moment
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.train.schedules import Constant
from tersor.zoo.batches import TensorBatches

PLACES = (TensorPlace("conv", "weight"), TensorPlace("fc", "weight"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.drop(F.relu(self.conv(x)).flatten(1)))


@pytest.fixture
def task():
    torch.manual_seed(0)
    batches = TensorBatches(torch.randn(12, 2, 4, 4), torch.arange(12) % 3, 4)
    return Task(Net(), batches, batches, batches, batches).complete()


def gradients(model, x, y):
    loss = F.cross_entropy(model(x), y)
    return torch.autograd.grad(loss, [model.conv.weight, model.fc.weight])


def test_magnitude_is_the_absolute_value(task):
    conv, fc = WeightMagnitude().elements(task.model, task, PLACES)
    assert torch.equal(conv, task.model.conv.weight.abs()) and torch.equal(fc, task.model.fc.weight.abs())


def test_taylor_is_the_mean_over_batches_of_weight_times_gradient(task):
    found = WeightTaylor(batches=2).elements(task.model, task, PLACES)
    model = task.model.eval()
    batches = [gradients(model, x, y) for x, y in list(task.calibration)[:2]]
    for number, (weight, got) in enumerate(zip((model.conv.weight, model.fc.weight), found, strict=True)):
        expected = sum((weight * grads[number]).abs() for grads in batches) / 2
        assert torch.allclose(got, expected, rtol=1e-5) and got.dtype == torch.float32


def test_fisher_squares_the_gradient_of_each_sample(task):
    found = WeightFisher(samples=5).elements(task.model, task, PLACES)
    model = task.model.eval()
    x, y = task.calibration.images[:5], task.calibration.targets[:5]
    samples = [gradients(model, x[i : i + 1], y[i : i + 1]) for i in range(5)]
    for number, (weight, got) in enumerate(zip((model.conv.weight, model.fc.weight), found, strict=True)):
        expected = weight**2 * sum(grads[number] ** 2 for grads in samples) / 10
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-12)


def test_wanda_multiplies_each_weight_with_the_size_of_its_input(task):
    conv, fc = Wanda(batches=3).elements(task.model.train(), task, PLACES)
    model = task.model.eval()
    x = torch.cat([x for x, _ in task.calibration])
    hidden = F.relu(model.conv(x)).flatten(1)
    assert torch.allclose(fc, model.fc.weight.abs() * hidden.square().mean(0).sqrt(), rtol=1e-5)
    sizes = x.square().mean((0, 2, 3)).sqrt()
    for out in range(4):  # two groups: outputs 0, 1 read input 0
        assert torch.allclose(conv[out, 0], model.conv.weight[out, 0].abs() * sizes[out // 2], rtol=1e-5)


def test_wanda_reads_weights_in_another_memory_format(task):
    plain = Wanda().elements(task.model, task, PLACES)
    other = Wanda().elements(task.model.to(memory_format=torch.channels_last), task, PLACES)
    assert all(torch.allclose(a, b) for a, b in zip(plain, other, strict=True))


def test_chance_depends_on_the_seed_alone(task):
    first, again, other = (RandomWeights(seed).elements(task.model, task, PLACES) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


class Recorder:
    """Steps a companion through a training by hand and keeps what was gathered at each step."""

    def __init__(self, score, task, steps, **fields):
        self.model = task.model.eval()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.companion = GradualSparsity(Prune(0.5, score=score, **fields), start=0.5, end=0.5, updates=1)
        self.companion.begin(self.model, task)
        self.optimizer.param_groups[0]["params"] = list(self.model.parameters())
        self.seen = []
        for done in range(steps):
            x, y = list(task.train)[done % 3]
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            stored = self.model.fc.parametrizations.weight
            self.seen.append(
                (stored.original.detach().clone(), stored.original.grad.clone(), self.model.fc.weight != 0)
            )
            self.companion.after_backward(Moment(self.model, task, self.optimizer, done, steps))
            self.after = stored.original.grad
            self.optimizer.step()
            self.companion.after_step(Moment(self.model, task, self.optimizer, done + 1, steps))
        self.gathered = dict(standing_masks(self.model))[PLACES[1]].get_buffer(GATHERED)


def test_movement_gathers_weight_times_the_gradient_of_masked_weights_too(task):
    found = Recorder(Movement(), task, 6, regrow=True)
    expected = -sum(weight * gradient for weight, gradient, _ in found.seen)
    assert torch.allclose(found.gathered, expected, rtol=1e-5)
    weight, gradient, kept = found.seen[-1]
    assert (~kept).sum() == 24 and (gradient[~kept] != 0).any()  # straight through
    assert (found.after[~kept] == 0).all() and torch.equal(found.after[kept], gradient[kept])
    before = -sum(weight * gradient for weight, gradient, _ in found.seen[:3])
    lowest = torch.zeros_like(kept).flatten().index_fill(0, before.flatten().argsort()[:24], True).view_as(kept)
    assert torch.equal(~kept, lowest)


def test_the_average_of_magnitudes_forgets_at_its_rate(task):
    found = Recorder(MagnitudeAverage(beta=0.8), task, 4)
    expected = torch.zeros(3, 16)
    for weight, _, _ in found.seen:
        expected = 0.8 * expected + 0.2 * weight.abs()
    assert torch.allclose(found.gathered, expected, rtol=1e-5)


def test_what_is_gathered_leaves_with_the_training(task):
    training = Finetune(
        epochs=2, schedule=Constant(), optimizer=Optimizer(lr=0.01), companion=GradualSparsity(Prune(score=Movement()))
    )
    model = training.run(task.model, task, Context(0)).model
    for _, mask in standing_masks(model):
        assert list(mask._buffers) == ["keep"] and not mask.dense_gradient
    with pytest.raises(InputError, match="gathered during training, and nothing was"):
        Prune(score=MagnitudeAverage()).plan(model, task)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: WeightTaylor(0), "at least one"), (lambda: WeightFisher(0), "at least one"),
        (lambda: Wanda(0), "at least one"), (lambda: MagnitudeAverage(1.0), "out of range"),
        (lambda: WeightTaylor("3"), "WeightTaylor.batches: wrong type"), (lambda: WeightFisher(1.5), "wrong type"),
        (lambda: Wanda("3"), "wrong type"), (lambda: MagnitudeAverage("x"), "wrong type"),
        (lambda: RandomWeights("x"), "RandomWeights.seed: wrong type"),
    ],
)  # fmt: skip
def test_settings_out_of_range_or_of_a_wrong_type_are_errors(make, match):
    with pytest.raises(InputError, match=match):
        make()
