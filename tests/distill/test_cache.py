import errno
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.distill.cache import TeacherCache
from tersor.distill.features import Hints
from tersor.distill.response import Distill
from tersor.distill.stored_answer import decode, encode
from tersor.train.finetune import Finetune
from tersor.train.objective import Forward
from tersor.train.replay import replayed
from tersor.train.teacher import Answer
from tersor.zoo.batches import TensorBatches

SAMPLES, BATCH, CLASSES = 48, 8, 6
BATCHES = SAMPLES // BATCH


class Counting(nn.Module):
    """A teacher that counts the rows that it is given; ``sharpness`` shows in nothing but its outputs."""

    def __init__(self, sharpness=1.0):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.rows, self.sharpness = nn.Linear(4, CLASSES).requires_grad_(False), 0, sharpness

    def forward(self, x):
        self.rows += len(x)
        return self.sharpness * 5 * self.layer(x)


class Heard(Progress):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


class Shifted(Dataset):
    def __init__(self, shift=0.0):
        self.x, self.shift = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(2)), shift

    def __len__(self):
        return SAMPLES

    def __getitem__(self, number):
        return self.x[number] + 0.1 * torch.rand(4) + self.shift, number % CLASSES


def task_of(teacher, shift=0.0):
    data = DataLoader(Shifted(shift), batch_size=BATCH, shuffle=True)
    return Task(nn.Linear(4, CLASSES), data, data, data, reference=teacher.eval())


def epoch(task, model=None):
    """An epoch's answers and what the teacher itself says, by sample."""
    model, answers, truth = model or task.model, {}, {}
    for keyed in task.train:
        rows = task.reference.rows
        outputs = Forward(model, keyed, task).reference_outputs
        asked = task.reference.rows - rows
        expected = task.reference(keyed.batch[0])
        task.reference.rows = rows + asked
        for n, a, b in zip(keyed.samples.tolist(), outputs, expected, strict=True):
            answers[n], truth[n] = a, b
    return torch.stack([answers[n] for n in sorted(answers)]), torch.stack([truth[n] for n in sorted(truth)])


def within_fp16(a, b):
    return bool(((a - b).abs() <= 2**-10 * b.abs() + 1e-6).all())


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "cache")


def test_the_teacher_is_asked_once_for_each_view_of_each_sample(folder):
    teacher = Counting()
    task = TeacherCache(folder, views=2, refresh=0).on(task_of(teacher))
    asked = []
    for _ in range(5):
        teacher.rows = 0
        answers, truth = epoch(task)
        assert answers.shape == (SAMPLES, CLASSES) and within_fp16(answers, truth)
        asked.append(teacher.rows)
    assert asked == [SAMPLES, SAMPLES, 0, 0, 0]
    facts = task.train.answers.facts()
    assert (facts["hits"], facts["computed"], facts["written"]) == (3 * SAMPLES, 2 * SAMPLES, 2 * SAMPLES)
    assert facts["refused"] == 0 and facts["bytes"] > 0 and facts["notes"] == []
    assert "144 of 240 from disk" in task.train.answers.sentence()


def test_another_process_computes_the_first_batch_to_compare_and_reads_the_rest(folder):
    epoch(TeacherCache(folder, views=1).on(task_of(Counting())))
    again, heard = Counting(), Heard()
    task = TeacherCache(folder, views=1).on(task_of(again), heard)
    answers, truth = epoch(task)
    assert within_fp16(answers, truth) and again.rows == BATCH and heard.said == []
    assert task.train.answers.facts()["checked"] == BATCH


def test_a_fraction_of_the_batches_is_refreshed(folder):
    teacher = Counting()
    task = TeacherCache(folder, views=1, refresh=0.25).on(task_of(teacher))
    epoch(task)
    teacher.rows = 0
    for _ in range(4):
        epoch(task)
    assert teacher.rows == 4 * BATCHES // 4 * BATCH == task.train.answers.facts()["checked"]


def test_training_with_the_cache_is_training_without_it(folder):
    torch.manual_seed(0)
    images, targets = torch.randn(96, 4, 1, 1), torch.randint(0, CLASSES, (96,))
    batches = TensorBatches(images, targets, 16, shuffle=True, augment=lambda x: x + 0.1 * torch.rand(len(x), 1, 1, 1))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES)).eval().requires_grad_(False)
    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    task = Task(student, batches, batches, batches, reference=teacher)
    cache = TeacherCache(folder, views=2)
    step, histories = Finetune(epochs=5, objective=Distill()), []
    for given in (replace(task, train=replayed(batches, 2)), cache.on(task), cache.on(task)):
        heard = Heard()
        result = step.run(student, given, Context(3, progress=heard))
        histories.append([entry["loss"] for entry in result.history])
    assert result.facts["teacher"]["hits"] >= 4 * 96 and any("teacher cache: " in text for text in heard.said)
    plain, cold, warm = histories
    assert cold == pytest.approx(plain, rel=1e-3) and cold != plain
    assert warm == pytest.approx(cold, rel=1e-6)


