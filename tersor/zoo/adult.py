"""Adult, the census of 1994: whether somebody earns over 50,000 dollars, with sex and race, and a small network for it.

The example of groups: ``tersor evaluate task RUN --data tersor.zoo.adult:evaluation``, after
``tersor compress tersor.zoo.adult:adult -o RUN``.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.files import cache_folder
from tersor.core.metric import ACCURACY
from tersor.core.progress import Progress
from tersor.core.task import Batch, Task
from tersor.measure.behaviour.data import EvaluationData
from tersor.zoo.batches import TensorBatches
from tersor.zoo.cache import cache_path, trained_once
from tersor.zoo.cifar import data_roots

VERSION = 1  # raised whenever data, architecture or training change
COLUMNS = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
    "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country",
)  # fmt: skip
NUMBERS = ("age", "education-num", "capital-gain", "capital-loss", "hours-per-week")
LEFT_OUT = ("fnlwgt", "education")  # how many people a row stands for; education-num says the same
SENSITIVE = ("sex", "race")
FILES = ("adult.data", "adult.test")
VALIDATION, EPOCHS, BATCH = 4_000, 8, 256

Columns = Mapping[str, NDArray[np.str_]]


def adult(*, data: Path | None = None, cache: Path | None = None, progress: Progress = Progress()) -> Task:
    """28,561 + 4,000 + 16,281 people (train, validation, test) and a network of three layers, trained in seconds.

    ``data``: the folder of adult.data and adult.test (plain or .xz), by default adult in TERSOR_DATA. Numbers are
    standardised, the rest is one-hot. The network is kept in ``cache``. Raises InputError where files are absent.
    Data: Becker and Kohavi 1996, UCI Machine Learning Repository, doi:10.24432/C5XW20, CC BY 4.0.
    """
    return _task(*_features(data), cache or cache_folder(), progress)


def evaluation(*, data: Path | None = None, cache: Path | None = None) -> EvaluationData:
    """The task with what fairness asks for: sex and race of everybody, and that over 50,000 is the favourable class."""
    x, y, places = _features(data)
    return EvaluationData(
        _task(x, y, places, cache or cache_folder(), Progress()), groups_of=partial(_groups, places),
        classes=("up to 50,000", "over 50,000"), positive=1,
    )  # fmt: skip


Places = Mapping[str, tuple[int, tuple[str, ...]]]  # attribute → its first one-hot feature, and its values
Split = tuple[Tensor, Tensor]  # training, test


def _groups(places: Places, batch: Batch) -> dict[str, list[str]]:
    x = batch[0]
    found = {}
    for name in SENSITIVE:
        first, values = places[name]
        found[name] = [values[at] for at in x[:, first : first + len(values)].argmax(dim=1).tolist()]
    return found


def _task(x: Split, y: Split, places: Places, cache: Path, progress: Progress) -> Task:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = torch.randperm(len(x[0]))
        train, validation = order[VALIDATION:], order[:VALIDATION]
        features = x[0].shape[1]
        model = nn.Sequential(
            nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
        )  # fmt: skip
        batches = TensorBatches(x[0][train], y[0][train], BATCH, shuffle=True)
        path = cache_path(cache, "adult", model, {"version": VERSION, "epochs": EPOCHS, "rows": len(train)})
        trained_once(model, path, partial(_train, model, batches, progress), progress)
    return Task(
        model=model.eval(), train=batches, validation=TensorBatches(x[0][validation], y[0][validation], 1024),
        test=TensorBatches(x[1], y[1], 1024), metric=ACCURACY, name="adult", source="tersor.zoo.adult:adult",
    )  # fmt: skip


def _train(model: nn.Module, batches: TensorBatches, progress: Progress) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    every = (batch for _ in range(EPOCHS) for batch in batches)
    for x, y in progress.track(every, "Training the original", EPOCHS * len(batches)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def _features(data: Path | None) -> tuple[Split, Split, Places]:
    folders = [data] if data is not None else [root / "adult" for root in data_roots()]
    (train, train_targets), (test, test_targets) = (_read(_find(name, folders)) for name in FILES)
    parts: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    places: dict[str, tuple[int, tuple[str, ...]]] = {}
    width = 0
    for name in COLUMNS:
        if name in LEFT_OUT:
            continue
        if name in NUMBERS:
            known = train[name].astype(np.float64)
            mean, deviation = known.mean(), max(float(known.std()), 1e-12)
            blocks = [((column[name].astype(np.float64) - mean) / deviation)[:, None] for column in (train, test)]
        else:
            values = tuple(sorted({*train[name], *test[name]}))
            places[name] = width, values
            blocks = [(column[name][:, None] == np.array(values)).astype(np.float32) for column in (train, test)]
        for block, into in zip(blocks, parts, strict=True):
            into.append(block.astype(np.float32))
        width += blocks[0].shape[1]
    x = tuple(torch.from_numpy(np.concatenate(each, axis=1)) for each in parts)
    return (x[0], x[1]), (torch.from_numpy(train_targets), torch.from_numpy(test_targets)), places


def _find(name: str, folders: list[Path]) -> Path:
    for folder in folders:
        for path in (folder / name, folder / f"{name}.xz"):
            if path.is_file():
                return path
    raise InputError(
        "Adult is not here", where="tersor.zoo.adult", got=f"no {name}[.xz] in {', '.join(map(str, folders))}",
        expected=" and ".join(FILES),
        do="Fetch them from archive.ics.uci.edu/dataset/2/adult into a folder adult, and set TERSOR_DATA to the folder "
        "above it",
    )  # fmt: skip


def _read(path: Path) -> tuple[Columns, NDArray[np.int64]]:
    """The columns by name, and whether each earns over 50,000."""
    try:
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("ascii")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError("the file cannot be read", where=str(path), got=error, do="Fetch it again") from error
    rows = [line.rstrip(".").split(", ") for line in text.splitlines() if line.strip() and not line.startswith("|")]
    wrong = next((row for row in rows if len(row) != len(COLUMNS) + 1 or row[-1] not in ("<=50K", ">50K")), None)
    if wrong is not None or not rows:
        raise InputError(
            "not a file of Adult", where=str(path), got=", ".join(wrong or ["no rows"])[:80],
            expected=f"rows of {len(COLUMNS)} values and <=50K or >50K", do="Fetch it again",
        )  # fmt: skip
    table = np.array(rows)
    columns = {name: table[:, at] for at, name in enumerate(COLUMNS)}
    return columns, (table[:, -1] == ">50K").astype(np.int64)
