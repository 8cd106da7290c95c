"""Measure batch norm's statistics again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import islice
from typing import final

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.core.device import device_of
from tersor.core.errors import InputError, user_code
from tersor.core.loading import batches_of
from tersor.core.randomness import seeded
from tersor.core.step import Context, Result, Step, derive_seed
from tersor.core.task import Task
from tersor.train.trainer import accelerator, length_of


@final
@dataclass(frozen=True)
class RecalibrateBatchNorm(Step):
    """Reset batch norm's running statistics and take their plain mean over ``batches`` training batches.

    Only batch norms are in train mode meanwhile: dropout stays off, as it is when the statistics are used. Weights do
    not change. Useful after pruning, where it costs seconds. A model without batch norm comes back as it was, and that
    is said. Raises InputError for ``batches`` < 1, an empty loader and a batch that cannot be read or run.
    """

    batches: int = 32

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise InputError("too few", where="RecalibrateBatchNorm.batches", got=self.batches, expected="1 or more")

    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        """Recalibrate a copy; returns it in eval mode on the device of the one given."""
        context, task = context or Context(), task.ready()
        copied = copy.deepcopy(model).eval()
        norms = [module for module in copied.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        if not norms:
            context.progress.say("warning: RecalibrateBatchNorm found no batch norm with running statistics")
            return Result(copied, facts={"recalibrated": 0})
        device = accelerator().device
        copied.to(device)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean
            norm.train()
        self._pass_batches(copied, task, context, device)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return Result(copied.to(device_of(model)).eval(), facts={"recalibrated": len(norms)})

    def _pass_batches(self, model: nn.Module, task: Task, context: Context, device: torch.device) -> None:
        loader = task.demand_loader("train")
        seen, length = 0, length_of(loader)
        total = self.batches if length is None else min(self.batches, length)
        with seeded(derive_seed(context.seed, 0), loader), torch.no_grad():
            batches = islice(batches_of(loader, "task.train"), self.batches)
            for batch in context.progress.track(batches, "batch norm statistics", total):
                with user_code("the model does not run on this batch", where=f"task.train, batch {seen}"):
                    task.outputs(model, send_to_device(batch, device))
                seen += 1
        if seen == 0:
            raise InputError("the loader is empty", where="task.train", got="no batch", expected="at least one batch")
