"""One model in training: forward, backward and step, on whatever devices accelerate was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from torch import Tensor, nn

from tersor.core.errors import InputError, TrainingError, located, user_code
from tersor.core.task import Batch, Task
from tersor.train.companion import Companion, Moment
from tersor.train.objective import Objective
from tersor.train.optimizer import Optimizer, load_state_tensors, set_factor, state_tensors
from tersor.train.share import shared
from tersor.train.state import Tensors, model_tensors
from tersor.train.validate import validate

CHECK_EVERY = 64  # batches: how late a loss that is not finite is noticed (reading each one would halt a GPU's queue)


class NotFinite(Exception):
    """Training ran into NaN or infinity; ``batch`` counts from 0, None: no loss, but the weights after the epoch."""

    def __init__(self, batch: int | None):
        self.batch = batch
        super().__init__("the loss" if batch is not None else "a weight or statistic")


def accelerator() -> Accelerator:
    """accelerate's state of this process: its GPU, its part of what ``accelerate launch`` started, or the CPU.

    Mixed precision is Trainer's own matter. Raises InputError where this process has set accelerate up for another.
    """
    try:
        return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    except ValueError as error:
        raise InputError(
            "accelerate is already set up otherwise in this process", where="Finetune", got=error,
            do="Use Finetune in a process of its own, or create that Accelerator with mixed_precision='no'",
        ) from error  # fmt: skip


class Pause(Protocol):
    """Where an epoch may be gone on with later."""

    def due(self, batches: int) -> bool:
        """Whether to keep the state after so many batches; the same answer in every process."""

    def keep(self, losses: Sequence[Tensor], batch: Batch) -> None:
        """Keep it: ``losses`` of the epoch so far, and its last ``batch``."""


class Trainer:
    """Trains ``model`` itself. With several processes each takes its share of the batches; gradients are averaged."""

    def __init__(
        self, model: nn.Module, task: Task, objective: Objective, optimizer: Optimizer,
        *, precision: Literal["fp32", "bf16"] = "fp32", clip: float | None = None, companions: Sequence[Companion] = (),
    ):  # fmt: skip
        self.task, self.objective, self.clip, self.companions = task, objective, clip, companions
        self.accelerator = accelerator()
        self.device: torch.device = self.accelerator.device
        self.model = model.to(self.device).train()
        self.optimizer = optimizer.build(self.model)
        self.accumulate = optimizer.accumulate
        self._gathered = 0  # batches whose gradients wait for a step
        self.bf16 = precision == "bf16"
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        several = self.accelerator.num_processes > 1
        self._wrapped = self.accelerator.prepare_model(self.model) if several else self.model

    def share(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """This process's share of a loader: with one process the loader itself."""
        count = self.accelerator.num_processes
        return loader if count == 1 else shared(loader, self.accelerator.process_index, count)

    def epoch(
        self, batches: Iterable[Batch], factor: Callable[[int], float], done: int = 0, steps: int | None = None,
        *, before: Sequence[Tensor] = (), pause: Pause | None = None,
    ) -> float:  # fmt: skip
        """Train on every batch, with ``factor(number)`` of the learning rate; returns the mean loss.

        ``done``, ``steps``: the optimiser's steps before this epoch, and in the whole training; companions need them.
        ``before``: the losses of the batches that were done in it already; ``pause`` is asked after each step.
        Raises NotFinite, InputError where there is no batch, and TrainingError where a batch cannot be trained on.
        """
        self.model.train()
        losses, self._gathered = list(before), 0
        checked, place = len(losses), None
        for number, batch in enumerate(batches, start=len(losses)):
            place = None if steps is None else (done + number // self.accumulate, steps)
            ends = (number + 1) % self.accumulate == 0
            set_factor(self.optimizer, factor(number))
            with located(f"batch {number}"), self._blamed():
                losses.append(self._gather(batch))
                if ends:
                    self._update(place)
            due = pause is not None and ends and pause.due(len(losses))
            if due or len(losses) - checked >= CHECK_EVERY:
                self._expect_finite(losses[checked:], first=checked)
                checked = len(losses)
            if due and pause is not None:
                self._expect_finite_model()
                pause.keep(losses, batch)
        if not losses:
            raise InputError(
                "the loader is empty", where="task.train", got="no batch", expected="at least one batch",
                do="Fewer samples than one batch and drop_last=True give this too",
            )  # fmt: skip
        if self._gathered:
            self._update(place)
        self._expect_finite(losses[checked:], first=checked)
        self._agree()
        self._expect_finite_model()
        return float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        """What goes wrong in a batch is its fault, but for another process that is gone."""
        try:
            with user_code("a batch cannot be trained on", where="", kind=TrainingError):
                yield
        except TrainingError as error:
            if self.accelerator.num_processes > 1 and _is_about_others(error.__cause__):
                raise TrainingError(
                    "another process of this training is gone", where=error.where, got=error.got,
                    do="Look at its output; start all of them again: training goes on from the last checkpoint",
                ) from error  # fmt: skip
            raise

    def step(self, batch: Batch) -> Tensor:
        """Forward, backward and one step of the optimiser, companions left at home; returns the loss."""
        loss = self._gather(batch)
        self._update(None)
        return loss

    def _gather(self, batch: Batch) -> Tensor:
        """Forward and backward: gradients add up; returns the loss without its gradient."""
        if self.device.type != "cpu":
            batch = send_to_device(batch, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.objective(self._wrapped, batch, self.task)
        self.accelerator.backward(loss)
        self._gathered += 1
        return loss.detach()

    def _update(self, place: tuple[int, int] | None) -> None:
        """One step of the optimiser by the mean of the gradients that were gathered.

        ``place``: how many steps are done of how many, for the companions; None: they are left at home.
        """
        if self._gathered > 1:
            torch._foreach_div_([p.grad for p in self._parameters if p.grad is not None], float(self._gathered))
        self._gathered = 0
        companions, (done, steps) = ((), (0, 0)) if place is None else (self.companions, place)
        for companion in companions:
            companion.after_backward(self._moment(done, steps))
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self._parameters, self.clip)
        self.optimizer.step()
        for companion in companions:
            companion.after_step(self._moment(done + 1, steps))
        self.optimizer.zero_grad()

    def _moment(self, done: int, steps: int) -> Moment:
        return Moment(self.model, self.task, self.optimizer, done, steps)

    def _expect_finite(self, losses: list[Tensor], first: int) -> None:
        if not losses:
            return
        wrong = ~torch.isfinite(torch.stack(losses))
        if self.anyone(bool(wrong.any())):  # every process must take the same turn
            position = int(wrong.float().argmax()) if bool(wrong.any()) else 0
            raise NotFinite(first + position)

    def _expect_finite_model(self) -> None:
        floats = [tensor for tensor in model_tensors(self.model).values() if tensor.is_floating_point()]
        wrong = torch.stack([~torch.isfinite(tensor).all() for tensor in floats]).any()
        if self.anyone(bool(wrong)):
            raise NotFinite(None)

    def _agree(self) -> None:
        """Running statistics are each process's own: the main one's count. (Parameters are the same everywhere.)"""
        if self.accelerator.num_processes > 1:
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(broadcast(buffer))

    def validate(self) -> float:
        """The task's metric on its validation data; of several processes the main one's value counts."""
        with ExitStack() as judged:
            for companion in self.companions:
                judged.enter_context(companion.judged(self.model))
            found = validate(self.model, self.task, self.device)
        value = torch.tensor(found, dtype=torch.float64, device=self.device)
        return float(broadcast(value) if self.accelerator.num_processes > 1 else value)

    def anyone(self, answer: bool) -> bool:
        """Whether any process says so, in every process."""
        if self.accelerator.num_processes == 1:
            return answer
        return bool(self.accelerator.reduce(torch.tensor(float(answer), device=self.device), "sum") > 0)

    def main_says(self, answer: bool) -> bool:
        """The main process's answer, in every process."""
        if self.accelerator.num_processes == 1:
            return answer
        return bool(broadcast(torch.tensor(float(answer), device=self.device)) > 0)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of (the model's tensors, the optimiser's)."""
        copies = {name: tensor.clone() for name, tensor in model_tensors(self.model).items()}
        return copies, state_tensors(self.optimizer, self.model)

    def restore(self, model: Tensors, optimizer: Tensors) -> None:
        """Go on from these values."""
        self.write(model)
        load_state_tensors(self.optimizer, self.model, optimizer)
        self.optimizer.zero_grad()

    def write(self, tensors: Any) -> None:
        """Give the model these values."""
        with torch.no_grad():
            for name, tensor in model_tensors(self.model).items():
                tensor.copy_(tensors[name])

    def finish(self, device: torch.device) -> nn.Module:
        """The model itself, free of every wrapper, gradients and training mode, on ``device``."""
        self.optimizer.zero_grad()
        model: nn.Module = self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
        return model.to(device).eval()


def _is_about_others(error: BaseException | None) -> bool:
    """Whether an error is one of the processes' talk."""
    return isinstance(error, torch.distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))


def length_of(loader: Any) -> int | None:
    """How many batches a loader has, where it knows."""
    try:
        return len(loader)
    except TypeError:
        return None
