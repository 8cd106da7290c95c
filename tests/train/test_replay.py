import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tersor.core.errors import InputError
from tersor.core.keyed import Keyed
from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.train.replay import replayed
from tersor.zoo.batches import TensorBatches, flip


class Augmented(Dataset):
    """Samples whose augmentation draws from all three global generators."""

    def __init__(self, count=12):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        noise = torch.rand(3) + float(np.random.rand()) + random.random()
        return number + 10 * noise, number % 2


def loader_of(kind, **how):
    if kind == "dataset":
        return DataLoader(Augmented(), batch_size=4, shuffle=True, **how)
    images = torch.arange(12.0)[:, None, None, None].repeat(1, 1, 2, 3)
    return TensorBatches(
        images, torch.arange(12), 4, shuffle=True, augment=lambda x: flip(x + torch.rand(len(x), 1, 1, 3))
    )


def by_sample(epoch):
    return {
        int(n): (x, int(y)) for keyed in epoch for n, x, y in zip(keyed.samples, *keyed.batch, strict=True)
    }  # fmt: skip


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n][0], b[n][0]) and a[n][1] == b[n][1] for n in a)


@pytest.mark.parametrize("kind", ["dataset", "tensors"])
def test_a_view_comes_again_in_another_order_and_views_differ(kind):
    loader = replayed(loader_of(kind), views=2)
    epochs = [list(loader) for _ in range(4)]
    assert [epoch[0].view for epoch in epochs] == [0, 1, 0, 1]
    views = [by_sample(epoch) for epoch in epochs]
    assert sorted(views[0]) == list(range(12))
    assert same(views[0], views[2]) and same(views[1], views[3])
    assert not any(torch.equal(views[0][n][0], views[1][n][0]) for n in range(12))
    orders = [torch.cat([keyed.samples for keyed in epoch]).tolist() for epoch in epochs]
    assert orders[0] != orders[2]
    assert not same(views[0], by_sample(replayed(loader_of(kind), views=2, seed=1)))


@pytest.mark.parametrize("kind", ["dataset", "tensors"])
def test_the_epoch_that_a_training_says_decides_view_and_order(kind):
    loader = replayed(loader_of(kind), views=3)
    found = []
    for _ in range(2):
        with seeded(5, loader, epoch=7):
            found.append(list(loader))
    assert [k.view for k in found[0]] == [1, 1, 1]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.samples, b.samples) and torch.equal(a.batch[0], b.batch[0])


@pytest.mark.parametrize("kind", ["dataset", "tensors"])
def test_the_caller_s_random_numbers_are_those_of_the_plain_order(kind):
    loader = replayed(loader_of(kind), views=1)
    iterator = iter(loader)
    next(iterator)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    next(iterator)
    assert torch.equal(torch.rand(2), expected)


def test_workers_give_what_the_main_process_gives():
    here = by_sample(replayed(loader_of("dataset"), views=1))
    there = by_sample(replayed(loader_of("dataset", num_workers=2), views=1))
    assert same(here, there)


@pytest.mark.parametrize("kind", ["dataset", "tensors"])
def test_two_processes_share_the_batches_of_one_order(kind):
    whole, parts = replayed(loader_of(kind), 1), [replayed(loader_of(kind), 1).shared(i, 2) for i in range(2)]
    drawn = []
    for loader in (whole, *parts):
        with seeded(1, loader):
            drawn.append([keyed.samples.tolist() for keyed in loader])
    assert [len(part) for part in parts] == [1, 1]  # of three batches the last round is incomplete
    assert [drawn[1][0], drawn[2][0]] == drawn[0][:2]


def test_a_task_reads_a_keyed_batch_as_the_batch_itself():
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))
    plain = DataLoader(TensorDataset(x, y), batch_size=3)
    model = nn.Linear(4, 3)
    task, keyed = Task(model, plain, plain, plain), next(iter(replayed(plain)))
    assert isinstance(keyed, Keyed)
    batch = x[:3], y[:3]
    assert torch.equal(task.targets(keyed), y[:3]) and torch.equal(task.inputs(keyed)[0][0], x[:3])
    assert torch.equal(task.loss_of(model, keyed), task.loss_of(model, batch))
    assert torch.equal(task.outputs(model, keyed.to("cpu")), model(x[:3]))
    own = Task(model, plain, loss=lambda model, batch: model(batch[0]).sum() + len(batch))
    assert torch.equal(own.loss_of(model, keyed), model(x[:3]).sum() + 2)


class Unending(IterableDataset):
    def __iter__(self):
        return islice(iter(torch.zeros(9)), 9)


class OwnGenerator(Augmented):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def __getitem__(self, number):
        return torch.rand(3, generator=self.generator), 0


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ([(torch.zeros(2), torch.zeros(2))], "cannot say which samples"),
        (DataLoader(Unending()), "have no numbers"),
        (DataLoader(Augmented(), batch_size=None), "makes its batches itself"),
        (DataLoader(OwnGenerator()), "fetched twice with the same seed is not the same"),
    ],
)
def test_loaders_that_cannot_come_again_are_refused(loader, words):
    with pytest.raises(InputError, match=words):
        replayed(loader)


@pytest.mark.parametrize("views", [0, -1, 1.5, True])
def test_views_are_a_whole_number_from_one(views):
    with pytest.raises(InputError, match="too few views"):
        replayed(loader_of("tensors"), views=views)
