"""Built-in task ``fashion``: Fashion-MNIST, read from the user's idx files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.files import cache_folder
from tersor.core.metric import ACCURACY
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.zoo.batches import TensorBatches, flip, shift
from tersor.zoo.cache import cache_path, trained_once
from tersor.zoo.idx import read_idx
from tersor.zoo.residual import ResidualNet
from tersor.zoo.train import Training, fit

VERSION = 1  # raised whenever data, architecture or training change in a way that their settings do not show
MEAN, DEVIATION = 0.2860, 0.3530  # of pixels / 255 over the 60,000 training images
VALIDATION = 12  # one image in twelve of the training files
CALIBRATION = 1_024
TRAINING = Training(epochs=15, peak_lr=0.2, bf16=True)
BATCH = 128
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

network = partial(ResidualNet, widths=(32, 64, 128), blocks=2, in_channels=1, classes=10, stem_stride=2)


def augment(images: Tensor) -> Tensor:
    """Mirrored at random and moved by up to two pixels. [n, 1, 28, 28] → the same shape."""
    return shift(flip(images), 2)


def fashion(
    *,
    seed: int = 0,
    data: Path | None = None,
    cache: Path | None = None,
    epochs: int = TRAINING.epochs,
    progress: Progress = Progress(),
) -> Task:
    """60,000 + 10,000 images [1, 28, 28] of ten kinds of clothing, and a residual network of 0.7 M parameters.

    55,000 images train, 5,000 drawn evenly from the classes validate, 10,000 test. The idx files (plain or .gz) are
    read from ``data``, by default the folder fashion-mnist in TERSOR_DATA. The model is trained once, for ``epochs``
    epochs of about 20 s on two cores, and kept in ``cache`` (default: TERSOR_CACHE or ~/.cache/tersor). ``seed``
    decides initialisation and training; torch's random state is left as it was.

    Raises InputError where files are absent (saying where it looked) or damaged.
    Data: Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747).
    """
    training = replace(TRAINING, epochs=epochs)
    images, targets, test_images, test_targets = fashion_images(data)
    train, validation = _split(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        batches = TensorBatches(images[train], targets[train], BATCH, shuffle=True, augment=augment)
        recipe = {"version": VERSION, "seed": seed, "batch": BATCH, "images": len(train), **asdict(training)}
        path = cache_path(cache or cache_folder(), "fashion", model, recipe)
        trained_once(model, path, partial(fit, model, batches, training, progress, "Training the original"), progress)
    some = train[:CALIBRATION]
    return Task(
        model=model.eval(),
        train=batches,
        validation=TensorBatches(images[validation], targets[validation], 256),
        test=TensorBatches(test_images, test_targets, 256),
        calibration=TensorBatches(images[some], targets[some], BATCH),
        metric=ACCURACY,
        example_inputs=(images[some][:2],),
        factory=network,
        name="fashion",
        source="fashion",
    )


def fashion_images(data: Path | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and targets, test images and targets; images of mean 0 and deviation 1."""
    folders = [data] if data else _usual_folders()
    train_images, train_labels, test_images, test_labels = (read_idx(_find(name, folders)) for name in FILES)
    for images, labels, of in ((train_images, train_labels, "train"), (test_images, test_labels, "t10k")):
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise InputError(
                f"the {of} files do not belong together", where="fashion-mnist",
                got=f"images {list(images.shape)}, labels {list(labels.shape)}", expected="[n, 28, 28] and [n]",
            )  # fmt: skip
    return _standard(train_images), train_labels.long(), _standard(test_images), test_labels.long()


def _standard(images: Tensor) -> Tensor:
    return (images[:, None].float() / 255 - MEAN) / DEVIATION


def _usual_folders() -> list[Path]:
    if given := os.environ.get("TERSOR_DATA"):
        return [Path(given) / "fashion-mnist"]
    repository = Path(__file__).resolve().parents[2]
    return [repository.parent / "shared" / "data" / "fashion-mnist"]


def _find(name: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise InputError(
        "Fashion-MNIST is not here", where="built-in task fashion",
        got=f"no {name}[.gz] in {', '.join(map(str, folders))}", expected=f"the four idx files: {', '.join(FILES)}",
        do="Fetch them from github.com/zalandoresearch/fashion-mnist into a folder fashion-mnist, and set TERSOR_DATA "
        "to the folder above it",
    )  # fmt: skip


def _split(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of train and validation, each in random order."""
    from sklearn.model_selection import train_test_split

    every, labels = torch.arange(len(targets)).numpy(), targets.numpy()
    train, validation = train_test_split(every, test_size=1 / VALIDATION, stratify=labels, random_state=0)
    return torch.from_numpy(train), torch.from_numpy(validation)
