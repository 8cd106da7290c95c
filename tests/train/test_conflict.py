"""Gradients that point apart: measured against autograd by hand, damped as the paper's algorithm does."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.train.conflict import Conflict, projected
from tersor.train.finetune import Finetune
from tersor.train.objective import Forward, Objective, TaskLoss
from tersor.train.optimizer import Optimizer


@dataclass(frozen=True)
class Towards(Objective):
    """½ (output − goal)² on average."""

    goal: float

    def of(self, forward):
        return (forward.outputs - self.goal).square().mean() / 2


@dataclass(frozen=True)
class Decay(Objective):
    """½ ‖first weight‖², which the other parameters have no part in."""

    def of(self, forward):
        return next(iter(forward.student.parameters())).square().sum() / 2


def task_of(model, batches=4):
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(batches)]
    return Task(model, data, data, data).complete()


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def gradient(objective, model, task, batch):
    model.zero_grad()
    objective(model, batch, task).backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def prepared(objective):
    model = network().train()
    task = task_of(model)
    for companion in objective.companions():
        companion.begin(model, task)
    return model, task


numbers = st.floats(-3, 3, width=32)


@given(st.lists(numbers, min_size=4, max_size=4), st.lists(numbers, min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_of_two_gradients_in_conflict_neither_is_undone_by_the_step(a, b):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    step = projected(torch.stack([a, b]))
    if a @ b >= 0:
        assert torch.allclose(step, a + b)
    else:
        assert float(step @ a) >= -1e-9 and float(step @ b) >= -1e-9
        by_hand = a - (a @ b) / (b @ b) * b + b - (a @ b) / (a @ a) * a
        assert torch.allclose(step, by_hand, atol=1e-9)


def test_a_damped_sum_has_its_value_and_the_projected_gradient():
    plain = Towards(2.0) + 0.5 * Towards(-1.0)
    damped = Conflict(plain)
    model, task = prepared(damped)
    batch = task.train[0]
    first, second = gradient(Towards(2.0), model, task, batch), gradient(0.5 * Towards(-1.0), model, task, batch)
    assert first @ second < 0, "they pull apart"
    assert torch.allclose(gradient(damped, model, task, batch), projected(torch.stack([first, second])), atol=1e-6)
    assert float(damped(model, batch, task).detach()) == pytest.approx(float(plain(model, batch, task).detach()))
    (measure,) = damped.companions()
    noted = measure.noted(model)
    cosine = float(first @ second / first.norm() / second.norm())
    assert noted == {
        "cosine Towards, Towards 2": pytest.approx(cosine, abs=1e-5), "in conflict Towards, Towards 2": 1.0,
    }  # fmt: skip
    model.eval()
    assert torch.allclose(gradient(damped, model, task, batch), first + second, atol=1e-6), "only training is damped"
    measure.finish(model)
    assert list(dict(model.named_children())) == ["0", "1", "2"]


def test_measuring_alone_leaves_training_as_it_is_and_tells_each_epoch():
    objective = TaskLoss() + 0.1 * Decay()
    model, training = network(), Finetune(epochs=3, optimizer=Optimizer(lr=0.05), keep="last")
    alone = Finetune(**{**vars(training), "objective": objective}).run(model, task_of(model))
    measured = Finetune(**{**vars(training), "objective": Conflict(objective, damp=False, every=3)})
    result = measured.run(model, task_of(model))
    assert all(map(torch.equal, alone.model.state_dict().values(), result.model.state_dict().values()))
    for entry in result.history:
        assert entry["noted"].keys() == {"cosine TaskLoss, Decay", "in conflict TaskLoss, Decay"}
        assert -1 <= entry["noted"]["cosine TaskLoss, Decay"] <= 1
    assert "noted" not in alone.history[0]


def test_three_terms_are_projected_in_a_random_order_that_the_seed_says():
    objective = Conflict(TaskLoss() + Decay() + Towards(3.0))
    model = network()
    training = Finetune(epochs=2, optimizer=Optimizer(lr=0.05), objective=objective, keep="last")
    first, second = (training.run(model, task_of(model)) for _ in range(2))
    assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))
    assert len(first.history[0]["noted"]) == 6
    plain = Finetune(**{**vars(training), "objective": objective.objective}).run(model, task_of(model))
    assert not all(map(torch.equal, first.model.state_dict().values(), plain.model.state_dict().values()))


def test_a_term_without_a_gradient_is_in_conflict_with_nothing():
    @dataclass(frozen=True)
    class Constant(Objective):
        def of(self, forward):
            return torch.ones(())

    objective = Conflict(TaskLoss() + Constant())
    model, task = prepared(objective)
    batch = task.train[0]
    assert torch.allclose(
        gradient(objective, model, task, batch), gradient(TaskLoss(), model, task, batch), atol=1e-6
    )  # fmt: skip
    noted = objective.companions()[-1].noted(model)
    assert list(noted.values()) == [0.0, 0.0]


def test_one_term_and_wrong_numbers_are_refused():
    with pytest.raises(InputError, match="nothing can be in conflict"):
        Conflict(TaskLoss())
    with pytest.raises(InputError, match="nothing can be in conflict"):
        Conflict(TaskLoss() + 0 * Decay())
    with pytest.raises(InputError, match="Conflict.every"):
        Conflict(TaskLoss() + Decay(), every=0)
    model = network().train()
    with pytest.raises(InputError, match="what is trained beside the model is not there"):
        Conflict(TaskLoss() + Decay()).of(Forward(model, task_of(model).train[0], task_of(model)))
    assert not math.isnan(float(projected(torch.zeros(2, 3)).sum()))
