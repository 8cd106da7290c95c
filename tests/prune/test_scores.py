import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError, TrainingError
from tersor.core.task import Task
from tersor.graph.groups import find_groups
from tersor.graph.trace import trace
from tersor.prune.scores import Magnitude, Random, Taylor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.fc = nn.Conv2d(6, 4, 3), nn.Linear(4 * 4, 3)

    def forward(self, x):
        x = self.conv2(F.relu(self.norm(self.conv1(x))))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def task(net):
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(5, 1, 6, 6, generator=generator), torch.randint(3, (5,), generator=generator)) for _ in range(3)
    ]
    return Task(net, train=batches, calibration=batches, example_inputs=(batches[0][0][:2],))


def groups_of(net, task):
    return [group for group in find_groups(trace(net, task.example_inputs), net) if group.frozen is None]


def test_taylor_is_the_squared_change_when_a_channel_is_masked_where_it_is_read(net, task):
    """By a gate on each channel: Σ w ∂L/∂w over the readers is the gate's gradient at one."""
    found = Taylor().units(net, task, groups_of(net, task))
    expected = torch.zeros(6, dtype=torch.float64)
    for batch in task.calibration:
        gate = torch.ones(1, 6, 1, 1, requires_grad=True)
        gated = copy.deepcopy(net)
        gated.conv2.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,))
        task.loss_of(gated, batch).backward()
        expected += gate.grad.flatten().double() ** 2 / 3
    assert torch.allclose(found[0], expected, rtol=1e-3)
    assert found[1].shape == (4,)


def test_taylor_leaves_the_model_and_the_random_state_alone(net, task):
    before = copy.deepcopy(net.state_dict())
    net.conv1.weight.requires_grad_(False)
    groups = groups_of(net, task)
    state = torch.get_rng_state()
    Taylor(batches=1).units(net, task, groups)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net.conv1.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_taylor_refuses_a_loss_that_is_not_finite_and_empty_data(net, task):
    groups = groups_of(net, task)
    nan = Task(net, calibration=task.calibration, loss=lambda model, batch: model(batch[0]).sum() * float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        Taylor().units(net, nan, groups)
    with pytest.raises(InputError, match="empty"):
        Taylor().units(net, Task(net, calibration=[]), groups)
    with pytest.raises(InputError, match="no calibration data"):
        Taylor().units(net, Task(net), groups)


def naive_norms(weight, axis, p):
    return [(weight.select(axis, i).abs() ** p).sum().item() ** (1 / p) for i in range(weight.shape[axis])]


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_magnitude_is_the_mean_of_the_relative_norms_of_what_scales_a_channel(net, task, p):
    nn.init.uniform_(net.norm.weight, -1, 1)
    first, second = Magnitude(p).units(net, task, groups_of(net, task))
    scale, read = net.norm.weight.detach().abs().numpy(), np.array(naive_norms(net.conv2.weight, 1, p))
    assert np.allclose(first.numpy(), (scale / scale.mean() + read / read.mean()) / 2)
    made, by_channel = np.array(naive_norms(net.conv2.weight, 0, p)), net.fc.weight.reshape(3, 4, 4)
    read = np.array(naive_norms(by_channel, 1, p))
    assert np.allclose(second.numpy(), (made / made.mean() + read / read.mean()) / 2)


def test_magnitude_of_a_silent_layer_is_finite(net, task):
    nn.init.zeros_(net.conv2.weight)
    assert all(bool(torch.isfinite(score).all()) for score in Magnitude().units(net, task, groups_of(net, task)))


def test_random_depends_on_its_seed_alone(net, task):
    groups = groups_of(net, task)
    one, same, other = (Random(seed).units(net, task, groups)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_the_users_loader_or_loss_raises_is_told_with_its_batch(net, task):
    def failing(model, batch):
        raise KeyError("mask")

    groups = groups_of(net, task)
    with pytest.raises(
        InputError, match="Taylor, calibration batch 0: the loss cannot be computed. Got KeyError: 'mask'"
    ):
        Taylor().units(net, Task(net, calibration=task.calibration, loss=failing), groups)

    class Vanishing:
        def __iter__(self):
            yield task.calibration[0]
            raise FileNotFoundError("image 17.png")

    with pytest.raises(InputError, match="task.calibration, batch 1: the loader fails. Got FileNotFoundError"):
        Taylor().units(net, Task(net, calibration=Vanishing()), groups)
