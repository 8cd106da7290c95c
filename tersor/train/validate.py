"""The task's metric on its validation data, for decisions during training."""

from __future__ import annotations

import torch
from accelerate.utils import send_to_device
from torch import nn

from tersor.core.check_batch import metric_values
from tersor.core.errors import InputError, user_code
from tersor.core.eval_mode import eval_mode
from tersor.core.loading import batches_of
from tersor.core.task import Task


def validate(model: nn.Module, task: Task, device: torch.device) -> float:
    """The mean of the task's metric over the validation samples, ``model`` in eval mode and float32.

    Raises InputError where there are no validation batches or one cannot be read or run, and where the metric gives no
    finite value per sample.
    """
    loader = task.demand_loader("validation")
    values = []
    with torch.no_grad(), eval_mode(model):
        for number, batch in enumerate(batches_of(loader, "task.validation")):
            where = f"task.validation, batch {number}"
            with user_code("the model does not run on this batch", where=where):
                batch = batch if device.type == "cpu" else send_to_device(batch, device)
                outputs, targets = task.outputs(model, batch), task.targets(batch)
            values.append(metric_values(task, outputs, targets, where))
    if not values:
        raise InputError("the loader is empty", where="task.validation", got="no batch", expected="at least one batch")
    return float(torch.cat(values).mean())


def is_better(task: Task, value: float, than: float | None, *, or_equal: bool = False) -> bool:
    """Whether a metric value beats another (None: there is none yet)."""
    higher = task.demand_metric().higher_is_better
    if than is None:
        return True
    return (value > than if higher else value < than) or (or_equal and value == than)
