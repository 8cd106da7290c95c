"""Run as one of two processes by test_two_processes.py: distils with projections, prints what came out as JSON.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set.
"""

import json

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.step import Context
from tersor.core.task import Task
from tersor.distill.features import Hints
from tersor.distill.response import SoftTargets
from tersor.train.adaptive import Adaptive
from tersor.train.finetune import Finetune
from tersor.train.objective import TaskLoss
from tersor.train.optimizer import Optimizer


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 3))


def train(batch: int) -> dict:
    """Losses, weights of the terms and the sum of all parameters, with ``batch`` samples for each process."""
    torch.manual_seed(0)
    x = torch.randn(96, 6)
    data = TensorDataset(x, (x @ torch.randn(6, 3)).argmax(1))
    student, teacher = net(8), net(20).eval()
    held_out = DataLoader(data, 48)
    task = Task(student, DataLoader(data, batch), held_out, held_out, reference=teacher).complete()
    said = {}
    for name, objective in {
        "hints": TaskLoss() + SoftTargets() + Hints({"1": "1"}),
        "adaptive": Adaptive(TaskLoss() + 3 * Hints({"1": "1"}, "cosine"), updates=4),
    }.items():
        step = Finetune(epochs=3, objective=objective, optimizer=Optimizer(lr=0.05), keep="last")
        result = step.run(student, task, Context(1))
        said[name] = {
            "losses": [entry["loss"] for entry in result.history],
            "weights": [list(entry.get("weights", {}).values()) for entry in result.history],
            "parameters": [float(p.detach().double().abs().sum()) for p in result.model.parameters()],
        }
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(train(8)))
    torch.distributed.destroy_process_group()
