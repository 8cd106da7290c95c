"""Built-in task ``digits``: scikit-learn's handwritten digits, which come with a dependency."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.files import cache_folder
from tersor.core.metric import ACCURACY
from tersor.core.progress import Progress
from tersor.core.task import Task
from tersor.zoo.batches import TensorBatches, shift
from tersor.zoo.cache import cache_path, trained_once
from tersor.zoo.residual import ResidualNet
from tersor.zoo.train import Training, fit

FOLDS = 5
VERSION = 1  # raised whenever data, architecture or training change in a way that their settings do not show
MEAN, DEVIATION = 0.305, 0.376  # of pixels / 16 over all 1,797 images
TRAINING = Training(epochs=40, peak_lr=0.05)
BATCH = 64

network = partial(ResidualNet, widths=(32, 64, 128), blocks=2, in_channels=1, classes=10)
augment = partial(shift, pixels=1)


def digits(*, fold: int = 0, seed: int = 0, cache: Path | None = None, progress: Progress = Progress()) -> Task:
    """1,797 images [1, 8, 8] of ten digits, and a residual network of 0.7 M parameters trained on three fifths of them.

    Fifth number ``fold`` (0 … 4) is the test set; of the rest a quarter is validation. All splits are stratified.
    ``seed`` decides initialisation and training, which takes well under a minute and is done once: the weights are kept
    in ``cache`` (default: TERSOR_CACHE or ~/.cache/tersor). Torch's random state is left as it was.

    Raises InputError where ``fold`` is not one of five.
    Data: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI; test part, via scikit-learn.
    """
    if fold not in range(FOLDS):
        raise InputError("no such fold", where="digits", got=fold, expected=f"0 … {FOLDS - 1}")
    images, targets = _load()
    train, validation, test = _split(targets, fold)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        batches = TensorBatches(images[train], targets[train], BATCH, shuffle=True, augment=augment)
        recipe = {"version": VERSION, "seed": seed, "fold": fold, "batch": BATCH, **asdict(TRAINING)}
        path = cache_path(cache or cache_folder(), "digits", model, recipe)
        trained_once(model, path, partial(fit, model, batches, TRAINING, progress, "Training the original"), progress)
    return Task(
        model=model.eval(),
        train=batches,
        validation=TensorBatches(images[validation], targets[validation], 256),
        test=TensorBatches(images[test], targets[test], 256),
        calibration=TensorBatches(images[train], targets[train], BATCH),
        metric=ACCURACY,
        example_inputs=(images[train][:2],),
        factory=network,
        name="digits" if fold == 0 else f"digits-fold-{fold}",
        source="digits" if (fold, seed) == (0, 0) else "",  # only the default can be found again by name
    )


def _load() -> tuple[Tensor, Tensor]:
    """(images [1797, 1, 8, 8] of mean 0 and deviation 1, targets [1797])."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - MEAN) / DEVIATION
    return images, torch.tensor(data.target, dtype=torch.int64)


def _split(targets: Tensor, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of train, validation and test: three fifths, a fifth, a fifth."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    labels = targets.numpy()
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(labels, labels)
    rest, test = list(folds)[fold]
    train, validation = train_test_split(rest, test_size=1 / (FOLDS - 1), stratify=labels[rest], random_state=0)
    return torch.from_numpy(train), torch.from_numpy(validation), torch.from_numpy(test)
