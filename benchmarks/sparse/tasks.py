"""The networks and the data: for every seed a task of its own."""

from __future__ import annotations

import torch

from benchmarks.structured.data import cifar10
from tersor.core.metric import ACCURACY
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.zoo.batches import TensorBatches
from tersor.zoo.cifar import augment, trained_resnet20
from tersor.zoo.fashion import fashion

CALIBRATION = 1024
VALIDATION = 1000


def fashion_task(seed: int, images: int | None, test: int | None, original_epochs: int, progress: Progress) -> Task:
    """Fashion-MNIST and a residual network that is trained from this seed, once, and kept in Tersor's cache."""
    task = fashion(seed=seed, epochs=original_epochs, progress=progress)
    return _limited(task, images, test)


def cifar_task(seed: int, images: int | None, test: int | None) -> Task | None:
    """CIFAR-10 and the trained ResNet-20, the same for every seed, which draws the calibration images; None where there
    is no checkpoint. Nothing is chosen on validation, whose images are training images."""
    model = trained_resnet20()
    if model is None:
        return None
    training, tested = cifar10()
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    some, last = order[:CALIBRATION], order[-VALIDATION:]
    task = Task(
        model=model, name="cifar10", metric=ACCURACY, example_inputs=(training.images[:2],),
        train=TensorBatches(training.images, training.targets, 128, shuffle=True, augment=augment),
        validation=TensorBatches(training.images[last], training.targets[last], 250),
        test=TensorBatches(tested.images, tested.targets, 250),
        calibration=TensorBatches(training.images[some], training.targets[some], 128),
    )  # fmt: skip
    return _limited(task, images, test)


def _limited(task: Task, images: int | None, test: int | None) -> Task:
    """With fewer training and test images, to try it out."""
    for batches, count in ((task.train, images), (task.test, test)):
        if count is not None:
            assert isinstance(batches, TensorBatches)
            batches.images, batches.targets = batches.images[:count], batches.targets[:count]
    return task.complete()
