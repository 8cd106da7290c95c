import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.errors import InputError
from tersor.core.step import Context
from tersor.core.task import Metric, Task
from tersor.train.average import Average
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.train.schedules import Constant


def make_task(**fields):
    torch.manual_seed(0)
    x = torch.randn(48, 5)
    data = TensorDataset(x, (x @ torch.randn(5, 3)).argmax(1))
    loader = DataLoader(data, 8)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    return Task(**{"model": model, "train": loader, "validation": loader, "test": loader, **fields}).complete()


def plain_loop(task, steps, lr=0.1):
    """The weights after each step of plain SGD, the first entry before any."""
    model = copy.deepcopy(task.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    found = [{k: v.clone() for k, v in model.state_dict().items()}]
    for _ in range(steps // 6):
        for x, y in task.train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            found.append({k: v.clone() for k, v in model.state_dict().items()})
    return found


SGD = Optimizer(lr=0.1, momentum=0, weight_decay=0)


def test_the_result_is_the_mean_that_the_equation_says_and_nothing_is_left_on_it():
    task = make_task()
    step = Finetune(2, optimizer=SGD, schedule=Constant(), keep="last", average=Average(0.4))
    model = step.run(task.model, task, Context(1)).model
    first, *course = plain_loop(task, 12)
    for name, value in first.items():
        if value.is_floating_point():
            for t, weights in enumerate(course, start=1):
                d = min(0.4, (1 + t) / (10 + t))
                value = d * value + (1 - d) * weights[name]
            assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name
    assert model.state_dict().keys() == task.model.state_dict().keys()
    assert not torch.allclose(model[0].weight, course[-1]["0.weight"], atol=1e-4)


def test_validation_judges_the_mean_and_training_goes_on_from_the_weights():
    seen = []

    def outputs(result):
        seen.append(result.detach().clone())
        return result

    step = Finetune(1, optimizer=SGD, schedule=Constant(), keep="last", average=Average(0.4))
    task = make_task()
    averaged = step.run(task.model, task, Context(1))
    spy = Metric("spy", lambda out, targets: (outputs(out), torch.zeros(len(out)))[1])
    task = make_task(metric=spy)
    step.run(task.model, task, Context(1))
    expected = averaged.model(task.validation.dataset.tensors[0])
    assert torch.allclose(torch.cat(seen[-6:]), expected, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0, float("nan")])
def test_a_decay_out_of_range_is_an_error(decay):
    with pytest.raises(InputError, match="Average.decay"):
        Average(decay)


def without_norm():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def test_the_gradient_of_several_batches_is_that_of_one_large_one():
    large = make_task(model=without_norm())
    wide = DataLoader(large.train.dataset, 24)
    large = make_task(model=without_norm(), train=wide)
    small = make_task(model=without_norm())
    one = Finetune(3, optimizer=Optimizer(lr=0.1), clip=0.5, keep="last")
    several = Finetune(3, optimizer=Optimizer(lr=0.1, accumulate=3), clip=0.5, keep="last")
    a, b = (step.run(task.model, task, Context(1)) for step, task in ((one, large), (several, small)))
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert [entry["lr"] for entry in a.history] == [entry["lr"] for entry in b.history]
    assert a.history[-1]["loss"] == pytest.approx(b.history[-1]["loss"], rel=1e-5)


def test_the_last_batches_of_an_epoch_make_a_step_of_their_own_mean():
    task = make_task(model=without_norm())
    optimizer = Optimizer(lr=0.1, momentum=0, weight_decay=0, accumulate=4)
    step = Finetune(1, optimizer=optimizer, schedule=Constant(), keep="last")
    model = copy.deepcopy(task.model)
    x, y = task.train.dataset.tensors
    for part in (slice(0, 32), slice(32, 48)):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    trained = step.run(task.model, task, Context(1)).model
    for p, q in zip(model.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_accumulating_no_batches_is_an_error():
    with pytest.raises(InputError, match="Optimizer.accumulate"):
        Optimizer(accumulate=0)
