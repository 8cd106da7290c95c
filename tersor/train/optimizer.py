"""The optimiser as data: which one, and which parameters it treats how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize


@final
@dataclass(frozen=True)
class Optimizer:
    """SGD with momentum, or AdamW (``momentum`` is then β₁; β₂ is 0.999).

    ``accumulate``: the mean gradient of so many batches makes one step; at an epoch's end, of those that are left.
    Weight decay pulls only on tensors of two or more dimensions: not on biases, norms or quantiser scales. The learning
    rate of quantiser scales is ``lr`` · ``scale_lr``. Raises InputError for numbers out of range.
    Source of the decoupled decay: Loshchilov and Hutter 2017 (arXiv 1711.05101).
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    scale_lr: float = 1.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise InputError("unknown optimiser", where="Optimizer.name", got=repr(self.name), expected="sgd or adamw")
        if not 0 < self.lr < float("inf"):
            raise InputError("the learning rate must be positive", where="Optimizer.lr", got=self.lr)
        if not 0 <= self.momentum < 1:
            raise InputError("out of range", where="Optimizer.momentum", got=self.momentum, expected="0 ≤ momentum < 1")
        if self.accumulate < 1:
            raise InputError("too few", where="Optimizer.accumulate", got=self.accumulate, expected="1 or more")
        for name in ("weight_decay", "scale_lr"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError("must be 0 or more", where=f"Optimizer.{name}", got=getattr(self, name))

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The trainable parameters as torch's parameter groups: with decay, without, and quantiser scales.

        Raises InputError where nothing is trainable.
        """
        scales = {id(p) for module in model.modules() if isinstance(module, FakeQuantize) for p in module.parameters()}
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trainable:
            raise InputError(
                "nothing to train", where=type(model).__name__, got="no parameter with requires_grad",
                do="Unfreeze what training may change: model.requires_grad_(True)",
            )  # fmt: skip
        others = [p for p in trainable if id(p) not in scales]
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "lr": self.lr, "weight_decay": self.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "lr": self.lr, "weight_decay": 0.0},
            {"params": [p for p in trainable if id(p) in scales], "lr": self.lr * self.scale_lr, "weight_decay": 0.0},
        ]
        return [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]]

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The torch optimiser for ``model``'s trainable parameters."""
        if self.name == "adamw":
            return torch.optim.AdamW(self.groups(model), betas=(self.momentum, 0.999))
        return torch.optim.SGD(self.groups(model), momentum=self.momentum)


def set_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` of its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Copies of the optimiser's tensors, as "key/parameter name" → tensor."""
    return {
        f"{key}/{name}": value.detach().clone()
        for name, parameter in model.named_parameters()
        for key, value in (optimizer.state.get(parameter) or {}).items()
        if isinstance(value, Tensor)
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``state_tensors``: whatever the optimiser had gathered is replaced."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full, value in tensors.items():
        key, _, name = full.partition("/")
        parameter = parameters[name]
        # AdamW counts its steps on the CPU; everything else lies beside its parameter.
        copy = value.clone() if key == "step" else torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = copy
