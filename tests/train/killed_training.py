"""Run as a program by test_checkpoint.py: trains in child processes that are killed, and again to the end.

Usage: killed_training.py FOLDER. Prints JSON: for each kind of model and each moment, what came out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.step import Context, Every
from tersor.core.task import Task
from tersor.distill.response import Distill
from tersor.train import checkpoint, midway
from tersor.train.average import Average
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer

EPOCHS = 4


class Augmented(Dataset):
    """Noise from all three generators, drawn anew at each look."""

    def __init__(self, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 1, 6, 6, generator=generator)
        self.y = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.randn(1) + float(np.random.randn()) + random.gauss(0, 1)
        return self.x[index] + 0.1 * noise, self.y[index]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(128, 3)

    def forward(self, x):
        return self.fc(self.dropout(F.relu(self.bn(self.conv(x))).flatten(1)))


def edited(model: nn.Module) -> nn.Module:
    weight = TensorPlace("conv", "weight")
    scale = model.conv.weight.detach().abs().amax(dim=(1, 2, 3)) / 127
    keep = torch.rand(8, 1, 3, 3) < 0.5
    quantizers = (
        Quantizer((weight,), scale, torch.zeros(8, dtype=torch.int32), -128, 127, axis=0),
        Quantizer((ActivationPlace("", "relu"),), torch.tensor(0.02), torch.tensor(0, dtype=torch.int32), 0, 255),
    )
    return apply(model, Plan("by hand", (Mask(weight, keep), *quantizers)))


def train(kind: str, folder: Path | None, progress: Progress | None = None, every: Every = Every()) -> dict:
    torch.manual_seed(5)
    teacher, model = Net(), Net()
    model = edited(model) if kind == "edited" else model
    generator = torch.Generator().manual_seed(random.SystemRandom().getrandbits(31))  # Finetune must seed it itself
    loader = DataLoader(Augmented(64, 1), batch_size=16, shuffle=True, generator=generator)
    held_out = DataLoader(Augmented(40, 2), batch_size=20)
    task = Task(model, loader, held_out, held_out, reference=teacher).complete()
    name, lr = ("adamw", 0.01) if kind == "edited" else ("sgd", 0.05)
    accumulate, average = (3, Average(0.9)) if kind == "edited" else (1, None)
    optimizer = Optimizer(name, lr, accumulate=accumulate)
    step = Finetune(epochs=EPOCHS, objective=Distill(alpha=0.5), optimizer=optimizer, clip=5.0, average=average)
    result = step.run(model, task, Context(7, folder, progress or Progress(), every))
    digest = hashlib.sha256(save(dict(result.model.state_dict()))).hexdigest()
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.history]
    return {"weights": digest, "history": history, "facts": dict(result.facts)}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DeadlyProgress(Progress):
    """Dies when a batch of an epoch is asked for."""

    def __init__(self, epoch: int, batch: int):
        self.title, self.batch = f"epoch {epoch}/{EPOCHS}", batch

    def track(self, items, description, total=None):
        for number, item in enumerate(items):
            if description == self.title and number == self.batch:
                die()
            yield item


class Listening(Progress):
    def __init__(self):
        self.said: list[str] = []

    def say(self, text):
        self.said.append(text)


def at_batch(epoch: int, batch: int, every: Every = Every()) -> Callable[[str, Path], None]:
    return lambda kind, folder: train(kind, folder, DeadlyProgress(epoch, batch), every)


def twice(kind: str, folder: Path) -> None:
    """Dies in the third epoch, goes on inside it, dies in the last."""
    if os.fork() == 0:
        at_batch(3, 3, Every(batches=3))(kind, folder)
    os.wait()
    at_batch(4, 3, Every(batches=1))(kind, folder)


def before_rename(kind: str, folder: Path) -> None:
    real = os.replace
    os.replace = lambda a, b: die() if Path(b).name == "epoch-0002" else real(a, b)
    train(kind, folder)


def before_old_ones_go(kind: str, folder: Path) -> None:
    real = checkpoint.Checkpoints._remove_except
    checkpoint.Checkpoints._remove_except = lambda self, names: die() if "epoch-0003" in names else real(self, names)
    train(kind, folder)


def in_the_middle_of_a_file(kind: str, folder: Path) -> None:
    real = checkpoint.write_atomically

    def torn(path: Path, data: bytes) -> None:
        if path.parent.name == ".epoch-0002.part" and path.name == checkpoint.FACTS:
            path.write_bytes(data[: len(data) // 2])
            die()
        real(path, data)

    checkpoint.write_atomically = torn
    train(kind, folder)


def after_the_last_epoch(kind: str, folder: Path) -> None:
    train(kind, folder)
    die()


MOMENTS = {
    "first epoch": at_batch(1, 2),
    "second epoch, first batch": at_batch(2, 0),
    "third epoch": at_batch(3, 3),
    "inside the first epoch": at_batch(1, 3, Every(batches=3)),
    "inside the third epoch": at_batch(3, 3, Every(minutes=1e-9)),
    "inside two epochs": twice,
    "before the checkpoint is renamed": before_rename,
    "before old checkpoints are removed": before_old_ones_go,
    "in the middle of a file": in_the_middle_of_a_file,
    "after the last epoch": after_the_last_epoch,
}


def in_child(function: Callable[[], dict | None], out: Path) -> int:
    """Runs ``function`` in a fork of this process, its result as JSON in ``out``; returns the wait status."""
    child = os.fork()
    if child == 0:
        try:
            out.write_text(json.dumps(function()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def resume(kind: str, folder: Path) -> dict:
    progress = Listening()
    return {**train(kind, folder, progress), "said": progress.said}


def main(base: Path) -> None:
    found: dict[str, dict] = {}
    for kind in ("plain", "edited"):
        out = base / f"{kind}.json"
        assert in_child(lambda kind=kind: train(kind, None), out) == 0
        found[kind] = {"uninterrupted": json.loads(out.read_text())}
        for number, (moment, trains) in enumerate(MOMENTS.items()):
            folder = base / f"{kind}-{number}"
            status = in_child(lambda kind=kind, folder=folder, trains=trains: trains(kind, folder), out)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert in_child(lambda kind=kind, folder=folder: resume(kind, folder), out) == 0
            left = sorted(path.name for path in (folder / "checkpoint").iterdir())
            found[kind][moment] = {**json.loads(out.read_text()), "killed": killed, "left": left}
    print(json.dumps(found))


if __name__ == "__main__":
    midway.CHECK_EVERY = 3  # batches between two looks at the clock
    torch.set_num_threads(1)  # a fork of a process with a thread pool would hang
    import torch._dynamo  # (what an optimiser imports: once, not in every child)
    import torch.utils.tensorboard  # noqa: F401

    main(Path(sys.argv[1]))
