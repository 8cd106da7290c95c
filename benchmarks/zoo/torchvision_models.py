"""All of torchvision's classifiers up to 150 M parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.catalogue import Entry, pixels
from benchmarks.zoo.schemas import declare

declare()

import torchvision  # noqa: E402
from torchvision.models import get_model, get_model_weights, list_models  # noqa: E402

LARGEST = 150_000_000  # parameters
SIZE = 64  # pixels: what a convolutional network needs that halves five times, and no more
# Where 64 is too small, or the windows would not divide: (pixels, arguments of the builder).
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "inception_v3": (299, {}),  # its auxiliary head, which training runs, needs that
    "maxvit_t": (224, {}),
    "swin_t": (112, {}),
    "swin_s": (112, {}),
    "swin_b": (112, {}),
    "swin_v2_t": (128, {}),
    "swin_v2_s": (128, {}),
    "swin_v2_b": (128, {}),
    "vit_b_16": (96, {"image_size": 96}),
    "vit_b_32": (96, {"image_size": 96}),
}
SLOW_INIT = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}  # scipy-like draws: minutes


def torchvision_entries() -> list[Entry]:
    """The classifiers, by torchvision's own list and its own parameter counts."""
    return [_entry(name) for name in list_models(module=torchvision.models) if parameters(name) <= LARGEST]


def parameters(name: str) -> int:
    """The parameters that torchvision documents for a model, without building it."""
    return max(weights.meta["num_params"] for weights in get_model_weights(name))


def _entry(name: str) -> Entry:
    size, arguments = SIZES.get(name, (SIZE, {}))
    note = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return Entry("torchvision", name, partial(_build, name, arguments), pixels(size), note=note)


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    return get_model(name, weights=None, **arguments, **SLOW_INIT.get(name, {}))