@pytest.mark.parametrize("what", ["weights", "data", "forward"])
def test_another_teacher_or_other_data_is_never_answered_from_what_was_stored(folder, what):
    epoch(TeacherCache(folder, views=1).on(task_of(Counting())))
    teacher, heard = Counting(sharpness=1.5 if what == "forward" else 1.0), Heard()
    if what == "weights":
        teacher.layer.weight[0, 0] += 1e-3
    task = TeacherCache(folder, views=1).on(task_of(teacher, shift=1.0 if what == "data" else 0.0), heard)
    answers, truth = epoch(task)
    assert within_fp16(answers, truth) and teacher.rows == SAMPLES
    assert task.train.answers.facts()["refused"] == {"weights": 0, "data": SAMPLES, "forward": SAMPLES - BATCH}[what]
    assert any("differs from what the teacher says now" in text for text in heard.said) == (what == "forward")
    teacher.rows = 0
    answers, truth = epoch(task)
    assert within_fp16(answers, truth) and teacher.rows == (BATCH if what == "data" else 0)  # the first one compared


def test_damaged_answers_are_computed_again(folder):
    epoch(TeacherCache(folder, views=1).on(task_of(Counting())))
    (path,) = _records(folder)
    data = bytearray(path.read_bytes())
    size = len(data) // SAMPLES
    data[5 * size + 20] ^= 4
    data[9 * size : 10 * size] = bytes(size)
    path.write_bytes(data)
    teacher = Counting()
    task = TeacherCache(folder, views=1).on(task_of(teacher))
    assert within_fp16(*epoch(task)) and teacher.rows in (BATCH, BATCH + 1, BATCH + 2)
    assert task.train.answers.facts()["refused"] == 1
    teacher.rows = 0
    assert within_fp16(*epoch(task)) and teacher.rows == 0


def _records(folder):
    return list(Path(folder).glob("*/records.bin"))


def test_beyond_the_budget_the_teacher_is_asked_each_time_for_those_rows_alone(folder):
    size, teacher, heard = 32, Counting(), Heard()
    task = TeacherCache(folder, views=1, refresh=0, budget_bytes=20 * size).on(task_of(teacher), heard)
    for rows in (SAMPLES, SAMPLES - 20, SAMPLES - 20):
        teacher.rows = 0
        assert within_fp16(*epoch(task)) and teacher.rows == rows
    assert [text for text in heard.said if "hold 20 of 48 answers" in text] == heard.said


def test_a_full_disk_is_said_once_and_what_was_written_is_used(folder, monkeypatch):
    write, written = os.pwrite, []

    def pwrite(file, data, offset):
        if len(written) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(offset)
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    teacher, heard = Counting(), Heard()
    task = TeacherCache(folder, views=1, refresh=0).on(task_of(teacher), heard)
    assert within_fp16(*epoch(task)) and teacher.rows == SAMPLES
    teacher.rows = 0
    assert within_fp16(*epoch(task)) and teacher.rows == SAMPLES - 10
    assert len(heard.said) == 1 and "its disk is full: going on without keeping answers" in heard.said[0]
    assert task.train.answers.facts()["notes"][0] in heard.said[0]


def test_a_folder_that_cannot_be_made_is_said_and_the_teacher_is_asked(tmp_path):
    (tmp_path / "file").write_text("")
    teacher, heard = Counting(), Heard()
    task = TeacherCache(str(tmp_path / "file" / "cache"), views=1).on(task_of(teacher), heard)
    assert within_fp16(*epoch(task)) and teacher.rows == SAMPLES
    assert len(heard.said) == 1 and "cannot be used (Not a directory)" in heard.said[0]


def test_a_read_only_folder_is_read_and_nothing_is_added(folder, monkeypatch):
    epoch(TeacherCache(folder, views=1).on(task_of(Counting())))
    opened = os.open

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_RDWR | os.O_WRONLY) and str(path).startswith(folder):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *rest, **more)

    def no_lock(self):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr("tersor.distill.records.Shelf._locked", no_lock)
    teacher, heard = Counting(), Heard()
    task = TeacherCache(folder, views=2).on(task_of(teacher), heard)
    assert within_fp16(*epoch(task)) and teacher.rows == BATCH
    assert within_fp16(*epoch(task)) and teacher.rows == BATCH + SAMPLES
    assert len(heard.said) == 1 and "read-only: what it holds is used, nothing is added" in heard.said[0]


def test_under_autocast_the_answers_are_others(folder):
    teacher = Counting()
    task = TeacherCache(folder, views=1, refresh=0).on(task_of(teacher))
    epoch(task)
    for rows in (SAMPLES, 0):
        teacher.rows = 0
        with torch.autocast("cpu", torch.bfloat16):
            epoch(task)
        assert teacher.rows == rows
    assert len(_records(folder)) == 2


