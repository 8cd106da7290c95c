"""A layer that computes some of its channels and gives the others a constant, at the width that it had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.errors import InputError

_CONVOLUTIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "conv1d": (1, F.conv1d), "conv2d": (2, F.conv2d), "conv3d": (3, F.conv3d),
}  # fmt: skip


class Scattered(nn.Module):
    """A layer of whose ``width`` channels ``kept`` are computed: […, in] → […, width] where it is linear,
    [batch, in, …] → [batch, width, …] where it is a convolution.

    ``weight`` [kept, in, …] and ``bias`` [width] bear the names that they had in the layer; ``table`` [width] says
    which row of the weight makes a channel, ``kept`` for none: such a channel is its bias. Weight and bias are given by
    Writes, since a Swap cannot know their type.

    Args:
        kind: "linear", "conv1d", "conv2d" or "conv3d".
        width, kept: how many channels come out, and how many of them are computed.
        options: stride, padding and dilation of a convolution.
        attributes: integers that the layer had (``in_features``, ``out_channels`` …), since others may ask for them.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    table: Tensor

    def __init__(
        self, kind: str, width: int, kept: int, options: Mapping[str, Any] | None = None,
        attributes: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind != "linear" and kind not in _CONVOLUTIONS:
            raise InputError("unknown kind", where="Scattered.kind", got=kind, expected=["linear", *_CONVOLUTIONS])
        if not (type(width) is int and type(kept) is int and 0 < kept <= width):
            raise InputError(
                "out of range", where="Scattered.kept", got=f"{kept} of {width}", expected="1 to the width"
            )
        self.kind, self.width, self.kept, self.options = kind, width, kept, _options(options or {})
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.register_buffer("table", torch.full((width,), kept))
        for name, value in (attributes or {}).items():
            if type(value) is not int or name.startswith("_") or name in dir(self):
                raise InputError("no plain attribute", where=f"Scattered.attributes[{name!r}]", got=str(value)[:60])
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None, "both are written after the swap"
        if self.kind == "linear":
            dimensions, y = 0, F.linear(x, self.weight)
        else:
            dimensions, convolve = _CONVOLUTIONS[self.kind]
            y = convolve(x, self.weight, **self.options)
        channels = -1 - dimensions
        y = F.pad(y, [0, 0] * dimensions + [0, 1])  # the channel of zeros that removed ones are
        y = y.index_select(channels, self.table.to(y.device))
        return y + self.bias.reshape(-1, *[1] * dimensions)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.kept} of {self.width} channels"


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        numbers = isinstance(value, Sequence) and all(type(item) is int and item >= 0 for item in value)
        if name not in ("stride", "padding", "dilation") or not (numbers or value in ("same", "valid")):
            raise InputError("no option of a convolution", where=f"Scattered.options[{name!r}]", got=str(value)[:60])
    return {name: value if isinstance(value, str) else list(value) for name, value in options.items()}
