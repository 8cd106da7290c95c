"""Run as one of two processes by test_several_processes.py: train_in_two.py FOLDER OUT [DIES].

Trains a model with layer norm, writes what came out to OUT-rank as JSON. With DIES the second process is killed in the
second epoch, and the first writes what it was told.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.errors import TrainingError
from tersor.core.progress import Progress
from tersor.core.step import Context, Every
from tersor.core.task import Task
from tersor.train.average import Average
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer


class Telling(Progress):
    """Remembers what is said; in the process that ``dies``, it dies at the seventh batch of the second epoch."""

    def __init__(self, dies):
        self.dies, self.said = dies, []

    def say(self, text):
        self.said.append(text)

    def track(self, items, description, total=None):
        for number, item in enumerate(items):
            if self.dies and description == "epoch 2/3" and number == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


def train(batch, folder=None, dies=False):
    """Losses, validation and weights, with ``batch`` samples for each process."""
    torch.manual_seed(0)
    x = torch.randn(128, 6)
    data = TensorDataset(x, (x @ torch.randn(6, 3)).argmax(1))
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    held_out = DataLoader(data, 64)
    task = Task(model, DataLoader(data, batch, shuffle=True), held_out, held_out).complete()
    progress = Telling(dies)
    step = Finetune(3, optimizer=Optimizer("adamw", 0.02, accumulate=2), keep="last", clip=1.0, average=Average(0.9))
    result = step.run(model, task, Context(1, folder, progress, Every(batches=4)))
    return {
        "losses": [entry["loss"] for entry in result.history],
        "weights": [float(p.detach().double().abs().sum()) for p in result.model.parameters()],
        "validation": [entry["validation"] for entry in result.history],
        "said": progress.said,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out, dies = Path(sys.argv[1]), sys.argv[2], len(sys.argv) > 3
    rank = int(os.environ["RANK"])
    try:
        found = train(8, folder, dies=dies and rank == 1)
    except TrainingError as error:
        found = {"error": str(error)}
    Path(f"{out}-{rank}").write_text(json.dumps(found))
    if "error" in found:
        os._exit(3)  # the group's other member is gone: nothing to take down together
    torch.distributed.destroy_process_group()
