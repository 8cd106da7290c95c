"""The one training loop and the one evaluation that every arm of the benchmark goes through."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tersor.core.randomness import seeded
from tersor.core.task import Task
from tersor.train.objective import Objective, TaskLoss
from tersor.train.precision import multiplies_bf16
from tersor.train.schedules import OneCycle
from tersor.zoo.batches import TensorBatches
from tersor.zoo.cifar import Images, augment


@dataclass(frozen=True)
class Budget:
    """SGD, Nesterov momentum 0.9, one cycle of the learning rate; in bfloat16 where the device multiplies in it."""

    epochs: int
    lr: float = 0.02
    weight_decay: float = 5e-4
    batch: int = 128


def train(
    model: nn.Module, images: Images, budget: Budget, seed: int, device: torch.device,
    objective: Objective = TaskLoss(), teacher: nn.Module | None = None,
) -> tuple[nn.Module, float]:  # fmt: skip
    """A trained copy of ``model`` (its last epoch, on the CPU, in eval mode) and the seconds it took.

    Order and augmentation of the batches depend on ``seed`` and the number of images alone, not on the model.
    """
    model = copy.deepcopy(model).to(device, memory_format=torch.channels_last).train()
    task = Task(model=model, reference=_still(teacher, device))
    batches = TensorBatches(images.images, images.targets, budget.batch, shuffle=True, augment=augment)
    optimizer = torch.optim.SGD(
        model.parameters(), budget.lr, momentum=0.9, nesterov=True, weight_decay=budget.weight_decay
    )
    steps, step, schedule, bf16 = budget.epochs * len(batches), 0, OneCycle(), multiplies_bf16(device)
    begun = time.monotonic()
    for epoch in range(budget.epochs):
        with seeded(1000 * seed + epoch):
            for x, targets in batches:
                for group in optimizer.param_groups:
                    group["lr"] = budget.lr * schedule.factor(step, steps)
                x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = objective(model, (x, targets.to(device, non_blocking=True)), task)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise RuntimeError(f"training diverged: {budget}, seed {seed}")
    model = model.cpu().to(memory_format=torch.contiguous_format).eval()
    return model, time.monotonic() - begun


def correct(model: nn.Module, images: Images, device: torch.device) -> NDArray[np.bool_]:
    """Which images ``model`` classifies rightly, in float32: bool [n]."""
    model = copy.deepcopy(model).to(device).eval()
    with torch.no_grad():
        right = [model(x.to(device)).argmax(1).cpu() == y for x, y in TensorBatches(images.images, images.targets, 500)]
    return torch.cat(right).numpy()


def task_of(model: nn.Module, training: Images, test: Images) -> Task:
    """What Tersor's methods are given. No decision is taken on ``validation``; calibration images are training images.

    Both arms train on all training images, so validation is part of them.
    """
    calibration = TensorBatches(training.images[:2048], training.targets[:2048], 128)
    return replace(
        Task(model=model, name="cifar10"), train=calibration, validation=calibration, calibration=calibration,
        test=TensorBatches(test.images, test.targets, 500), example_inputs=(training.images[:2],),
    ).complete()  # fmt: skip


def _still(teacher: nn.Module | None, device: torch.device) -> nn.Module | None:
    return None if teacher is None else copy.deepcopy(teacher).to(device).eval().requires_grad_(False)


def subset(images: Images, count: int | None) -> Images:
    """The first ``count`` images (None: all)."""
    return images if count is None else Images(images.images[:count], images.targets[:count])


def mean_of(right: NDArray[np.bool_]) -> float:
    """Per cent."""
    return 100 * float(np.mean(right))


def checksum(model: nn.Module) -> int:
    """Of the names and values of the model's state."""
    key = 0
    for name, value in model.state_dict().items():
        key = crc32(value.contiguous().numpy().tobytes(), crc32(name.encode(), key))
    return key
