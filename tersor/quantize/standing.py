"""The quantisers that stand on a model's weights, for those who train beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from tersor.core.fake_quantize import FakeQuantize
from tersor.core.place import TensorPlace, stored_at


def weight_quantizers(model: nn.Module) -> Iterator[tuple[TensorPlace, FakeQuantize]]:
    """Every weight that has a quantiser, with it; a tied one at its first place."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, entries in cast(nn.ModuleDict, module.parametrizations).items():
            place = TensorPlace(path, name)
            for entry in cast(nn.ModuleList, entries):
                if isinstance(entry, FakeQuantize) and id(stored_at(model, place)) not in seen:
                    seen.add(id(stored_at(model, place)))
                    yield place, entry


def learnt_quantizers(model: nn.Module) -> list[FakeQuantize]:
    """The quantisers of weights and activations whose steps are learnt, each once."""
    return [module for module in model.modules() if isinstance(module, FakeQuantize) and module.log_growth is not None]
