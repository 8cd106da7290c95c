"""Copies of a model that cost no second set of weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def sharing_copy(model: nn.Module, instead: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A copy with modules, buffers and modes of its own, on the model's own parameters.

    ``instead``: id of a parameter or buffer → what the copy holds in its place. Whoever writes into a parameter of the
    copy writes into the model's.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo | dict(instead or {}))
