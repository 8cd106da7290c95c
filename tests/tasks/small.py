"""Students and teachers for the tests of distillation: by name, as the command line takes them."""

from functools import partial

import torch
from tiny import Net
from tiny import task as tiny_task


def student() -> torch.nn.Module:
    torch.manual_seed(1)
    return Net(width=8)


wrong_classes = partial(torch.nn.Linear, 64, 7)


def teacher() -> torch.nn.Module:
    return tiny_task().model


def no_module() -> int:
    return 3
