"""The model as it was before its quantisers, for what is held against it."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import nn

from tersor.core.dynamic_quantize import DynamicQuantize
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.place import TensorPlace


def quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """Path → quantiser, one that stands in several places under each of them."""
    named = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in named if isinstance(module, FakeQuantize)}


def without_quantizers(model: nn.Module, weights: Collection[TensorPlace] | None = None) -> nn.Module:
    """A copy in eval mode in which quantisers are the identity: all, or those of these ``weights`` only.

    Weights are then what is stored beneath their quantisers (and masks), biases what ``Quantize`` rounded them to: half
    a step of a 32-bit integer away at most.
    """
    bare = copy.deepcopy(model).eval()
    meant = None if weights is None else {_parametrization(place) for place in weights}
    named = list(bare.named_modules(remove_duplicate=False))
    for path in [path for path, module in named if isinstance(module, (FakeQuantize, DynamicQuantize))]:
        parent, _, name = path.rpartition(".")
        if meant is None or parent in meant:
            bare.get_submodule(parent)._modules[name] = nn.Identity()
    return bare


def _parametrization(place: TensorPlace) -> str:
    return ".".join(filter(None, (place.module, "parametrizations", place.tensor)))
