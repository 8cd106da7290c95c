"""Indices that layers carry to find their place in a key-value cache must have no holes once layers are gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tersor.core.edit import Attribute, Swap
from tersor.graph.residual import above

INDEX = "layer_idx"  # what Hugging Face's attention layers are called in a cache


def renumbered(model: nn.Module, swaps: Iterable[Swap]) -> tuple[Attribute, ...]:
    """``layer_idx`` of the layers that stay, counted anew, where a layer with such an index goes.

    A cache of which the first place stays empty tells the model that nothing was read yet. Left alone: models whose
    layers differ in the kind of cache they use (``config.layer_types``), and layers that do not fill all places.
    """
    gone = {swap.module for swap in swaps}
    kinds: dict[type, dict[str, int]] = {}
    for path, module in model.named_modules():
        index = vars(module).get(INDEX)
        if type(index) is int:
            kinds.setdefault(type(module), {})[path] = index
    config: Any = getattr(model, "config", None)
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return ()
    found: list[Attribute] = []
    for indices in kinds.values():
        left = [path for path in indices if gone.isdisjoint(above(path))]
        if sorted(indices.values()) == list(range(len(indices))) and len(left) < len(indices):
            ordered = sorted(left, key=indices.__getitem__)
            found += [Attribute(path, INDEX, new) for new, path in enumerate(ordered) if new != indices[path]]
    return tuple(found)
