"""Run as one of two processes by test_sparsity_schedules.py: trains sparsely, prints what came out as JSON.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set.
"""

import hashlib
import json

import torch
from safetensors.torch import save
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.step import Context
from tersor.core.task import Task
from tersor.prune.sparse.drop_and_grow import train_sparse
from tersor.prune.sparse.gradual import prune_by_movement, prune_gradually
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.train.trainer import accelerator

KINDS = {"gradual": prune_gradually, "movement": prune_by_movement, "drop and grow": train_sparse}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 6)
    data = TensorDataset(x, (x @ torch.randn(6, 3)).argmax(1))
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    loader, held_out = DataLoader(data, 8, shuffle=True), DataLoader(data, 48)
    task = Task(model, loader, held_out, held_out).complete()
    training = Finetune(epochs=3, optimizer=Optimizer("adamw", 0.02, weight_decay=0.1))
    said = {"processes": accelerator().num_processes}
    for kind, schedule in KINDS.items():
        result = schedule(0.8, training=training).run(task.model, task, Context(1))
        zeros = [int((module.weight == 0).sum()) for module in result.model if isinstance(module, nn.Linear)]
        weights = {name: value.contiguous() for name, value in result.model.state_dict().items()}
        said[kind] = {"zeros": zeros, "weights": hashlib.sha256(save(weights)).hexdigest()}
    print(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    torch.distributed.destroy_process_group()
