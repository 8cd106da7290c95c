"""Run a model in one mode and leave every module's training flag as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module, *, training: bool = False) -> Iterator[nn.Module]:
    """``model`` in eval mode (or as it trains); at the end each module's own flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield model.train(training)
    finally:
        for module, flag in flags:
            module.training = flag
