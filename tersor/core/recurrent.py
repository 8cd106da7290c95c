"""Recurrent layers under parametrizations: their list of weights is made anew whenever it is read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


def list_weights_anew(module: nn.Module) -> None:
    """Let a parametrized nn.RNN, LSTM or GRU read its weights through their parametrizations; others are left alone.

    torch's keep a list of their weights beside, made once: it would hold on to what the weight was when it was
    parametrized, which is neither trained nor copied. The class that is changed is the module's own, which
    ``register_parametrization`` made for it.
    """
    if isinstance(module, nn.RNNBase) and parametrize.is_parametrized(module):
        vars(module).pop("_flat_weights", None)
        type(module)._flat_weights = property(_weights, _ignore)  # type: ignore[assignment]


def _weights(module: Any) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _ignore(module: Any, value: object) -> None:
    """torch sets the list when the module moves: there is none to set."""
