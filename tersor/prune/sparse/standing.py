"""The masks that stand on a model, for those who change them while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from tersor.core.edit import Mask
from tersor.core.masked import Masked, standing_mask
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan, Skip


def standing_masks(model: nn.Module) -> Iterator[tuple[TensorPlace, Masked]]:
    """Every tensor that has a mask, with it; a tied one at each of its places."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in cast(nn.ModuleDict, module.parametrizations):
                mask = standing_mask(module, name)
                if mask is not None:
                    yield TensorPlace(path, name), mask


def plan_of(name: str, masks: Iterable[tuple[TensorPlace, Masked]], skips: Sequence[Skip] = ()) -> Plan:
    """The plan that puts these masks where they stand, in place of whatever stands there."""
    edits, lines, total, zeros = [], [], 0, 0
    for place, mask in masks:
        keep = mask.keep.detach().clone()
        gone = keep.numel() - int(keep.sum())
        edits.append(Mask(place, keep, merge=False))
        lines.append((str(place), share(gone, keep.numel())))
        total, zeros = total + keep.numel(), zeros + gone
    if total:
        lines.append(("<model>", f"{share(zeros, total)}, in {len(edits)} weights"))
    return Plan(name, tuple(edits), tuple(skips), tuple(lines))


def share(zeros: int, size: int) -> str:
    """How many of how many are zero, for a plan's line."""
    return f"{zeros:,} of {size:,} zero, {zeros / size:.4%}"
