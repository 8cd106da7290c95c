"""Lift masks, so that what was at zero trains again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from tersor.core.check_fields import check_fields
from tersor.core.edit import Edit, Mask, Write
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector, aliases, select, stored_at
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method, Pipeline, Step
from tersor.core.task import Task
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.standing import standing_masks
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer


@dataclass(frozen=True)
class Unmask(Method):
    """Let masked weights take part again: every mask keeps everything from now on.

    Args:
        where: modules whose masks are lifted.
        weights: what they start from: "zero", so that the model computes what it did; or "stored": what stands under
            the mask, which is what the weight was when it was masked, or what training's weight decay left of it.

    Raises InputError where ``where`` matches nothing.
    """

    where: Selector = field(default_factory=Everything)
    weights: Literal["zero", "stored"] = "zero"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.weights not in ("zero", "stored"):
            raise InputError("unknown", where="Unmask.weights", got=repr(self.weights), expected="zero or stored")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        chosen = select(model, self.where)
        edits: list[Edit] = []
        lines, skips = [], []
        seen: set[int] = set()
        for place, mask in standing_masks(model):
            stored = stored_at(model, place)
            if place.module not in chosen or id(stored) in seen:
                continue
            seen |= {id(stored_at(model, alias)) for alias in aliases(model, place)}
            gone = int((~mask.keep).sum())
            if not gone:
                skips.append(Skip(str(place), "its mask holds nothing at zero"))
                continue
            if self.weights == "zero":
                edits.append(Write(place, stored.detach().masked_fill(~mask.keep, 0)))
            edits.append(Mask(place, torch.ones_like(mask.keep), merge=False))
            lines.append((str(place), f"{gone:,} of {mask.keep.numel():,} come back, from {self.weights}"))
        if not edits and not skips:
            skips.append(Skip("the model", "no mask stands on it"))
        return Plan("unmask", tuple(edits), tuple(skips), tuple(lines))


def dense_sparse_dense(
    sparsity: float, *, sparse: Step | None = None, dense: Step | None = None, prune: Prune | None = None
) -> Pipeline:
    """Prune, train the sparse network, lift the masks from zero, train the dense network gently: a better dense one.

    Args:
        sparsity: of the time between; the paper takes 0.25 to 0.5.
        sparse, dense: the two trainings; by default five epochs each, the second at a tenth of the learning rate.
        prune: everything else that ``Prune`` takes.

    Source: Han et al. 2017 (arXiv 1607.04381), section 3.
    """
    first = (prune or Prune()).to(sparsity)
    sparse = sparse or Finetune(optimizer=Optimizer(lr=0.025))
    dense = dense or Finetune(optimizer=Optimizer(lr=0.0025))
    return Pipeline((first, sparse, Unmask(), dense))
