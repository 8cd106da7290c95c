"""How the built-in tasks' original models are trained: a plain loop, one-cycle SGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.progress import Progress
from tersor.train.precision import multiplies_bf16
from tersor.zoo.batches import TensorBatches


@dataclass(frozen=True)
class Training:
    """A schedule: ``epochs`` of SGD with Nesterov momentum 0.9, its learning rate rising to ``peak_lr``, then to zero.

    ``bf16``: forward and backward in bfloat16 where the processor multiplies in it.
    Source: Smith and Topin 2017 (arXiv 1708.07120).
    """

    epochs: int
    peak_lr: float
    weight_decay: float = 5e-4
    bf16: bool = False


def fit(model: nn.Module, batches: TensorBatches, training: Training, progress: Progress, title: str) -> None:
    """Train ``model`` in place and leave it in eval mode. Order and augmentation follow torch's global generator."""
    bf16 = training.bf16 and multiplies_bf16(torch.device("cpu"))
    model.train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), training.peak_lr, momentum=0.9, nesterov=True, weight_decay=training.weight_decay
    )
    steps = training.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.peak_lr, total_steps=steps)
    every_batch = (batch for _ in range(training.epochs) for batch in batches)
    for images, targets in progress.track(every_batch, title, steps):
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images).float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()
