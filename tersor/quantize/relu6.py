"""ReLU instead of ReLU6, so that channels behind it may be rescaled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import final

from torch import Tensor, nn

from tersor.core.check_fields import check_fields
from tersor.core.edit import Swap
from tersor.core.errors import InputError
from tersor.core.place import Everything, Selector, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.observe.layerwise import calibration_arguments, pass_through
from tersor.quantize.unquantized import without_quantizers


@final
@dataclass(frozen=True)
class ReplaceReLU6(Method):
    """Swap ReLU6 modules for ReLU where they clip next to nothing of the calibration data.

    min(max(x, 0), 6) does not commute with a factor, so ``Equalize`` cannot pass it, and MobileNets are full of it;
    max(x, 0) does. What was above 6 is then no longer clipped: this changes the function there, and training, had it
    relied on the clip, would show it. Each line says which share of the values was above 6. A ReLU6 that a forward
    calls as a function is no module, and stays.

    Args:
        most: a ReLU6 that clips a larger share of its values stays, as a Skip.
        batches: calibration batches to count over.
        where: which modules.

    Raises InputError for settings out of range and no calibration data.
    Source: Nagel et al. 2019 (arXiv 1906.04721), section 5.1.1, who replace all of MobileNet-v2's.
    """

    most: float = 0.01
    batches: int = 8
    where: Selector = field(default_factory=Everything)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.most <= 1:
            raise InputError("no share", where="ReplaceReLU6.most", got=self.most, expected="from 0 to 1")
        if self.batches < 1:
            raise InputError("too few", where="ReplaceReLU6.batches", got=self.batches, expected="1 or more")

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """One Swap for each ReLU6, under each of its names."""
        chosen = {id(module) for module in select(model, self.where).values() if isinstance(module, nn.ReLU6)}
        if not chosen:
            return Plan("ReplaceReLU6", skips=(Skip("<model>", "no ReLU6 modules among those meant"),))
        named = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if id(module) in chosen]
        first = {id(module): path for path, module in reversed(named)}
        clipped, seen = self._counts(model, task, list(first.values()))
        edits, skips, lines = [], [], []
        for path, module in named:
            name = first[id(module)]
            share = clipped[name] / seen[name] if seen[name] else 0.0
            if share > self.most:
                skips.append(Skip(path, f"it clips {share:.2%} of its values, more than {self.most:.2%}"))
                continue
            edits.append(Swap(path, "ReLU"))
            lines.append((path, f"ReLU6 -> ReLU; {share:.2%} of {seen[name]:,} values were clipped"))
        return Plan("ReplaceReLU6", tuple(edits), tuple(skips), tuple(lines))

    def _counts(self, model: nn.Module, task: Task, paths: list[str]) -> tuple[Counter[str], Counter[str]]:
        """(how many values above 6 each module gave its clip to, how many values in all), by path."""
        running = without_quantizers(model)
        clipped: Counter[str] = Counter()
        seen: Counter[str] = Counter()

        def see(path: str, _: Tensor, y: Tensor) -> None:  # x may have been changed in place, y may not
            clipped[path] += int((y >= 6).sum())
            seen[path] += y.numel()

        for number, arguments in enumerate(calibration_arguments(running, task, self.batches, 0, "ReplaceReLU6")):
            pass_through(running, paths, see, arguments, number)
        return clipped, seen
