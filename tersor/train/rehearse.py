"""One batch's way before training starts: names, shapes and labels are checked before the first epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils import send_to_device
from torch import nn

from tersor.core.errors import located, user_code
from tersor.core.randomness import fixed_randomness
from tersor.core.task import Task, first_batch
from tersor.train.objective import Forward, Objective
from tersor.train.trainer import accelerator

T = TypeVar("T")


def rehearse(objective: Objective, model: nn.Module, task: Task, see: Callable[[Forward], T]) -> T:
    """What ``see`` makes of the first training batch's way through a copy of ``model``, as it trains, and the teacher.

    Without gradients; what was given stays as it is (the teacher goes to the device of training). Raises InputError
    that names the batch, and whatever ``see`` raises.
    """
    device, where = accelerator().device, "task.train, batch 0"
    batch = send_to_device(first_batch(task.demand_loader("train"), "train"), device)
    copied = copy.deepcopy(model).to(device).train()
    with fixed_randomness(0), torch.no_grad(), located(where), user_code("a batch cannot be trained on", where=""):
        return see(Forward(copied, batch, task, objective.reads()))
