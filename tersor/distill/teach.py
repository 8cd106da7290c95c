"""The step that distils: train the model to follow its teacher, whose answers may be kept on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import nn

from tersor.core.check_fields import check_fields
from tersor.core.step import Context, Result, Step
from tersor.core.task import Task
from tersor.distill.cache import TeacherCache
from tersor.distill.response import Distill
from tersor.train.finetune import Finetune


@final
@dataclass(frozen=True)
class Teach(Step):
    """Train a copy of the model on what ``task.reference`` says of the training data, and on the labels.

    Args:
        training: how; its ``objective`` is what the student copies (``Distill()``, hidden layers, sums …).
        cache: where the teacher's answers are kept, and how many views of each sample there are; None: the teacher runs
            on every batch.

    In recipes ``distill``. Raises what ``Finetune`` and ``TeacherCache.on`` raise.
    """

    training: Finetune = field(default_factory=lambda: Finetune(epochs=10, objective=Distill()))
    cache: TeacherCache | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self, model: nn.Module, task: Task, context: Context | None = None) -> Result:
        """Train; history and facts are those of ``training``."""
        context, task = context or Context(), task.ready()
        return self.training.run(model, self.cache.on(task, context.progress) if self.cache else task, context)
