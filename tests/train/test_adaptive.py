import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.attached import CHILD
from tersor.core.errors import InputError
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.train.adaptive import Adapt, Adaptive, GradientNorms, ValidationLoss
from tersor.train.companion import Moment
from tersor.train.finetune import Finetune
from tersor.train.objective import Objective, TaskLoss
from tersor.train.optimizer import Optimizer


@dataclass(frozen=True)
class Scaled(Objective):
    """Another loss on the outputs, of any scale."""

    scale: float = 1.0

    def of(self, forward):
        return self.scale * forward.outputs.square().mean()


def make_task(**fields):
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    batches = list(zip(x.split(16), y.split(16), strict=True))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return Task(model, batches, batches[:2], batches[:2], **fields).complete()


def norm_of(objective, model, task):
    """The mean over the validation batches of the gradient's length."""
    norms = []
    for batch in task.validation:
        model.zero_grad()
        objective(model, batch, task).backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)))
    model.zero_grad()
    return sum(norms) / len(norms)


def after_one_step(objective, task):
    """A copy of the model on which the weights were set once, and the weights."""
    model = copy.deepcopy(task.model).train()
    for companion in objective.companions():
        companion.begin(model, task)
        companion.after_step(Moment(model, task, None, 1, 10))
    return model, objective.weights(model)


def test_gradients_are_balanced_by_the_weights_alone_whatever_a_loss_s_scale():
    task = make_task()
    objective = Adaptive(TaskLoss() + 3 * Scaled(1e4), updates=5)
    model, weights = after_one_step(objective, task)
    assert model.training and model[1].num_batches_tracked == 0
    pulls = [w * norm_of(part, model.eval(), task) for w, part in zip(weights.values(), (TaskLoss(), Scaled(1e4)))]
    assert pulls[1] == pytest.approx(3 * pulls[0], rel=1e-4)
    assert sum(weights.values()) == pytest.approx(4, rel=1e-5) and list(weights) == ["TaskLoss", "Scaled"]
    assert all(p.grad is None for p in model.parameters())
    batch = task.train[0]
    expected = weights["TaskLoss"] * TaskLoss()(model, batch, task) + weights["Scaled"] * Scaled(1e4)(
        model, batch, task
    )
    assert torch.allclose(objective(model, batch, task), expected, rtol=1e-5)


def test_a_term_without_a_gradient_keeps_its_weight():
    factors = GradientNorms().factors(torch.tensor([0.0, 2.0, 4.0]), torch.zeros(3), torch.tensor([5.0, 1.0, 1.0]))
    assert factors.tolist() == pytest.approx([1, 4 / 3, 2 / 3])
    assert GradientNorms().factors(torch.zeros(2), torch.zeros(2), torch.ones(2)).tolist() == [1, 1]


def test_weights_follow_the_validation_loss_by_dynamic_weight_average():
    rule = ValidationLoss(temperature=2.0)
    ratios = [0.5 / 1.0, 3.0 / 2.0, 1.0 / 1.0]
    expected = [3 * math.exp(r / 2) / sum(math.exp(r / 2) for r in ratios) for r in ratios]
    got = rule.factors(torch.tensor([0.5, 3.0, 1.0]), torch.tensor([1.0, 2.0, 1.0]), torch.ones(3))
    assert got.tolist() == pytest.approx(expected)
    assert rule.factors(torch.tensor([0.5, 3.0]), torch.zeros(2), torch.ones(2)).tolist() == [1, 1]


def test_what_is_measured_is_the_loss_on_validation_data_in_eval_mode():
    task = make_task()
    objective = Adaptive(TaskLoss() + Scaled(), rule=ValidationLoss(), batches=9)
    model, _ = after_one_step(objective, task)
    (state,) = model.get_submodule(CHILD).parts.values()
    model.eval()
    expected = [
        sum(F.cross_entropy(model(x), y).item() for x, y in task.validation) / 2,
        sum(model(x).square().mean().item() for x, _ in task.validation) / 2,
    ]
    assert state.measured.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rule", [GradientNorms(), ValidationLoss()])
