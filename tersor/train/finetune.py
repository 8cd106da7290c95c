"""Finetune: train a copy of the model, on accelerate, resumable after each epoch and inside it."""

from __future__ import annotations

import copy
import time
from collections import ChainMap
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, Literal, final

from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.device import device_of
from tersor.core.errors import InputError, TrainingError, located, user_code
from tersor.core.keyed import KeyedLoader
from tersor.core.loading import batches_of
from tersor.core.randomness import fixed_randomness, keeps_own_randomness, seeded
from tersor.core.step import Context, Result, Step, derive_seed
from tersor.core.task import Batch, Task
from tersor.train.average import Average
from tersor.train.board import Board
from tersor.train.checkpoint import Checkpoints, fingerprint
from tersor.train.companion import Companion
from tersor.train.midway import Clock, mark_of, midway, set_randomness
from tersor.train.objective import Objective, TaskLoss, review_of
from tersor.train.optimizer import Optimizer
from tersor.train.precision import multiplies_bf16
from tersor.train.rehearse import rehearse
from tersor.train.schedules import Cosine, Schedule
from tersor.train.state import Midway, TrainingState, keeps_other_state
from tersor.train.trainer import NotFinite, Trainer, accelerator, length_of
from tersor.train.validate import is_better, validate


@final
@dataclass(frozen=True)
class Finetune(Step):
    """Train a copy of the model on ``task.train``; masks and quantisers that stand on it are trained through.

    Args:
        epochs: passes over the training data.
        objective: what is made small (``TaskLoss()``, ``Distill()``, weighted sums of them).
        optimizer: which one, with its learning rate and weight decay.
        schedule: the learning rate's course over all steps (over epochs where the loader has no length).
        precision: "bf16" multiplies in bfloat16 (autocast; weights stay float32). A processor that would have to
            emulate it trains in float32, and says so.
        keep: the epoch whose weights are handed back: "best" by ``task.metric`` on validation (of equals the last), or
            "last".
        patience: stop after so many epochs without a better validation value; None: never.
        clip: largest norm of the gradient; None: any.
        companion: what goes along (``GradualSparsity``, ``DropAndGrow``; several are ``Together``): only epochs at
            which it is settled can be the best or count for ``patience``. The loader must have a length.
        average: validate and hand back averaged weights (``Average()``). The loader must have a length.

    With ``context.folder`` a checkpoint is written there after each epoch and, as ``context.every`` says, inside it; a
    run of the same settings on the same model goes on from the last one, to the same weights (same machine and
    threads). Where the loader does not begin an epoch again with the same batches, the epoch is begun again.

    A loss that is not finite takes training back to the last good epoch with half the learning rate, once; it is
    noticed within 64 batches. ``history`` has epoch, loss, validation, lr (of the epoch's last step), seconds, weights
    where the objective changes them, and what companions noted.

    An objective that reads layers is evaluated on one batch before training starts.

    Raises InputError for numbers out of range, an empty loader, a batch that cannot be read, nothing to train;
    TrainingError where the loss is not finite a second time, or a batch cannot be trained on; ArtifactError where a
    checkpoint cannot be written.
    """

    epochs: int = 5
    objective: Objective = TaskLoss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Cosine()
    precision: Literal["fp32", "bf16"] = "fp32"
    keep: Literal["best", "last"] = "best"
    patience: int | None = None
    clip: float | None = None
    companion: Companion | None = None
    average: Average | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.epochs < 1:
            raise InputError("too few", where="Finetune.epochs", got=self.epochs, expected="1 or more")
        if self.precision not in ("fp32", "bf16"):
            raise InputError("unknown", where="Finetune.precision", got=repr(self.precision), expected="fp32 or bf16")
        if self.keep not in ("best", "last"):
            raise InputError("unknown", where="Finetune.keep", got=repr(self.keep), expected="best or last")
        if self.patience is not None and self.patience < 1:
            raise InputError("too few epochs", where="Finetune.patience", got=self.patience, expected="1 or more")
        if self.clip is not None and not self.clip > 0:
            raise InputError("must be positive", where="Finetune.clip", got=self.clip, expected="a number above 0")

    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        """Train a copy; returns it in eval mode, on the device and with the ``requires_grad`` of the one given."""
        context, task = context or Context(), task.ready()
        task = task if task.metric is not None and task.validation is not None else task.complete()
        with _reference_put_back(task):
            return _Run(self, model, task, context).all_epochs()


