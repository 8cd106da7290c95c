"""The quantisers that stand on a model's tensors and activations."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from tersor.core.fake_quantize import FakeQuantize
from tersor.core.intercept import CHILD, Intercept
from tersor.core.place import ActivationPlace, TensorPlace, module_at


def quantizer_on(model: nn.Module, place: TensorPlace) -> FakeQuantize | None:
    """The quantiser that stands on a tensor; None where none does."""
    module = module_at(model, place.module)
    if not parametrize.is_parametrized(module, place.tensor):
        return None
    entries = module.get_submodule(f"parametrizations.{place.tensor}").children()
    return next((entry for entry in entries if isinstance(entry, FakeQuantize)), None)


def quantizer_at(model: nn.Module, place: ActivationPlace) -> FakeQuantize | None:
    """The quantiser that stands on an activation; None where none does."""
    taps = module_at(model, place.module)._modules.get(CHILD)
    key = f"{place.operator}_{place.ordinal}"
    if not isinstance(taps, Intercept) or key not in taps.taps:
        return None
    return next((tap for tap in reversed(list(taps.taps[key].modules())) if isinstance(tap, FakeQuantize)), None)
