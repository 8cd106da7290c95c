from dataclasses import replace

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.train.recalibrate import RecalibrateBatchNorm


@pytest.fixture
def task():
    torch.manual_seed(0)
    batches = [(3 + 2 * torch.randn(16, 4), torch.zeros(16, dtype=torch.long)) for _ in range(5)]
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].running_mean.fill_(100.0)
    return Task(model, batches, batches, batches).complete()


def test_statistics_become_the_mean_over_the_batches_without_dropout(task):
    result = RecalibrateBatchNorm(batches=3).run(task.model, task, Context(1))
    first = [inputs for inputs, _ in task.train[:3]]
    assert torch.allclose(result.model[1].running_mean, torch.stack([x.mean(0) for x in first]).mean(0), atol=1e-5)
    assert torch.allclose(result.model[1].running_var, torch.stack([x.var(0) for x in first]).mean(0), atol=1e-5)
    assert result.model[1].momentum == 0.1 and result.facts == {"recalibrated": 1}


def test_nothing_else_changes_and_the_model_given_stays(task):
    task.model.train()
    result = RecalibrateBatchNorm().run(task.model, task)
    assert (task.model[1].running_mean == 100).all() and task.model.training
    assert not any(module.training for module in result.model.modules())
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), task.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_a_model_without_batch_norm_comes_back_as_it_was_and_that_is_said(task):
    class Listening(Progress):
        said = ""

        def say(self, text):
            self.said = text

    progress = Listening()
    model = nn.Linear(4, 2)
    result = RecalibrateBatchNorm().run(model, task, Context(progress=progress))
    assert "no batch norm" in progress.said and torch.equal(result.model.weight, model.weight)


def test_no_batches_are_an_error(task):
    with pytest.raises(InputError, match="RecalibrateBatchNorm.batches"):
        RecalibrateBatchNorm(batches=0)
    with pytest.raises(InputError, match="task.train: the loader is empty"):
        RecalibrateBatchNorm().run(task.model, Task(task.model, [], task.validation, task.test), Context())


def test_a_batch_that_cannot_be_read_or_run_is_named(task):
    def vanishing():
        yield task.train[0]
        raise FileNotFoundError("image 17.png")

    class Loader:
        def __iter__(self):
            return vanishing()

    said = "task.train, batch 1: the loader fails. Got FileNotFoundError: image 17.png"
    with pytest.raises(InputError, match=said):
        RecalibrateBatchNorm().run(task.model, replace(task, train=Loader()))
    short = [*task.train[:2], (torch.randn(4, 3), torch.zeros(4))]
    with pytest.raises(InputError, match="task.train, batch 2: the model does not run on this batch"):
        RecalibrateBatchNorm().run(task.model, replace(task, train=short))


def test_a_task_without_training_data_is_named(task):
    bare = Task(task.model, calibration=task.train)
    with pytest.raises(InputError, match=r"the task has no training data. Expected Task\(train=DataLoader\)"):
        RecalibrateBatchNorm().run(task.model, bare)
