"""One thread for each test process: the tests run side by side, and their networks are tiny."""

import importlib.metadata
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the commands that tests start

import torch  # noqa: E402
from torch.overrides import _get_current_function_mode_stack  # noqa: E402

torch.set_num_threads(1)

collect_ignore = ["tasks/small.py"]  # it imports its neighbour, as a user's file does


@pytest.fixture(autouse=True)
def no_mode_is_left():
    """A mode of torch that a test leaves behind would act in every later test of its process."""
    yield
    assert not _get_current_function_mode_stack()


LIBRARIES = []  # a library takes its operators along when it is collected


@pytest.fixture
def package():
    """Imports a package by name, or skips the test."""
    return import_package


def import_package(name):
    """torchvision's wheel for CUDA, which transformers imports too, comes beside a CPU build of torch
    once two operators are declared."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        version = "+none"
    missing = not any(schema.name == "torchvision::nms" for schema in torch._C._jit_get_all_schemas())
    if torch.version.cuda is None and "+" not in version and missing and "torchvision" not in sys.modules:
        LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
        LIBRARIES[0].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES[0].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(name)