@contextmanager
def _reference_put_back(task: Task) -> Iterator[None]:
    """Bring the teacher back to its device at the end."""
    home = device_of(task.reference) if task.reference is not None else None
    try:
        yield
    finally:
        if task.reference is not None and device_of(task.reference) != home:
            task.reference.to(home)


def _begin(companions: tuple[Companion, ...], model: nn.Module, objective: Objective, task: Task, seed: int) -> None:
    """Let companions put on ``model`` what they need; then an objective that reads layers is evaluated once."""
    with seeded(seed):
        for companion in companions:
            companion.begin(model, task)
    if objective.reads():
        rehearse(objective, model, task, objective.of)


class _OtherBatches(Exception):
    """An epoch that was begun again gives other batches than before."""


class _Run:
    """One run of a Finetune: the loop over epochs, and what is remembered between them."""

    def __init__(self, step: Finetune, model: nn.Module, task: Task, context: Context):
        self.step, self.task, self.context, self.say = step, task, context, context.progress.say
        self.home = device_of(model)
        precision = self._precision()
        own = [companion for companion in (step.companion, *step.objective.companions(), step.average) if companion]
        self.companions = tuple(own)
        copied = copy.deepcopy(model)
        _begin(self.companions, copied, step.objective, task, derive_seed(context.seed, 0))
        self.trainer = Trainer(
            copied, task, step.objective, step.optimizer,
            precision=precision, clip=step.clip, companions=self.companions,
        )  # fmt: skip
        self.batches = self.trainer.share(task.demand_loader("train"))
        self.length = length_of(self.batches)
        if self.length == 0:
            raise InputError("the loader is empty", where="task.train", got="no batch", expected="at least one batch")
        self.counts = any(companion.needs_length for companion in self.companions)
        if self.length is None and self.counts:
            raise InputError(
                "a companion must know how long training is", where="task.train", got="a loader without a length",
                expected="__len__", do="Give the loader a length",
            )  # fmt: skip
        self.checkpoints = self._checkpoints(model)
        self.clock = Clock(context.every, self.trainer)
        self.state = self._first_state()
        self.midway = self._first_midway()

    def _precision(self) -> Literal["fp32", "bf16"]:
        if self.step.precision == "bf16" and not multiplies_bf16(accelerator().device):
            self.say("this processor has no bfloat16 arithmetic: training in float32 instead")
            return "fp32"
        return self.step.precision

    def _checkpoints(self, model: nn.Module) -> Checkpoints | None:
        if self.context.folder is None:
            return None
        if keeps_own_randomness(self.batches):
            self.say(
                "the train loader's workers live on (persistent_workers): a resumed run may end with other weights"
            )
        foreign = keeps_other_state(model)
        if foreign:
            self.say(f"no checkpoints: {', '.join(foreign)} keep state that is no tensor (get_extra_state)")
            return None
        return Checkpoints(self.context.folder / "checkpoint", fingerprint(self.step, self.context.seed, model))

    def _first_state(self) -> TrainingState:
        found = self.checkpoints.latest(self.context.progress) if self.checkpoints else None
        if found is not None:
            self.say(f"going on after epoch {found.epoch}/{self.step.epochs}")
            self.trainer.restore(found.model, found.optimizer)
            return found
        tensors, optimizer = self.trainer.snapshot()
        return TrainingState(tensors, optimizer, best=tensors)

    def _first_midway(self) -> Midway | None:
        """Where to go on inside the first epoch, if anywhere."""
        if self.checkpoints is None:
            return None
        processes = self.trainer.accelerator.num_processes
        found = self.checkpoints.midway(self.state.epoch, processes, self.context.progress)
        if found is not None:
            self.say(f"going on after batch {found.batches} of epoch {found.epoch + 1}")
            self.trainer.restore(found.model, found.optimizer)
            self.state.halved = found.halved
        return found

    def all_epochs(self) -> Result:
        main = self.trainer.accelerator.is_main_process
        folder = self.context.folder / "tensorboard" if self.context.folder and main else None
        board = Board(folder, self.state.epoch)
        metric = self.task.demand_metric().name
        with closing(self._ticks()) as self.ticks:
            next(self.ticks, None)  # starts it
            while self.state.epoch < self.step.epochs and not self._out_of_patience():
                entry = self._good_epoch()
                self._remember(entry)
                board.write(entry, metric)
                if self.checkpoints and main:
                    self.checkpoints.write(self.state)
                self.trainer.accelerator.wait_for_everyone()
        board.close()
        return self._result()

    def _ticks(self) -> Generator[int, None, None]:
        """One tick per batch, told as progress over all epochs: an estimate of the time left for the whole training."""
        left = self.step.epochs - self.state.epoch
        total = left * self.length if self.length else None
        yield from self.context.progress.track(count(), f"training, {left} epochs", total)

    def _batches(self, title: str) -> Generator[Batch, None, None]:
        batches = batches_of(self.batches, "task.train")
        given, midway = 0, self.midway
        for batch in self.context.progress.track(batches, title, self.length):
            given += 1
            if midway is None or given > midway.batches:
                yield batch
            elif given == midway.batches:
                self._go_on(midway, batch)
            next(self.ticks, None)  # before the epoch's own, so that sparse output tells of the whole
        if self.counts and given != self.length:
            raise InputError(
                "the loader gives another number of batches than it says, and a companion counts them",
                where="task.train", got=f"{given} batches", expected=f"{self.length}, its length",
            )  # fmt: skip

    def _good_epoch(self) -> dict[str, Any]:
        while True:
            try:
                return self._epoch(self.state.epoch + 1)
            except NotFinite as error:
                self._step_back(error)  # a second time this raises
            except _OtherBatches:
                self.say("the loader does not give the same batches again: going on from the start of the epoch")
                self.trainer.restore(self.state.model, self.state.optimizer)
            finally:
                self.midway = None

    def _epoch(self, epoch: int) -> dict[str, Any]:
        begun = time.monotonic()
        title = f"epoch {epoch}/{self.step.epochs}"
        with seeded(derive_seed(self.context.seed, epoch), self.batches, epoch), located(title):
            with closing(self._batches(title)) as batches:
                done, steps = self._steps(epoch - 1), self._steps(self.step.epochs) if self.length else None
                before = self.midway.of(self._process)[0] if self.midway else ()
                pause = self if self.checkpoints else None
                self.clock.begin(len(before))
                loss = self.trainer.epoch(
                    batches, lambda number: self._factor(epoch, number), done, steps, before=before, pause=pause
                )
            lr = self.trainer.optimizer.param_groups[0]["lr"]
            validation = self.trainer.validate()
        seconds = round(time.monotonic() - begun, 3)
        entry = {"epoch": epoch, "loss": loss, "validation": validation, "lr": lr, "seconds": seconds}
        noted = [companion.noted(self.trainer.model) for companion in self.companions]
        told = {"weights": self.step.objective.weights(self.trainer.model), "noted": ChainMap(*map(dict, noted))}
        return entry | {name: dict(values) for name, values in told.items() if values}

    @property
    def _process(self) -> int:
        return self.trainer.accelerator.process_index

    def _go_on(self, midway: Midway, batch: Batch) -> None:
        """``batch`` is the last one that was trained on before: go on as if it had been just now."""
        _, randomness, seen = midway.of(self._process)
        if self.trainer.anyone(mark_of(batch, self.task) != seen):
            raise _OtherBatches
        set_randomness(randomness, self.trainer.device)

    def due(self, batches: int) -> bool:
        """Whether to write a checkpoint inside the epoch, after so many batches."""
        return self.clock.due(batches)

    def keep(self, losses: Sequence[Tensor], batch: Batch) -> None:
        """Write a checkpoint inside the epoch."""
        assert self.checkpoints is not None, "there is a folder"
        mark = mark_of(batch, self.task)
        state = midway(self.trainer, self.state.epoch, losses, mark, self.state.halved)
        if self.trainer.accelerator.is_main_process:
            self.checkpoints.write_midway(state)

    def _steps(self, epochs: int) -> int:
        """The optimiser's steps in so many epochs."""
        return epochs * -(-(self.length or 0) // self.step.optimizer.accumulate)

    def _settled(self, epoch: int) -> bool:
        done, steps = self._steps(epoch), self._steps(self.step.epochs)
        return all(companion.settled(done, steps) for companion in self.companions)

    def _factor(self, epoch: int, number: int) -> float:
        length = self._steps(1) or 1
        number = min(number // self.step.optimizer.accumulate, length - 1) if self.length else 0
        factor = self.step.schedule.factor((epoch - 1) * length + number, self.step.epochs * length)
        return factor / 2 if self.state.halved else factor

    def _step_back(self, error: NotFinite) -> None:
        epoch = self.state.epoch + 1
        batch = f", batch {error.batch}" if error.batch is not None else ""
        if self.state.halved:
            raise TrainingError(
                f"{error} is not finite, again", where=f"epoch {epoch}{batch}", got="NaN or infinity",
                expected="a finite number", do="Lower optimizer.lr, set clip (1.0, say), or look at the data for NaN",
            ) from error  # fmt: skip
        back = f"to the end of epoch {epoch - 1}" if epoch > 1 else "to the start"
        self.say(f"epoch {epoch}{batch}: {error} is not finite; back {back} with half the learning rate")
        self.trainer.restore(self.state.model, self.state.optimizer)
        self.state.halved = True

    def _remember(self, entry: dict[str, Any]) -> None:
        best = self.state.history[self.state.best_epoch - 1]["validation"] if self.state.best_epoch else None
        self.state.history.append(entry)
        self.state.model, self.state.optimizer = self.trainer.snapshot()
        waiting = self.step.keep == "last" or not self._settled(self.state.best_epoch)
        if waiting or is_better(self.task, entry["validation"], best, or_equal=True):
            self.state.best, self.state.best_epoch = self.state.model, entry["epoch"]

    def _out_of_patience(self) -> bool:
        if self.step.patience is None:
            return False
        best, since = None, 0
        for entry in filter(lambda entry: self._settled(entry["epoch"]), self.state.history):
            better = is_better(self.task, entry["validation"], best)
            best, since = (entry["validation"], 0) if better else (best, since + 1)
        return since >= self.step.patience

    def _result(self) -> Result:
        self.trainer.write(self.state.best)
        state = self.state
        facts: dict[str, Any] = {
            "epochs": state.epoch,
            "kept_epoch": state.best_epoch,
            "stopped_early": state.epoch < self.step.epochs,
            "learning_rate_halved": state.halved,
            "precision": "bf16" if self.trainer.bf16 else "fp32",
        }
        answers = self.batches.answers if isinstance(self.batches, KeyedLoader) else None
        if answers is not None:
            facts["teacher"] = answers.facts()
            self.say(answers.sentence())
        # The last to begin is the first to finish: what it remembers may be of what others put on the model.
        plans = [companion.finish(self.trainer.model) for companion in reversed(self.companions)][::-1]
        reviewed = review_of(self.step.objective, self.trainer.model, self.task, state.history)
        if reviewed:
            facts["review"] = reviewed
            for warning in reviewed.get("warnings", ()):
                self.say(f"warning: {warning}")
        model = self.trainer.finish(self.home)
        return Result(model, tuple(plan for plan in plans if plan.edits), history=tuple(state.history), facts=facts)


def estimate(step: Finetune, model: nn.Module, task: Task) -> float:
    """About how many seconds ``step`` will take on this machine: three training batches on a copy, extrapolated.

    The random state is left as it was; a loader without a length is read once to count it. Raises what training raises.
    """
    task = task if task.metric is not None and task.validation is not None else task.complete()
    train = task.demand_loader("train")
    held_out = task.demand_loader("validation")
    with fixed_randomness(0), _reference_put_back(task):
        bf16 = step.precision == "bf16" and multiplies_bf16(accelerator().device)
        copied = copy.deepcopy(model)
        _begin(step.objective.companions(), copied, step.objective, task, seed=0)
        trainer = Trainer(
            copied, task, step.objective, step.optimizer,
            precision="bf16" if bf16 else "fp32", clip=step.clip,
        )  # fmt: skip
        times = []
        begun = time.perf_counter()
        for number, batch in enumerate(islice(batches_of(train, "task.train"), 4)):
            with user_code("a batch cannot be trained on", where=f"task.train, batch {number}", kind=TrainingError):
                float(trainer.step(batch))  # waits until it is done
            times.append(time.perf_counter() - begun)
            begun = time.perf_counter()
        if not times:
            raise InputError("the loader is empty", where="task.train", got="no batch", expected="at least one batch")
        training = sorted(times[1:] or times)[len(times[1:]) // 2] * _count(train)
        begun = time.perf_counter()
        some = list(islice(batches_of(held_out, "task.validation"), 2))
        validate(trainer.model, replace(task, validation=some), trainer.device)
        validation = (time.perf_counter() - begun) / max(1, len(some)) * _count(held_out)
    return step.epochs * (training + validation)


def _count(loader: Any) -> int:
    length = length_of(loader)
    return sum(1 for _ in batches_of(loader, "the loader")) if length is None else length
