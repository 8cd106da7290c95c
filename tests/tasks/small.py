"""Students and teachers for the tests of distillation: by name, as the command line takes them."""

import torch
from tiny import Net
from tiny import task as tiny_task


def student() -> torch.nn.Module:
    torch.manual_seed(1)
    return Net(width=8)


def wrong_classes() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7))


def teacher() -> torch.nn.Module:
    return tiny_task().model


def no_module() -> int:
    return 3
