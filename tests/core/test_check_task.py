import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tersor.core.check_task import check_task
from tersor.core.errors import InputError, VerificationError
from tersor.core.task import Metric, Task

X = torch.linspace(-1, 1, 32).reshape(8, 4)
Y = torch.arange(8) % 3
GOOD = [(X, Y), (X + 1, Y), (X + 2, Y)]
HELD_OUT, TEST = ([(x + shift, y) for x, y in GOOD] for shift in (0.1, 0.2))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def task(**changes):
    parts = {"model": net(), "train": GOOD, "validation": HELD_OUT, "test": TEST, **changes}
    return Task(**parts).complete()


def refused(pattern, **changes):
    with pytest.raises(InputError, match=pattern) as caught:
        check_task(task(**changes))
    return caught.value


def spoilt(values, index, value):
    values = values.clone()
    values[index] = value
    return values


def test_a_sound_task_passes_without_notes():
    assert check_task(task()) == ()


def test_nothing_is_disturbed():
    sound = task()
    sound.model[2].eval()
    state = {name: value.clone() for name, value in sound.model.state_dict().items()}
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    check_task(sound)
    assert torch.equal(before[0], torch.get_rng_state()) and before[2] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()
    assert all(torch.equal(value, state[name]) for name, value in sound.model.state_dict().items())
    assert [module.training for module in sound.model] == [True, True, False, True]
    assert all(parameter.grad is None for parameter in sound.model.parameters())


def test_only_a_few_batches_are_read():
    class Counting:
        read = 0

        def __iter__(self):
            for batch in GOOD * 100:
                self.read += 1
                yield batch

    loader = Counting()
    check_task(task(train=loader, calibration=GOOD))
    assert loader.read <= 8


@pytest.mark.parametrize("split", ["train", "validation", "test", "calibration"])
def test_nan_in_the_inputs_is_named_with_split_and_batch(split):
    batches = [GOOD[0], (spoilt(X, (2, 1), float("nan")), Y)]
    error = refused("not finite", **{split: batches})
    assert f"task.{split}, batch 1, input 0" in error.where and "[2, 1]" in error.got


def test_infinite_targets_of_a_regression_are_named():
    sound, spoiled = [(X, X[:, :3])], [(X, spoilt(X[:, :3], (0, 0), float("inf")))]
    error = refused("not finite", train=sound, validation=sound, test=spoiled)
    assert error.where == "task.test, batch 0, targets"


@pytest.mark.parametrize(("value", "batch"), [(3, 0), (-1, 2), (1000, 1), (-100, 0)])
def test_a_target_out_of_range_is_named_with_split_batch_and_value(value, batch):
    batches = [*GOOD[:batch], (X, spoilt(Y, 5, value))]
    error = refused("out of range", validation=batches)
    assert error.where == f"task.validation, batch {batch}" and error.got == f"target {value} of sample 5"
    assert "0 to 2" in error.expected


def test_sequences_may_leave_targets_out():
    y = spoilt(torch.stack([Y, Y], 1), (0, 0), -100)
    x = torch.stack([X, X], 1)
    per_sequence = Metric("accuracy", lambda o, t: (o.argmax(-1) == t).float().mean(1))
    model = nn.Linear(4, 3)
    assert check_task(Task(model, [(x, y)], [(-x, y)], [(2 * x, y)], metric=per_sequence).complete()) == ()


def test_a_generator_is_refused_as_readable_only_once():
    error = refused("read only once", validation=(batch for batch in GOOD))
    assert error.where == "task.validation" and "generator" in error.got


def test_an_empty_loader_is_named():
    loader = DataLoader(TensorDataset(X, Y), batch_size=100, drop_last=True)
    assert refused("empty", test=loader).where == "task.test"


def test_a_loader_that_cannot_be_iterated_over_is_refused():
    assert refused("cannot be iterated", test=7).where == "task.test"


def test_a_dataset_that_raises_is_named():
    class Broken:
        def __iter__(self):
            yield GOOD[0]
            raise FileNotFoundError("image 17.png")

    assert "image 17.png" in refused("the loader fails", test=Broken()).got


@pytest.mark.parametrize("batch", [X, (X,), {"inputs": X}, "text"])
def test_a_batch_of_an_unknown_structure_is_named(batch):
    assert refused("unknown structure", test=[batch]).where == "task.test, batch 0"


def test_inputs_and_targets_must_be_of_one_length():
    assert "[8, 4]" in refused("differ in length", test=[(X, Y[:5])]).got


def test_targets_that_are_no_tensor_are_refused():
    refused("targets are no tensor", test=[(X, [0] * 8)])


def test_a_model_that_is_no_module_is_refused():
    refused("no torch.nn.Module", model=lambda x: x, reference=net())


@pytest.mark.parametrize("example", [X, [X], (), (X.numpy(),)])
def test_example_inputs_must_be_a_tuple_of_tensors(example):
    refused("tuple of tensors", example_inputs=example)


def test_weights_that_are_not_finite_are_named():
    model = net()
    with torch.no_grad():
        model[3].bias[0] = float("nan")
    error = refused("weights are not finite", model=model)
    assert error.where == "task.model, 3.bias" and error.got.startswith("1 NaN and 0 infinite of ")


def test_a_model_that_does_not_fit_its_data_is_an_input_error():
    error = refused("does not run", test=[(X[:, :3], Y)])
    assert error.where == "task.test, batch 0" and "RuntimeError" in error.got


