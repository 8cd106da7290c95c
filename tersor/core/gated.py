"""SiLU and hard swish as what they are made of: a gate, and its product with what it was computed from."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.errors import InputError

GATES = {"sigmoid": F.sigmoid, "hardsigmoid": F.hardsigmoid}


class Gated(nn.Module):
    """x · gate(x), any shape: SiLU with the gate "sigmoid", hard swish with "hardsigmoid".

    Both operators are this module's own calls, so that quantisers may stand on the result of either. In float32 it
    gives what SiLU and hard swish give, to a few units in the last place.

    Raises InputError for any other gate.

    >>> import torch
    >>> x = torch.linspace(-6, 6, 7)
    >>> torch.allclose(Gated("hardsigmoid")(x), F.hardswish(x), rtol=1e-6)
    True
    """

    def __init__(self, gate: str) -> None:
        super().__init__()
        if gate not in GATES:
            raise InputError("unknown gate", where="Gated.gate", got=gate, expected=sorted(GATES))
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * GATES[self.gate](x)

    def extra_repr(self) -> str:
        return self.gate
