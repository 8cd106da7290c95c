"""Depth pruning: whole residual blocks go, and the model becomes shallower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.core.apply import write
from tersor.core.check_fields import check_fields
from tersor.core.edit import Edit, Swap
from tersor.core.errors import InputError, VerificationError, type_and_message
from tersor.core.place import Everything, Selector, select
from tersor.core.plan import Plan, Skip
from tersor.core.randomness import fixed_randomness
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.core.verify import TOLERANCE, relative_difference
from tersor.graph.residual import above
from tersor.graph.trace import trace
from tersor.prune.blocks.block_scores import BlockScore, Similarity
from tersor.prune.blocks.candidates import Block, Candidates
from tersor.prune.blocks.gates import sharing_copy, switched_off
from tersor.prune.blocks.renumber import renumbered


@dataclass(frozen=True)
class PruneBlocks(Method):
    """Take out the residual blocks that matter least: x + f(x) becomes x, and f is never computed.

    Args:
        blocks: how many, or (below 1) which fraction of those that may go, rounded down.
        score: what ranks blocks.
        where: blocks that may go, by the names that ``plan`` prints (a block that has its module to itself bears that
            module's name, another the name of its largest module).
        level: "branch" takes out single residual branches (a transformer's attention and its feed-forward part, each
            by itself); "layer" the modules that hold them, with whatever else they do, such as a norm after them.

    A block with a projection on its shortcut, one whose branch is read elsewhere, and one with tied parameters stay,
    and are skipped by name. In the place of what is removed stands a placeholder (``core/removed.py``), so that no path
    shifts. Each block's removal is first tried on the example inputs, against the model with that branch zeroed.

    Raises InputError where ``blocks`` is out of range or more than may go, or ``where`` matches nothing; GraphError
    where the model's graph cannot be captured.

    Source: Men et al. 2024, *ShortGPT* (arXiv 2403.03853) for layers; He et al. 2024, *What matters in transformers?*
    (arXiv 2406.15786) for attention and feed-forward branches apart. Which blocks a model has is found from its graph.
    """

    blocks: int | float = 0.25
    score: BlockScore = field(default_factory=Similarity)
    where: Selector = field(default_factory=Everything)
    level: Literal["branch", "layer"] = "branch"

    def __post_init__(self) -> None:
        check_fields(self)
        whole = isinstance(self.blocks, int) and not isinstance(self.blocks, bool)
        if not (self.blocks >= 1 if whole else isinstance(self.blocks, float) and 0 <= self.blocks < 1):
            raise InputError(
                "out of range", where="PruneBlocks.blocks", got=self.blocks,
                expected="a whole number from 1, or a fraction in [0, 1)",
            )  # fmt: skip
        if self.level not in ("branch", "layer"):
            raise InputError("unknown level", where="PruneBlocks.level", got=self.level, expected="branch or layer")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        if task.example_inputs is None:
            raise InputError("the task has no example inputs", where="PruneBlocks", do="Pass task.complete()")
        chosen = select(model, self.where)
        candidates = Candidates(trace(model, task.example_inputs), model, task.example_inputs, self.level)
        known = dict(model.named_modules())
        first = {skip.place: skip for skip in reversed(candidates.skips)}  # a reason for each place is enough
        skips = [skip for skip in reversed(first.values()) if skip.place in chosen or skip.place not in known]
        trial = _Trial(model, task)
        meant = [block for block in candidates.blocks if block.name in chosen]
        blocks = trial.settled(meant, skips)
        if not blocks and not skips:
            skips.append(Skip("the model", "has no residual block that where= means"))
        count = self._count(len(blocks), skips)
        scores = self.score.blocks(model, task, blocks) if count else []
        gone = _least(blocks, scores, count)
        if not gone:
            return Plan("prune blocks", (), tuple(skips))
        edits = trial.best(candidates.swaps(gone), gone)
        lines = tuple(_line(block, score) for block, score in zip(blocks, scores, strict=True) if block in gone)
        zeroed = switched_off(model, [switch for block in gone for switch in block.switch])
        everything: tuple[Edit, ...] = (*edits, *renumbered(model, edits))
        return Plan("prune blocks", everything, tuple(skips), lines, reference=zeroed)

    def _count(self, candidates: int, skips: list[Skip]) -> int:
        if isinstance(self.blocks, int):
            if self.blocks > candidates > 0:
                raise InputError(
                    "so many blocks cannot go", where="PruneBlocks.blocks", got=self.blocks,
                    expected=f"at most {candidates}",
                )  # fmt: skip
            return min(self.blocks, candidates)
        count = math.floor(Fraction(str(self.blocks)) * candidates)
        if candidates and not count:
            skips.append(Skip("the model", f"{self.blocks} of {candidates} blocks is none"))
        return count


def _least(blocks: Sequence[Block], scores: Sequence[float], count: int) -> list[Block]:
    """The ``count`` blocks with the smallest scores, passing over those that go with another one anyway."""
    found: list[Block] = []
    for number in sorted(range(len(scores)), key=scores.__getitem__):
        if len(found) < count and not any(blocks[number].within(other) for other in found):
            found.append(blocks[number])
    return found


class _Trial:
    """Tries removals on sharing copies: on the example inputs, and on one sample of them."""

    def __init__(self, model: nn.Module, task: Task):
        self.model, self.task = model, task
        whole = task.demand_example()
        one = tuple(value[:1] if isinstance(value, Tensor) and value.ndim else value for value in whole)
        self.inputs = [whole]
        if isinstance(_outcome(sharing_copy(model), one, task), Tensor):
            self.inputs.append(one)

    def settled(self, blocks: Sequence[Block], skips: list[Skip]) -> list[Block]:
        """The blocks without which the forward gives what it gives with them switched off, each with the swaps that do
        it; why the others do not goes to ``skips``. All are tried at once, and one by one only if that fails."""
        apart = [block for block in blocks if not any(block.within(other) for other in blocks)]
        if len(apart) == len(blocks) > 1 and self._objection([s for b in blocks for s in b.swaps], blocks) is None:
            return list(blocks)
        return [found for block in blocks if (found := self._settled(block, skips)) is not None]

    def _settled(self, block: Block, skips: list[Skip]) -> Block | None:
        objection = None
        for swaps in (block.swaps, block.exact):
            objection = self._objection(swaps, [block])
            if objection is None:
                return replace(block, swaps=swaps)
        skips.append(Skip(block.name, str(objection)))
        return None

    def best(self, swaps: tuple[Swap, ...], gone: Sequence[Block]) -> tuple[Swap, ...]:
        """``swaps``, which take out whole modules where they can, or if the forward objects the blocks' own.

        Raises VerificationError where it objects to both.
        """
        plain = {swap.module: swap for block in gone for swap in block.swaps}
        own = tuple(swap for path, swap in plain.items() if not any(up in plain for up in above(path) if up != path))
        if self._objection(swaps, gone) is None:
            return swaps
        if (objection := self._objection(own, gone)) is not None:
            raise VerificationError(
                "the blocks can go one by one, but not together; the original is untouched", where="PruneBlocks",
                got=objection, do="Leave blocks out with where= to find the one, and please report the architecture",
            )  # fmt: skip
        return own

    def _objection(self, swaps: Sequence[Swap], blocks: Sequence[Block]) -> str | None:
        without = sharing_copy(self.model)
        for swap in swaps:
            write(without, swap)
        zeroed = switched_off(self.model, [switch for block in blocks for switch in block.switch])
        for inputs in self.inputs:
            expected, got = _outcome(zeroed, inputs, self.task), _outcome(without, inputs, self.task)
            if not isinstance(got, Tensor) or not isinstance(expected, Tensor):
                return f"the forward does not run without it: {got if isinstance(got, str) else expected}"
            difference = relative_difference(got, expected)
            if difference > TOLERANCE:
                return f"without it the outputs differ by {difference:.3g} from those with its branch zeroed"
        return None


def _outcome(model: nn.Module, inputs: tuple[Any, ...], task: Task) -> Tensor | str:
    """The model's output in eval mode, or what its forward raises."""
    try:
        with torch.no_grad(), fixed_randomness(0):
            return task.output(model.eval()(*inputs))
    except Exception as error:  # whatever the user's forward raises without the block is the finding
        return type_and_message(error)


def _line(block: Block, score: float) -> tuple[str, str]:
    modules = ", ".join(swap.module for swap in block.swaps)
    return block.name, f"removed ({modules}): {block.weights:,} weights, score {score:.4g}"
