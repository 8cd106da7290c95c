"""What only training needs, standing on the model while it trains: projections, adaptive weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from tersor.core.errors import InputError

CHILD = "tersor_training"  # the name under which an Attached stands in its model


class Attached(nn.Module):
    """Modules by key, as one child of the model: they move, train and stand in checkpoints with it.

    Whoever attached them detaches them before the model is handed back. As a child of a Sequential it is the identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()

    def forward(self, x: Any) -> Any:
        return x


def attach(model: nn.Module, key: str, module: nn.Module) -> None:
    """Put ``module`` on ``model``, in the place of an earlier one of that key."""
    held = model._modules.get(CHILD)
    if not isinstance(held, Attached):
        held = Attached()
        model.add_module(CHILD, held)
    held.parts[key] = module


def attached(model: nn.Module, key: str) -> nn.Module:
    """What stands on ``model`` under ``key``. Raises InputError where nothing does."""
    held = model._modules.get(CHILD)
    if not isinstance(held, Attached) or key not in held.parts:
        raise InputError(
            "what is trained beside the model is not there", where=key, got=f"a {type(model).__name__} without it",
            do="Train with Finetune; in a loop of your own call begin(model, task) of each of objective.companions() "
            "before the optimiser is built, and finish(model) at the end",
        )  # fmt: skip
    return held.parts[key]


def detach(model: nn.Module, key: str) -> None:
    """Take off what stands under ``key``, where there is anything."""
    held = model._modules.get(CHILD)
    if isinstance(held, Attached):
        if key in held.parts:
            del held.parts[key]
        if not held.parts:
            del model._modules[CHILD]


def is_attached(path: str) -> bool:
    """Whether ``path`` is that of something which only training needs."""
    return CHILD in path.split(".")
