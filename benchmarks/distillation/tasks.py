"""Fashion-MNIST with its teachers: residual networks, each seed its own, and a small vision transformer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.files import cache_folder
from tersor.core.progress import Progress
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.train.schedules import OneCycle
from tersor.zoo.batches import TensorBatches
from tersor.zoo.cache import cache_path, trained_once
from tersor.zoo.fashion import fashion
from tersor.zoo.residual import ResidualNet

student_network = partial(ResidualNet, widths=(16, 32, 64), blocks=1, in_channels=1, classes=10, stem_stride=2)


class Block(nn.Module):
    """A pre-norm transformer block of linear layers: [n, tokens, width] → the same shape."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """49 tokens from two strided convolutions, ``depth`` pre-norm blocks, their mean: [n, 1, 28, 28] → [n, 10].

    Convolutions before the first block: Xiao et al. 2021 (arXiv 2106.14881), without which five epochs are too few.
    """

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4):
        super().__init__()
        first = nn.Conv2d(1, width // 2, 3, 2, padding=1), nn.BatchNorm2d(width // 2), nn.ReLU()
        self.patches = nn.Sequential(*first, nn.Conv2d(width // 2, width, 3, 2, padding=1))
        self.position = nn.Parameter(0.02 * torch.randn(1, 49, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


def limited(task: Task, images: int | None, test: int | None) -> Task:
    """With fewer training and test images, to try it out."""
    for batches, count in ((task.train, images), (task.test, test)):
        if count is not None:
            assert isinstance(batches, TensorBatches)
            batches.images, batches.targets = batches.images[:count], batches.targets[:count]
    return task


def teacher_task(seed: int, epochs: int, progress: Progress) -> Task:
    """The data and a residual network trained from this seed, once, and kept in Tersor's cache."""
    return fashion(seed=seed, epochs=epochs, progress=progress)


def transformer(task: Task, epochs: int, progress: Progress) -> nn.Module:
    """A transformer trained on the task's data, once, and kept in Tersor's cache."""
    torch.manual_seed(0)
    model = VisionTransformer()
    count = len(task.train.images) if isinstance(task.train, TensorBatches) else 0
    path = cache_path(cache_folder(), "fashion-transformer", model, {"epochs": epochs, "images": count, "version": 2})

    def train() -> None:
        optimizer = Optimizer("adamw", 2e-3, weight_decay=0.05)
        step = Finetune(epochs, optimizer=optimizer, schedule=OneCycle(), precision="bf16", keep="last", clip=1.0)
        complete = replace(task, model=model).complete()
        model.load_state_dict(step.run(model, complete, Context(0, None, progress)).model.state_dict())

    trained_once(model, path, train, progress)
    return model.eval().requires_grad_(False)


def student_of(seed: int) -> nn.Module:
    """A student with weights of its own: the same for every arm of a seed."""
    torch.manual_seed(1000 + seed)
    return student_network()
