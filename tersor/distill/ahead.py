"""The teacher works ahead on a device of its own: while the student learns from a batch, it answers the next."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.keyed import Keyed, KeyedLoader
from tersor.core.loading import every_nth
from tersor.core.task import Arguments, Batch, Task
from tersor.train.teacher import Answer, Answers, Ask, device_of_inputs


@dataclass(frozen=True)
class Ahead:
    """``on(task)`` gives a task whose teacher runs on ``device``, one batch ahead of the student.

    ``device``: where the teacher is ("cuda:1"), another one than that of the training; on the same one the two only
    take turns. The answers are those of a teacher that is asked when it is needed, moved to the student's device. A
    ``TeacherCache`` may be put on before: then what it holds is read ahead, too. The very first batch is not ahead.

    Raises InputError for a device that torch does not know.
    """

    device: str

    def __post_init__(self) -> None:
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            raise InputError("no such device", where="Ahead.device", got=f"{self.device!r}: {error}") from error

    def on(self, task: Task) -> Task:
        """The task with a train loader that asks the teacher early. Raises InputError without teacher or data."""
        for name in ("reference", "train"):
            if getattr(task, name) is None:
                raise InputError("the task is not whole", where=f"task.{name}", got="None", do="Pass task.complete()")
        return replace(
            task, train=_AheadLoader(task.demand_loader("train"), AheadAnswers(task, torch.device(self.device)))
        )


class _How(NamedTuple):
    """How the teacher was asked last: the next batch is asked so too."""

    layers: tuple[str, ...]
    ask: Ask
    autocast: bool
    dtype: torch.dtype


class AheadAnswers(Answers):
    """Answers that a thread has begun to compute before they are asked for."""

    def __init__(self, task: Task, device: torch.device):
        self.task, self.device, self.waited, self.ahead = task, device, 0.0, 0
        self._inner: Answers | None = task.train.answers if isinstance(task.train, KeyedLoader) else None
        self._how: _How | None = None
        self._begun: dict[int, tuple[Tensor, _How, Future[Answer]]] = {}

    @contextmanager
    def working(self) -> Iterator[ThreadPoolExecutor]:
        """A thread for the length of an epoch; what it has not begun when that ends is dropped."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            self._begun.clear()

    def begin(self, keyed: Keyed, pool: ThreadPoolExecutor) -> None:
        """Start on a batch, once it is known how the teacher is asked."""
        if self._how is not None:
            future = pool.submit(self._run, keyed, self._how)
            self._begun[id(keyed.samples)] = keyed.samples, self._how, future  # which holds on to that identity

    def _run(self, keyed: Keyed, how: _How) -> Answer:
        inputs = send_to_device(self.task.inputs(keyed, self.task.reference), self.device)
        with torch.autocast(self.device.type, how.dtype, enabled=how.autocast):
            return how.ask(inputs) if self._inner is None else self._inner.answer(keyed, inputs, how.layers, how.ask)

    def answer(self, keyed: Keyed, inputs: Arguments, layers: tuple[str, ...], ask: Ask) -> Answer:
        home = device_of_inputs(inputs)
        self._how = _How(layers, ask, torch.is_autocast_enabled(home.type), torch.get_autocast_dtype(home.type))
        begun = self._begun.pop(id(keyed.samples), None)
        start = time.perf_counter()
        if begun is not None and begun[1].layers == layers:
            answer = begun[2].result()
            self.ahead += 1
        else:
            answer = self._run(keyed, self._how)
        self.waited += time.perf_counter() - start
        layers_here = {name: value.to(home) for name, value in answer.layers.items()}
        return Answer(answer.outputs.to(home), layers_here)

    def facts(self) -> Mapping[str, Any]:
        own = {"batches_ahead": self.ahead, "seconds_waited": round(self.waited, 3)}
        return own if self._inner is None else {**self._inner.facts(), **own}

    def sentence(self) -> str:
        own = f"teacher on {self.device}: {self.ahead:,} batches ahead, {self.waited:.1f} s waited for"
        return own if self._inner is None else f"{self._inner.sentence()}; {own}"


class _AheadLoader(KeyedLoader):
    """The batches of any loader, each when the teacher has begun on the one after it."""

    def __init__(self, loader: Iterable[Batch], answers: AheadAnswers, share: tuple[int, int] = (0, 1)):
        self.loader, self.answers, self.share = loader, answers, share
        keyed = isinstance(loader, KeyedLoader)
        self.samples, self.views = (loader.samples, loader.views) if keyed else (0, 1)  # type: ignore[attr-defined]
        # What seeds an epoch looks for these.
        self.sampler, self.generator = getattr(loader, "sampler", None), getattr(loader, "generator", None)
        self.batch_sampler = getattr(loader, "batch_sampler", None)

    def batches(self, view: int) -> Iterator[Keyed]:
        source = self.loader.batches(view) if isinstance(self.loader, KeyedLoader) else map(_numberless, self.loader)
        waiting: Keyed | None = None
        with self.answers.working() as pool:
            for keyed in every_nth(source, *self.share):
                self.answers.begin(keyed, pool)
                if waiting is not None:
                    yield waiting
                waiting = keyed
            if waiting is not None:
                yield waiting

    def __len__(self) -> int:
        return len(self.loader) // self.share[1]  # type: ignore[arg-type]

    def part(self, index: int, count: int) -> KeyedLoader:
        return _AheadLoader(self.loader, self.answers, (index, count))


def _numberless(batch: Batch) -> Keyed:
    return Keyed(batch, torch.zeros(0, dtype=torch.int64))