def test_outputs_that_are_not_finite_are_found():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(x) + torch.log(x[:, :1])

    with pytest.raises(VerificationError, match="not finite for 4 of 8 samples"):
        check_task(task(model=Log()))


def test_a_loss_that_is_no_scalar_is_refused():
    refused("no scalar", loss=lambda model, batch: model(batch[0]))


def test_a_loss_that_is_not_finite_is_refused():
    refused("loss is not finite", loss=lambda model, batch: model(batch[0]).sum() * float("nan"))


def test_a_loss_without_a_gradient_is_refused():
    refused("no gradient", model=net().requires_grad_(False))


def test_a_loss_that_raises_is_an_input_error():
    assert "KeyError" in refused("loss cannot be computed", loss=lambda model, batch: {}["missing"]).got


def test_a_metric_of_a_strange_shape_is_refused():
    metric = Metric("accuracy", lambda outputs, targets: (outputs.argmax(-1) == targets).float().mean())
    assert refused("one value per sample", metric=metric).got == "shape []"


def test_a_shuffling_loader_draws_from_the_common_seed_and_gives_no_note():
    shuffling = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    assert check_task(task(train=shuffling)) == ()


def test_a_loader_s_own_generator_is_seeded_and_gives_no_note():
    own = torch.Generator().manual_seed(3)
    shuffling = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, generator=own)
    assert check_task(task(train=shuffling)) == ()


def test_randomness_hidden_in_the_dataset_gives_a_note():
    class Noisy(Dataset):
        hidden = np.random.default_rng(3)

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return X[index] + float(self.hidden.normal()), Y[index]

    (note,) = check_task(task(train=DataLoader(Noisy(), batch_size=2)))
    assert "randomness of its own" in note and "resumed run" in note


def test_a_task_that_is_not_completed_is_refused():
    with pytest.raises(InputError, match="task.calibration: the task is not completed"):
        check_task(Task(net(), GOOD, GOOD, GOOD))


def test_deciding_on_the_test_data_gives_a_note():
    (note,) = check_task(task(train=TEST, validation=GOOD, test=GOOD))
    assert "validation and test are the same data" in note


def distances(outputs, targets):
    return 44 + (outputs[:, 0] - targets).abs()


def test_a_metric_that_is_no_fraction_must_say_its_unit():
    error = refused('unit is "fraction"', metric=Metric("mae_points", distances))
    assert error.where == "task.train, batch 0, metric mae_points" and error.got.startswith("4")
    assert 'Metric("mae_points", f, unit="…", higher_is_better=False)' in error.do
    refused('unit is "fraction"', metric=Metric("minus", lambda o, t: -(o.argmax(-1) == t).float() - 0.5))
    assert check_task(task(metric=Metric("mae_points", distances, unit="points", higher_is_better=False))) == ()


@pytest.mark.parametrize(
    "targets, got, expected, do",
    [
        (Y.float(), "torch.float32 [8]", "torch.int64 [8] (or", "targets.long()"),
        (Y.int(), "torch.int32 [8]", "torch.int64 [8]", "targets.long()"),
        (Y[:, None], "torch.int64 [8, 1]", "torch.int64 [8]", "targets.squeeze(-1), in"),
        (Y[:, None].float(), "torch.float32 [8, 1]", "torch.int64 [8]", "targets.squeeze(-1).long()"),
        (nn.functional.one_hot(Y), "torch.int64 [8, 3]", "torch.int64 [8]", "One-hot labels: targets.argmax(-1)"),
    ],
)
def test_labels_of_another_type_or_shape_are_named_with_what_to_write(targets, got, expected, do):
    batches = [(X, targets)]
    error = refused("class labels must be", train=batches, validation=batches, test=batches)
    assert error.got == f"{got} for outputs [8, 3]" and error.expected.startswith(expected) and do in error.do
    assert error.where.startswith("task.")


def test_labels_for_a_loss_and_a_metric_of_the_users_own_may_be_anything():
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1].flatten().long())

    metric = Metric("right", lambda outputs, targets: (outputs.argmax(-1) == targets.flatten()).float())
    for targets in (Y.float(), Y.int(), Y[:, None]):
        batches = [(X, targets)]
        check_task(task(train=batches, loss=loss, metric=metric))


@pytest.mark.parametrize("split, other", [("validation", "test"), ("train", "test"), ("train", "validation")])
def test_splits_that_begin_with_the_same_samples_are_noted(split, other):
    data = TensorDataset(X.flip(0), Y)
    (note,) = check_task(task(**{split: DataLoader(data, batch_size=8), other: DataLoader(data, batch_size=4)}))
    assert note.startswith(f"{split} and {other} are the same data, at least their first 4 samples: ")


def test_different_data_give_no_note_however_alike():
    alike = [(X, Y.flip(0))]  # the same inputs, other targets
    assert check_task(task(validation=[(X, Y)], test=alike, train=[(X[:4] + 1, Y[:4])])) == ()
    black = [(torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64))]
    assert check_task(task(validation=black, test=list(black))) == ()


@pytest.mark.parametrize("loss", [None, lambda model, batch: model(batch[0]).square().mean()])
def test_a_token_s_target_out_of_range_is_named_under_a_loss_of_its_own_too(loss):
    tokens, labels = torch.arange(12).reshape(4, 3) % 5, torch.arange(12).reshape(4, 3) % 4
    wrong = [(tokens, spoilt(labels, (2, 1), 5))]
    found = {"model": nn.Embedding(5, 5), "train": [(tokens, labels)], "validation": wrong, "loss": loss}
    assert refused("out of range", **found).got == "target 5 of sample 2"