def test_the_history_tells_the_weights_and_the_model_comes_back_plain(rule):
    task = make_task()
    objective = Adaptive(TaskLoss() + 0.5 * Scaled(50), rule, updates=4)
    result = Finetune(epochs=3, objective=objective, optimizer=Optimizer(lr=0.02)).run(task.model, task, Context(1))
    told = [entry["weights"] for entry in result.history]
    assert all(set(weights) == {"TaskLoss", "Scaled"} for weights in told) and told[0] != told[-1]
    assert result.model.state_dict().keys() == task.model.state_dict().keys() and not result.plans
    plain = Finetune(epochs=1, objective=TaskLoss() + Scaled()).run(task.model, task, Context(1))
    assert "weights" not in plain.history[0]


def test_a_training_that_was_stopped_goes_on_with_the_same_weights(tmp_path):
    from tersor.core.progress import Progress

    task = make_task()
    objective = Adaptive(TaskLoss() + Scaled(50), updates=5)
    step = Finetune(epochs=3, objective=objective, optimizer=Optimizer(lr=0.02))
    whole = step.run(task.model, task, Context(1))

    class Stop(Exception):
        pass

    class Stopping(Progress):
        def track(self, items, description, total=None):
            if description == "epoch 3/3":
                raise Stop
            yield from items

    with pytest.raises(Stop):
        step.run(task.model, task, Context(1, tmp_path, Stopping()))
    resumed = step.run(task.model, task, Context(1, tmp_path))
    assert resumed.history[-1]["weights"] == whole.history[-1]["weights"]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_terms_of_one_kind_are_numbered():
    task = make_task()
    objective = Adaptive(Scaled(1) + Scaled(2) + TaskLoss())
    assert list(after_one_step(objective, task)[1]) == ["Scaled", "Scaled 2", "TaskLoss"]


def test_without_its_companion_it_says_what_to_do():
    task = make_task()
    with pytest.raises(InputError, match="Train with Finetune"):
        Adaptive(TaskLoss() + Scaled())(task.model, task.train[0], task)


def test_weights_change_only_when_it_is_time():
    task = make_task()
    objective = Adaptive(TaskLoss() + Scaled(9), updates=2)
    model = copy.deepcopy(task.model)
    Adapt(objective).begin(model, task)
    found = []
    for done in range(1, 11):
        with torch.no_grad():
            model[3].weight.mul_(1.5)
        Adapt(objective).after_step(Moment(model, task, None, done, 10))
        found.append(tuple(objective.weights(model).values()))
    assert [i + 1 for i in range(1, 10) if found[i] != found[i - 1]] == [5] and found[0] != (1.0, 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Adaptive(TaskLoss()),
        lambda: Adaptive(TaskLoss() + 0 * Scaled()),
        lambda: Adaptive(TaskLoss() + Scaled(), updates=0),
        lambda: Adaptive(TaskLoss() + Scaled(), batches=0),
        lambda: ValidationLoss(temperature=0),
        lambda: -1 * TaskLoss(),
        lambda: float("inf") * TaskLoss(),
    ],
)
def test_settings_out_of_range_are_errors(make):
    with pytest.raises(InputError):
        make()


def test_a_sum_whose_weights_are_all_zero_is_an_error_and_a_zero_term_is_not_computed():
    class Broken(Objective):
        def of(self, forward):
            raise AssertionError("not to be computed")

    task = make_task()
    total = (TaskLoss() + 0 * Broken())(task.model.eval(), task.train[0], task)
    assert torch.equal(total, TaskLoss()(task.model, task.train[0], task))
    with pytest.raises(InputError, match="all weights are zero"):
        Finetune(objective=0 * TaskLoss()).run(task.model, task, Context(1))
