"""The zoo's models: what each is called, how it is built and what it is fed."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SUITES = ("torchvision", "timm", "transformers")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo. ``inputs``: its example inputs in float32 or int64, batch first, the same at each call.

    ``output_of``: as in ``tersor.Task``, where the model returns no tensor, tuple or ``.logits``. ``note``: what is
    not as its library builds it by default.
    """

    suite: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    output_of: Callable[[Any], Tensor] | None = None
    note: str = ""

    @property
    def key(self) -> str:
        """suite/name: what results are filed under."""
        return f"{self.suite}/{self.name}"


def catalogue(suites: Sequence[str] = SUITES) -> tuple[Entry, ...]:
    """All models of the suites, in order. Importing a suite's library takes seconds; nothing is built."""
    entries: list[Entry] = []
    if "torchvision" in suites:
        from benchmarks.zoo.torchvision_models import torchvision_entries

        entries += torchvision_entries()
    if "timm" in suites:
        from benchmarks.zoo.timm_models import timm_entries

        entries += timm_entries()
    if "transformers" in suites:
        from benchmarks.zoo.transformers_models import transformers_entries

        entries += transformers_entries()
    return tuple(entries)


def entry(key: str) -> Entry:
    """The model filed under ``key``. Raises LookupError."""
    for found in catalogue((key.partition("/")[0],)):
        if found.key == key:
            return found
    raise LookupError(f"the zoo has no {key!r}")


def matching(entries: Sequence[Entry], patterns: Sequence[str]) -> tuple[Entry, ...]:
    """The entries whose name, or suite/name, matches one of the glob patterns; all of them without a pattern.

    Raises LookupError for a pattern that matches nothing.
    """
    if not patterns:
        return tuple(entries)
    for pattern in patterns:
        if not any(_matches(found, pattern) for found in entries):
            raise LookupError(f"no model of the zoo matches {pattern!r}")
    return tuple(found for found in entries if any(_matches(found, pattern) for pattern in patterns))


def _matches(found: Entry, pattern: str) -> bool:
    return fnmatch.fnmatchcase(found.name, pattern) or fnmatch.fnmatchcase(found.key, pattern)


def pixels(size: int, *, batch: int = 2, channels: int = 3) -> Callable[[], tuple[Tensor, ...]]:
    """Example inputs of noise [batch, channels, size, size]."""

    def make() -> tuple[Tensor, ...]:
        return (torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(7)),)

    return make


def tokens(vocabulary: int, *, batch: int = 3, length: int = 13, masks: int = 0) -> Callable[[], tuple[Tensor, ...]]:
    """Example inputs of token numbers [batch, length], with ``masks`` tensors of ones like it (attention masks)."""

    def make() -> tuple[Tensor, ...]:
        ids = torch.randint(5, vocabulary, (batch, length), generator=torch.Generator().manual_seed(7))
        return (ids, *(torch.ones_like(ids) for _ in range(masks)))

    return make
