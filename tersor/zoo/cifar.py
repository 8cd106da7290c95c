"""CIFAR-10, read from the user's binary batches, and the trained ResNet-20 that may lie beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tersor.core.errors import InputError
from tersor.zoo.batches import flip, shift
from tersor.zoo.resnet_cifar import CifarResNet

FOLDER = "cifar-10-batches-bin"
TRAIN, TEST = tuple(f"data_batch_{number}.bin" for number in range(1, 6)), ("test_batch.bin",)
CHECKPOINT = Path("checkpoints") / "cifar10-resnet20.safetensors"
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of pixels / 255, by colour
_RECORD = 1 + 3 * 32 * 32  # a label, then red, green and blue row by row


@dataclass(frozen=True, eq=False)
class Images:
    """float32 images [n, 3, 32, 32] of mean 0 and deviation 1, and their labels, int64 [n]."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


def read_cifar10(data: Path | None = None) -> tuple[Images, Images]:
    """50,000 training and 10,000 test images of ten classes, in the files' order.

    ``data``: the folder cifar-10-batches-bin; by default the one in TERSOR_DATA. Raises InputError where files are
    absent (saying where it looked) or damaged.
    Data: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
    """
    folder = data if data is not None else _found(Path(FOLDER))
    if folder is None or not folder.is_dir():
        raise InputError(
            "CIFAR-10 is not here", where="read_cifar10",
            got=f"no {', no '.join(str(data or root / FOLDER) for root in data_roots())}",
            expected=f"a folder of the binary batches {TRAIN[0]} … {TEST[0]}",
            do="Unpack the binary version from www.cs.toronto.edu/~kriz/cifar.html, and set TERSOR_DATA to the folder "
            f"above {FOLDER}",
        )  # fmt: skip
    return _read(folder, TRAIN), _read(folder, TEST)


def augment(images: Tensor) -> Tensor:
    """Mirrored at random and moved by up to four pixels. [n, 3, 32, 32] → the same shape."""
    return shift(flip(images), 4)


def trained_resnet20(path: Path | None = None) -> CifarResNet | None:
    """ResNet-20 with the weights at ``path``, by default checkpoints/cifar10-resnet20.safetensors in TERSOR_DATA.

    In eval mode. None where no path is given and there is no such file; InputError where the file does not fit.
    """
    path = path if path is not None else _found(CHECKPOINT)
    if path is None:
        return None
    model = CifarResNet(20)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise InputError(
            "the checkpoint cannot be read", where=str(path), got=str(error).strip().splitlines()[0],
            expected="the weights of a ResNet-20 for CIFAR-10",
        ) from error  # fmt: skip
    return model.eval()


def data_roots() -> list[Path]:
    """Where data is looked for: TERSOR_DATA, or else the shared folder beside the repository."""
    if given := os.environ.get("TERSOR_DATA"):
        return [Path(given)]
    return [Path(__file__).resolve().parents[2].parent / "shared" / "data"]


def _found(name: Path) -> Path | None:
    return next((root / name for root in data_roots() if (root / name).exists()), None)


def _read(folder: Path, names: tuple[str, ...]) -> Images:
    records = np.concatenate([_records(folder / name) for name in names])
    pixels = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32)) / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return Images((pixels - mean) / deviation, torch.from_numpy(records[:, 0].astype(np.int64)))


def _records(path: Path) -> np.ndarray:
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError("the file cannot be read", where=str(path), got=error, do="Fetch it again") from error
    if len(data) == 0 or len(data) % _RECORD or data[::_RECORD].max() > 9:
        raise InputError(
            "not a binary batch of CIFAR-10", where=str(path), got=f"{len(data)} bytes",
            expected=f"records of {_RECORD} bytes, each a label 0 … 9 and its pixels", do="Fetch it again",
        )  # fmt: skip
    return data.reshape(-1, _RECORD)
