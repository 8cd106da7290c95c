"""Masks learnt by gradient: the threshold's gradient against autograd, exact counts, and who loses more."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.step import Context, Every
from tersor.core.task import Task
from tersor.prune.sparse.learnt_mask import LearnMasks, _Threshold
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer


class TwoWays(nn.Module):
    """Half of the input decides, the other half is noise: whose layer can go."""

    def __init__(self):
        super().__init__()
        self.signal, self.noise, self.head = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(torch.cat([self.signal(x[:, :6]).relu(), self.noise(x[:, 6:]).relu()], 1))


def task_of(model, batches=12):
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(batches):
        x = torch.randn(32, 12, generator=generator)
        data.append((x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()))
    return Task(model, data, data, data).complete()


def network():
    torch.manual_seed(0)
    return TwoWays()


def training(companion, **settings):
    return Finetune(**{"epochs": 6, "optimizer": Optimizer(lr=0.1), "keep": "last", "companion": companion, **settings})


def zeros(model, path):
    return int((model.get_submodule(path).weight == 0).sum())


def test_the_gradient_of_a_threshold_is_that_of_the_smooth_mask_under_the_penalty():
    torch.manual_seed(2)
    weight, price = nn.Parameter(torch.randn(7, 5)), 0.3
    threshold = _Threshold(weight.detach(), torch.rand(7, 5) > 0.2)
    threshold.log += 5
    log = threshold.log.clone().requires_grad_()
    soft = torch.sigmoid((weight.detach().square().log() - log) / 0.5) * threshold.allowed
    hard = (soft > 0.5).float()
    seen = (weight.detach() * hard).requires_grad_()
    target = torch.randn(7, 5)
    (seen - target).square().sum().backward()
    weight.grad = seen.grad
    smooth = weight.detach() * (hard + soft - soft.detach())
    ((smooth - target).square().sum() + price * soft.sum()).backward()
    before = threshold.log.clone()
    threshold.learn(weight, price, rate=0.25)
    assert threshold.first / (1 - 0.9) == pytest.approx(float(log.grad), rel=1e-4)
    assert float(before - threshold.log) == pytest.approx(0.25 * float(log.grad.sign()), rel=1e-4), "Adam's first step"


def test_the_count_is_exact_and_what_only_carries_noise_loses_more():
    model = network()
    result = training(LearnMasks(0.6, end=0.6)).run(model, task_of(model))
    counts = {path: zeros(result.model, path) for path in ("signal", "noise", "head")}
    assert sum(counts.values()) == int(0.6 * 180 + 1e-9)
    assert counts["noise"] > 1.3 * counts["signal"]
    (plan,) = result.plans
    assert [edit.place.module for edit in plan.edits] == ["signal", "noise", "head"]
    assert all(isinstance(edit, Mask) for edit in plan.edits) and "108 of 180 zero" in plan.lines[-1][1]
    told = [entry["noted"]["masked weights"] for entry in result.history]
    assert told[-1] == pytest.approx(0.6) and 0 < told[0] < 0.6
    assert "tersor_training" not in dict(result.model.named_children())
    x, y = (torch.cat(parts) for parts in zip(*task_of(model).test, strict=True))
    assert (result.model(x).argmax(1) == y).float().mean() > 0.8


def test_what_was_masked_stays_so_and_others_are_left_alone():
    model = network()
    keep = torch.rand(10, 6, generator=torch.Generator().manual_seed(3)) > 0.7
    model = apply(model, Plan("by hand", (Mask(TensorPlace("noise", "weight"), keep),)))
    result = training(LearnMasks(0.5, end=0.5, where=ByName("[sn]*"))).run(model, task_of(model))
    assert bool((result.model.noise.weight[~keep] == 0).all())
    assert zeros(result.model, "signal") + zeros(result.model, "noise") == 60 and zeros(result.model, "head") == 0
    empty = apply(network(), Plan("by hand", (Mask(TensorPlace("noise", "weight"), torch.zeros_like(keep)),)))
    result = training(LearnMasks(0.6, end=0.5)).run(empty, task_of(empty))
    assert zeros(result.model, "noise") == 60 and zeros(result.model, "signal") < 60


def test_each_tensor_keeps_a_number_however_much_goes():
    model = network()
    result = training(LearnMasks(0.99, end=0.3), epochs=2).run(model, task_of(model))
    assert [zeros(result.model, path) for path in ("signal", "noise", "head")] == [59, 59, 59]


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    model = network()
    step = training(LearnMasks(0.6, end=0.5), epochs=2)
    whole = step.run(model, task_of(model))
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return F.cross_entropy(model(batch[0]), batch[1])

    task = task_of(model)
    broken = Task(model, task.train, task.validation, task.test, loss=loss).complete()
    context = Context(folder=tmp_path, every=Every(batches=1))
    with pytest.raises(KeyboardInterrupt):
        step.run(model, broken, context)
    resumed = step.run(model, broken, context)
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))


def test_numbers_out_of_range_and_nothing_to_mask_are_refused():
    for wrong in ({"sparsity": 1.0}, {"end": 0}, {"strength": 0}, {"reach": float("inf")}):
        (name,) = wrong
        with pytest.raises(InputError, match=f"LearnMasks.{name}"):
            LearnMasks(**wrong)
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(InputError, match="no weight can be masked"):
        LearnMasks().begin(model, None)


def test_a_dry_run_tells_the_count():
    model = network()
    plan = LearnMasks(0.6).expected(model, task_of(model))
    assert sum(int((~edit.keep).sum()) for edit in plan.edits) == 108
