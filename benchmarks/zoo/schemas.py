"""Lets torchvision be imported beside a torch build that its compiled operators do not load into."""

from __future__ import annotations

import importlib.metadata

import torch

_OPERATORS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
              "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip
_declared: list[torch.library.Library] = []  # a Library takes its operators along when it is collected


def declare() -> None:
    """Declare the operators that ``import torchvision`` registers rules for. Call it before that import.

    Plain PyPI's torchvision is built for CUDA; beside a CPU build of torch its extension is passed over. A torchvision
    of the CPU index says so in its version, brings the operators along and is left alone.
    """
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return
    known = any(schema.name == "torchvision::nms" for schema in torch._C._jit_get_all_schemas())
    if known or torch.version.cuda is not None or "+" in version:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        library.define(operator)
    _declared.append(library)
