"""The weights of a model that may be masked, and why others are not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize, prune

from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.finite import expect_finite
from tersor.core.masked import Masked, standing_mask
from tersor.core.place import TensorPlace, stored_at
from tersor.core.plan import Skip
from tersor.prune.blocks.gates import sharing_copy

Kind = Literal["convolution", "linear", "other"]


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor of a model that may lose weights.

    ``shape``: [out, in, *kernel], as patterns and scopes see it; ``transposed``: it is stored as [in, out, *kernel].
    ``standing``: the mask that stands on it, in the shape that is stored; None where there is none.
    """

    place: TensorPlace
    kind: Kind
    shape: tuple[int, ...]
    transposed: bool = False
    standing: Tensor | None = None

    @property
    def size(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    def turned(self, tensor: Tensor) -> Tensor:
        """A tensor of the stored shape as [out, in, *kernel], or back: the same either way."""
        return tensor.transpose(0, 1) if self.transposed else tensor


def weights_of(model: nn.Module, chosen: Mapping[str, nn.Module], skips: list[Skip]) -> list[Weight]:
    """Every float parameter of two or more axes that a ``chosen`` module holds, tied ones once, in the model's order.

    Those that cannot be masked leave their reason in ``skips``. Raises InputError where masks of torch.nn.utils.prune
    stand on the model, where a weight is on the meta device, and where one is not finite: its name, and how many.
    """
    found: list[Weight] = []
    seen: set[int] = set()
    small = [0, 0]
    for path, module in chosen.items():
        _expect_no_other_masks(path, module)
        if _is_packed(module):
            skips.append(Skip(path, f"its weights are packed integers ({type(module).__name__}): prune, then quantise"))
        for name, reason in _parameters(module):
            place = TensorPlace(path, name)
            if reason is None:
                stored = stored_at(model, place)
                if id(stored) in seen:
                    continue
                seen.add(id(stored))
                if stored.ndim < 2:
                    small = [small[0] + 1, small[1] + stored.numel()]
                    continue
                reason = _objection(stored)
            if reason is not None:
                skips.append(Skip(str(place), reason))
                continue
            expect_finite(stored, str(place), "weights that are not finite cannot be ranked")
            found.append(_weight(module, place, stored))
    if small[0]:
        skips.append(Skip("the model", f"{small[0]} parameters of fewer than two axes stay: {small[1]:,} numbers"))
    return found


def _parameters(module: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Name of each parameter of a module's own, and why it cannot be masked if it is computed; masked ones too."""
    if isinstance(module, (parametrize.ParametrizationList, FakeQuantize)):
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, None
    if parametrize.is_parametrized(module):
        for name, entries in cast(nn.ModuleDict, module.parametrizations).items():
            others = [type(entry).__name__ for entry in _entries(entries) if not _known(entry)]
            yield name, f"it is computed by {', '.join(others)}: a mask on it would be trained away" if others else None


def _entries(entries: nn.Module) -> Iterator[nn.Module]:
    assert isinstance(entries, parametrize.ParametrizationList)
    yield from entries


def _known(entry: nn.Module) -> bool:
    return isinstance(entry, (Masked, FakeQuantize))


def _objection(stored: Tensor) -> str | None:
    if not stored.is_floating_point():
        return f"it holds {str(stored.dtype).removeprefix('torch.')}, not floating point: prune before quantising"
    if stored.element_size() < 2:
        return f"it holds {str(stored.dtype).removeprefix('torch.')}, too few bits to rank: prune before quantising"
    return None if stored.numel() else f"it is empty: shape {list(stored.shape)}"


def _is_packed(module: nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith("torch.ao.nn.") and ".quantized" in home


def _expect_no_other_masks(path: str, module: nn.Module) -> None:
    if any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        raise InputError(
            "another mask stands here, whose zeros cannot be counted", where=path or "<model>",
            got=f"a mask of torch.nn.utils.prune in a {type(module).__name__}", expected="a plain model",
            do="Call torch.nn.utils.prune.remove(module, name) first",
        )  # fmt: skip


def _weight(module: nn.Module, place: TensorPlace, stored: Tensor) -> Weight:
    kind: Kind = (
        "convolution" if isinstance(module, _ConvNd) else "linear" if isinstance(module, nn.Linear) else "other"
    )
    transposed = isinstance(module, _ConvTransposeNd)
    shape = (stored.shape[1], stored.shape[0], *stored.shape[2:]) if transposed else tuple(stored.shape)
    mask = standing_mask(module, place.tensor)
    return Weight(place, kind, shape, transposed, None if mask is None else mask.keep)


def lifted(model: nn.Module) -> nn.Module:
    """A copy that shares the tensors, in which no mask holds anything at zero: weights are what is stored."""
    target = sharing_copy(model)
    for module in target.modules():
        if isinstance(module, Masked):
            module.keep = torch.ones_like(module.keep)
    return target