def test_layers_are_kept_beside_the_outputs(folder):
    teacher = Counting()
    task = TeacherCache(folder, views=1, refresh=0).on(task_of(teacher))
    answers, asked = task.train.answers, []

    def ask(inputs):
        asked.append(len(inputs[0][0]))
        return Answer(teacher(inputs[0][0]), {"hidden": inputs[0][0] * 3, "tokens": torch.arange(len(inputs[0][0]))})

    for _ in range(2):
        for keyed in task.train:
            answer = answers.answer(keyed, ((keyed.batch[0],), {}), ("hidden", "tokens"), ask)
            assert within_fp16(answer.layers["hidden"], keyed.batch[0] * 3)
            assert answer.layers["tokens"].dtype == torch.int64 and len(answer.layers["tokens"]) == BATCH
    assert asked == [BATCH] * BATCHES
    with pytest.raises(InputError, match="a row for each sample, and this layer gives none"):
        encode(Answer(torch.zeros(4, 2), {"scale": torch.zeros(3)}), None)


def test_feature_losses_read_the_teacher_s_layers_from_the_cache(folder):
    torch.manual_seed(0)
    teacher = nn.Sequential(Counting(), nn.ReLU(), nn.Linear(CLASSES, CLASSES)).eval().requires_grad_(False)
    data = DataLoader(Shifted(), batch_size=BATCH, shuffle=True)
    student = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    task = Task(student, data, data, data, reference=teacher)
    step, losses = Finetune(epochs=3, objective=Distill() + 0.5 * Hints({"1": "1"})), []
    for given in (replace(task, train=replayed(data, 1)), TeacherCache(folder, views=1, refresh=0).on(task)):
        teacher[0].rows = 0
        losses.append([entry["loss"] for entry in step.run(student, given, Context(1)).history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert teacher[0].rows <= 3 * SAMPLES  # once to train, once for the review
    schemas = [Path(found).with_name("schema.json").read_text() for found in _records(folder)]
    assert any('"layer ' in columns for columns in schemas)


@pytest.mark.parametrize("shape", [(7, 50), (3, 4, 50)])
def test_the_largest_logits_keep_their_probabilities_and_the_rest_its_mass(shape):
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape)
    kept = decode(encode(Answer(logits), 5), torch.device("cpu")).outputs
    p, q = logits.softmax(-1), kept.softmax(-1)
    values, top = p.topk(5, dim=-1)
    assert torch.allclose(q.gather(-1, top), values, rtol=5e-3)
    assert torch.allclose(q.sum(-1) - q.gather(-1, top).sum(-1), 1 - values.sum(-1), rtol=1e-2, atol=1e-4)
    assert torch.equal(decode(encode(Answer(logits), 50), torch.device("cpu")).outputs, logits.half().float())


def test_a_cache_of_the_largest_logits_gives_their_mass(folder):
    teacher = Counting()
    task = TeacherCache(folder, views=1, top_k=2, refresh=0.5).on(task_of(teacher))
    cold, warm = epoch(task), epoch(task)
    assert torch.equal(cold[0], warm[0])
    exact, kept = warm[1].softmax(-1), warm[0].softmax(-1)
    assert torch.allclose(kept.topk(2).values, exact.topk(2).values, rtol=1e-2)
    assert math.isclose(float(kept.sum()), SAMPLES, rel_tol=1e-5) and not within_fp16(*warm)


def test_answers_beyond_fp16_are_given_as_they_are_and_not_kept(folder):
    teacher, heard = Counting(sharpness=1e5), Heard()
    task = TeacherCache(folder, views=1).on(task_of(teacher), heard)
    for _ in range(2):
        answers, truth = epoch(task)
        assert torch.allclose(answers, truth, rtol=1e-3)
    assert sum("beyond the range of fp16" in text for text in heard.said) == 1


class Sequences(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, number):
        return torch.full((2 + number // 4,), float(number)), torch.tensor(0)


def test_batches_of_several_lengths_are_computed_and_that_is_said(folder):
    data = DataLoader(Sequences(), batch_size=4)
    teacher = nn.Identity()
    task = Task(nn.Identity(), data, data, data, reference=teacher)
    heard = Heard()
    cached = TeacherCache(folder, views=1).on(task, heard)
    for _ in range(2):
        for keyed in cached.train:
            assert torch.equal(Forward(nn.Identity(), keyed, cached).reference_outputs, keyed.batch[0])
    assert len(heard.said) == 1 and "pad to a fixed one" in heard.said[0]


@pytest.mark.parametrize(
    "wrong", [{"views": 0}, {"top_k": 0}, {"budget_bytes": 0}, {"refresh": -0.1}, {"refresh": 1.5}]
)
def test_settings_out_of_range_are_errors(wrong):
    with pytest.raises(InputError, match=f"TeacherCache.{next(iter(wrong))}"):
        TeacherCache("somewhere", **wrong)


def test_a_cache_needs_a_teacher_and_training_data(folder):
    model = nn.Linear(4, CLASSES)
    with pytest.raises(InputError, match="there is no teacher"):
        TeacherCache(folder).on(Task(model, train=[]))
    with pytest.raises(InputError, match="there is no training data"):
        TeacherCache(folder).on(Task(model, reference=model))


def test_a_teacher_that_gives_nan_is_an_error_that_names_the_row(folder):
    teacher = Counting()
    teacher.layer.bias[1] = float("nan")
    task = TeacherCache(folder).on(task_of(teacher))
    with pytest.raises(InputError, match="in 8 of 8 rows of the batch, first in row 0"):
        epoch(task)
