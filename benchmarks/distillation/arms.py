"""What is compared: the same student, alone and taught in several ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from tersor.core.task import Task
from tersor.distill.cache import TeacherCache
from tersor.distill.features import Hints
from tersor.distill.response import DecoupledSoftTargets, Distill
from tersor.distill.teachers import Teachers
from tersor.train.objective import Objective, TaskLoss
from tersor.train.replay import replayed

ALONE, KD, REPLAYED, CACHED = "alone", "KD", "KD, two views", "KD, two views, cached"
TRANSFORMER = "KD, transformer teacher"
VIEWS = 2


@dataclass(frozen=True, eq=False)
class Teaching:
    """Who may teach: the seed's own network, another seed's, and (where it is asked) a transformer; ``cache``: a folder
    for answers."""

    own: nn.Module
    other: nn.Module
    transformer: nn.Module | None
    cache: Path


@dataclass(frozen=True)
class Arm:
    """``objective``: what the student learns; ``task``: how the seed's task is changed for it."""

    name: str
    objective: Objective
    task: Callable[[Task, Teaching], Task]


def _own(task: Task, teaching: Teaching) -> Task:
    return replace(task, reference=teaching.own)


def _two(task: Task, teaching: Teaching) -> Task:
    return replace(task, reference=Teachers([teaching.own, teaching.other], combine="probabilities"))


def _transformer(task: Task, teaching: Teaching) -> Task:
    return replace(task, reference=teaching.transformer)


def _replayed(task: Task, teaching: Teaching) -> Task:
    assert task.train is not None
    return replace(_own(task, teaching), train=replayed(task.train, VIEWS))


def _cached(task: Task, teaching: Teaching) -> Task:
    return TeacherCache(str(teaching.cache), VIEWS).on(_own(task, teaching))


ARMS = (
    Arm(ALONE, TaskLoss(), _own),
    Arm(KD, Distill(), _own),
    Arm("DKD", TaskLoss() + DecoupledSoftTargets(), _own),
    Arm("hybrid (KD + hints)", Distill() + 0.5 * Hints({"layers.2": "layers.5"}, "cosine"), _own),
    Arm("KD, two teachers", Distill(), _two),
    Arm(TRANSFORMER, Distill(), _transformer),
    Arm(REPLAYED, Distill(), _replayed),
    Arm(CACHED, Distill(), _cached),
)
