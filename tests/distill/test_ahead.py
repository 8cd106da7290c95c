import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.errors import InputError
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.distill.ahead import Ahead
from tersor.distill.cache import TeacherCache
from tersor.distill.response import Distill, SoftTargets
from tersor.train.finetune import Finetune
from tersor.train.objective import Forward


class Slow(nn.Linear):
    """A layer that takes its time, as a busy device does, while others may work, and knows when it did."""

    seconds, calls = 0.0, 0

    def forward(self, x):
        self.calls += 1
        begun = time.monotonic()
        time.sleep(self.seconds)
        spans = vars(self).setdefault("spans", [])
        spans.append((begun, time.monotonic()))
        return super().forward(x)


@pytest.fixture
def task():
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,))), batch_size=4, shuffle=True)
    teacher, student = Slow(4, 3).eval().requires_grad_(False), Slow(4, 3)
    return Task(student, data, data, data, reference=teacher)


def test_teacher_and_student_work_at_the_same_time(task):
    teacher, student = task.reference, task.model
    teacher.seconds = student.seconds = 0.03
    together = []
    for given in (task, Ahead("cpu").on(task)):
        teacher.spans, student.spans = [], []
        for batch in given.train:
            SoftTargets()(task.model, batch, given)
        together.append(sum(a[0] < b[1] and b[0] < a[1] for a in teacher.spans for b in student.spans))
    assert together[0] == 0 and together[1] >= 5
    facts = given.train.answers.facts()
    assert facts["batches_ahead"] == 8  # two batches are begun before anybody says how the teacher is asked
    assert "8 batches ahead" in given.train.answers.sentence()


def test_training_is_the_same_as_with_a_teacher_that_is_asked_when_it_is_needed(task, tmp_path):
    step = Finetune(epochs=3, objective=Distill())
    plain = step.run(task.model, task, Context(1)).history
    calls = task.reference.calls
    ahead = Ahead("cpu").on(task)
    assert [e["loss"] for e in step.run(task.model, ahead, Context(1)).history] == [e["loss"] for e in plain]
    assert task.reference.calls == 2 * calls
    cached = Ahead("cpu").on(TeacherCache(str(tmp_path), views=1, refresh=0).on(task))
    result = step.run(task.model, cached, Context(1))
    assert [e["loss"] for e in result.history] == pytest.approx([e["loss"] for e in plain], rel=1e-3)
    assert result.facts["teacher"]["hits"] == 80 and result.facts["teacher"]["batches_ahead"] > 20


def test_an_epoch_that_is_left_early_leaves_nothing_behind_and_the_next_is_right(task):
    given = Ahead("cpu").on(task)
    for stop in (3, 1, 100):
        for number, batch in enumerate(given.train):
            outputs = Forward(task.model, batch, given).reference_outputs
            assert torch.equal(
                outputs, nn.functional.linear(batch.batch[0], task.reference.weight, task.reference.bias)
            )
            if number == stop:
                break
    assert not given.train.answers._begun


def test_two_processes_take_turns(task):
    ordered = replace(task, train=[(torch.full((1, 4), float(n)), torch.tensor([0])) for n in range(5)])
    loader = Ahead("cpu").on(ordered).train
    parts = [[float(keyed.batch[0][0, 0]) for keyed in loader.shared(index, 2)] for index in range(2)]
    assert parts == [[0.0, 2.0], [1.0, 3.0]] and len(loader.shared(0, 2)) == 2


def test_an_error_of_the_teacher_is_the_training_s(task):
    task.reference.bias[0] = float("nan")
    given = Ahead("cpu").on(task)
    with pytest.raises(InputError, match="teacher's output is not finite"):
        for batch in given.train:
            SoftTargets()(task.model, batch, given)


def test_a_device_that_is_not_there_is_an_error(task):
    with pytest.raises(InputError, match="no such device"):
        Ahead("nonsense")
    with pytest.raises(InputError, match="task.reference: the task is not whole"):
        Ahead("cpu").on(replace(task, reference=None))
