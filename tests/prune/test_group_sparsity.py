import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.apply import apply
from tersor.core.errors import InputError
from tersor.core.place import ByName
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.prune.structured import group_sparsity
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.group_sparsity import GroupSparsity
from tersor.train.finetune import Finetune
from tersor.train.objective import TaskLoss
from tersor.train.optimizer import Optimizer


class Net(nn.Module):
    """A block with a shortcut: the channels of conv1 and conv2 can only go together."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        return self.fc((x + self.conv2(x)).mean((2, 3)))


def make_task(**fields):
    torch.manual_seed(0)
    images = torch.randn(48, 1, 6, 6)
    data = TensorDataset(images, (images.mean((1, 2, 3)) * 6).round().clamp(-1, 1).long() + 1)
    train, held_out = DataLoader(data, 8, shuffle=True), DataLoader(data, 24)
    return Task(**{"model": Net(), "train": train, "validation": held_out, "test": held_out, **fields}).complete()


def slices(net):
    """What is coupled to each unit of the only free group, written out: γ of the norm, rows and columns."""
    rows = [net.conv1.weight, net.norm.weight[:, None], net.conv2.weight]
    columns = [net.conv2.weight.transpose(0, 1), net.fc.weight.t()]
    return torch.cat([part.reshape(6, -1) for part in rows + columns], 1)


def test_the_gradient_is_each_slice_times_a_factor_that_grows_as_it_shrinks():
    task = make_task()
    net = task.model
    with torch.no_grad():
        nn.init.uniform_(net.norm.weight, 0.2, 1.5)
        net.conv1.weight[2] *= 0.1
    GroupSparsity(strength=0.3, alpha=3.0)(net, next(iter(task.train)), task).backward()
    importance = slices(net).detach().square().sum(1)
    factor = 2 ** (3.0 * (importance.max() - importance) / (importance.max() - importance.min()))
    assert factor.min() == 1 and factor.max() == 8
    by_hand = 0.3 * 0.5 * (factor * slices(net).square().sum(1)).sum()
    expected = torch.autograd.grad(by_hand, [net.conv1.weight, net.norm.weight, net.conv2.weight, net.fc.weight])
    got = [net.conv1.weight.grad, net.norm.weight.grad, net.conv2.weight.grad, net.fc.weight.grad]
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(got, expected, strict=True))
    assert net.conv1.bias.grad is None and net.norm.bias.grad is None


def test_equal_units_decay_alike():
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    task = Task(net, example_inputs=(torch.randn(2, 4),))
    assert GroupSparsity(strength=1.0)(net, None, task).item() == pytest.approx(0.5 * (5 * 4 + 5 * 2))


def test_training_shrinks_the_unimportant_units_faster_than_the_important_ones():
    task = make_task()
    with torch.no_grad():
        task.model.conv1.weight[:3] *= 0.5
    before = slices(task.model).detach().norm(dim=1)
    weak = before.argsort()[:2]
    strong = before.argsort()[-2:]
    step = Finetune(epochs=10, objective=TaskLoss() + GroupSparsity(0.01), optimizer=Optimizer(lr=0.05), keep="last")
    left = slices(step.run(task.model, task, Context(1)).model).detach().norm(dim=1) / before
    assert left[weak].max() < 0.5 * left[strong].min(), left
    plain = Finetune(epochs=10, objective=TaskLoss(), optimizer=Optimizer(lr=0.05), keep="last")
    without = slices(plain.run(task.model, task, Context(1)).model).detach().norm(dim=1) / before
    assert without[weak].min() > left[weak].max()


class Stopping:
    """A loader that is interrupted in the middle of its second epoch, once."""

    def __init__(self, loader):
        self.loader, self.epochs, self.stops = loader, 0, True
        self.generator = loader.generator

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.epochs += 1
        for number, batch in enumerate(self.loader):
            if self.stops and self.epochs == 2 and number == 2:
                self.stops = False
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path):
    task = make_task()
    step = Finetune(epochs=3, objective=TaskLoss() + GroupSparsity(0.01), keep="last")
    whole = step.run(task.model, task, Context(5, tmp_path / "whole")).model
    stopping = make_task(train=Stopping(task.train))
    with pytest.raises(KeyboardInterrupt):
        step.run(stopping.model, stopping, Context(5, tmp_path / "killed"))
    group_sparsity._FOUND.clear()  # another process
    resumed = step.run(stopping.model, stopping, Context(5, tmp_path / "killed")).model
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_groups_are_found_once_for_each_model_and_again_after_surgery(monkeypatch):
    task = make_task()
    found = []
    groups_of = group_sparsity.groups_of
    monkeypatch.setattr(group_sparsity, "groups_of", lambda *args: found.append(args[0]) or groups_of(*args))
    objective, batch = GroupSparsity(), next(iter(task.validation))
    net = copy.deepcopy(task.model).train()
    state, flags = torch.get_rng_state(), [module.training for module in net.modules()]
    for _ in range(3):
        objective(net, batch, task)
    assert len(found) == 1 and torch.equal(state, torch.get_rng_state())
    assert flags == [module.training for module in net.modules()]
    plan = PruneChannels(0.5).plan(net, task)
    apply(net, plan, in_place=True)
    assert torch.isfinite(objective(net, batch, task)) and len(found) == 2
    gc.collect()  # those of earlier tests
    known = len(group_sparsity._FOUND)
    del net
    found.clear()
    gc.collect()
    assert len(group_sparsity._FOUND) == known - 1


def test_mixed_precision_does_not_stand_in_the_graph():
    task = make_task()
    batch = next(iter(task.validation))
    plain = GroupSparsity()(copy.deepcopy(task.model), batch, task)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = GroupSparsity()(copy.deepcopy(task.model), batch, task)
    assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)


def test_only_the_groups_that_are_meant_decay():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    task = Task(net, example_inputs=(torch.randn(2, 4),))
    GroupSparsity(where=ByName("2"))(net, None, task).backward()
    assert net[0].weight.grad is None and net[2].weight.grad is not None and net[4].weight.grad is not None


class Attention(nn.Module):
    """Two heads of four channels each, and a residual stream of six that a layer norm normalises."""

    def __init__(self):
        super().__init__()
        self.heads, self.size = 2, 4
        self.embed, self.norm = nn.Linear(5, 6), nn.LayerNorm(6)
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.out, self.fc = nn.Linear(8, 6), nn.Linear(6, 3)

    def split(self, x):
        return x.unflatten(-1, (self.heads, self.size)).transpose(1, 2)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (self.split(layer(self.norm(x))) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.fc(x.mean(1))


@pytest.mark.parametrize("heads", ["whole", "inside"])
def test_heads_decay_as_wholes_or_equally_inside(heads):
    torch.manual_seed(0)
    net = Attention()
    task = Task(net, example_inputs=(torch.randn(3, 7, 5),))
    GroupSparsity(1.0, where=ByName("[qkv]"), heads=heads)(net, None, task).backward()
    q, k, v = (layer.weight.detach().view(2, 4, 6) for layer in (net.q, net.k, net.v))
    read = net.out.weight.detach().view(6, 2, 4)
    if heads == "whole":
        sums = sum(part.square().sum((1, 2)) for part in (q, k, v)) + read.square().sum((0, 2))
    else:  # what is inside values, and inside queries and keys, goes apart
        sums = v.square().sum((0, 2)) + read.square().sum((0, 1))
    factor = 2 ** (4 * (sums.max() - sums) / (sums.max() - sums.min()))
    spread = factor.view(2, 1, 1) if heads == "whole" else factor.view(1, 4, 1)
    assert torch.allclose(net.v.weight.grad.view(2, 4, 6), spread * v, rtol=1e-4)
    assert torch.allclose(net.out.weight.grad.view(6, 2, 4), spread.view(1, *spread.shape[:2]) * read, rtol=1e-4)
    assert net.embed.weight.grad is None and net.q.weight.grad is not None


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="GroupSparsity.strength"):
        GroupSparsity(strength=-1.0)
    with pytest.raises(InputError, match="GroupSparsity.alpha"):
        GroupSparsity(alpha=float("nan"))
    net = nn.Linear(3, 2)
    with pytest.raises(InputError, match="no example inputs"):
        GroupSparsity()(net, None, Task(net))
    with pytest.raises(InputError, match="no group of channels that could be pruned.*reaches the model's output"):
        GroupSparsity()(net, None, Task(net, example_inputs=(torch.randn(2, 3),)))
