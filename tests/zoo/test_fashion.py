import gzip
import importlib
import struct
from pathlib import Path

import pytest
import torch

import tersor.zoo
from tersor.core.errors import InputError
from tersor.zoo.residual import ResidualNet

home = importlib.import_module("tersor.zoo.fashion")


def idx(tensor):
    return struct.pack(f">BBBB{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape) + tensor.numpy().tobytes()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Idx files of 240 + 60 images whose brightness tells their class, under a TERSOR_DATA of their own."""
    torch.manual_seed(0)
    data = tmp_path / "fashion-mnist"
    data.mkdir()
    for of, count in (("train", 240), ("t10k", 60)):
        labels = (torch.arange(count) % 10).to(torch.uint8)
        images = (labels[:, None, None] * 20 + torch.randint(0, 20, (count, 28, 28))).to(torch.uint8)
        (data / f"{of}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (data / f"{of}-labels-idx1-ubyte").write_bytes(idx(labels))
    monkeypatch.setenv("TERSOR_DATA", str(tmp_path))
    monkeypatch.setattr(home, "network", lambda: ResidualNet((4, 8), 1, in_channels=1, classes=10, stem_stride=2))
    return data


def test_the_task_is_read_from_idx_files_plain_or_gzipped(folder, tmp_path):
    task = tersor.zoo.load("fashion", epochs=1, cache=tmp_path / "cache").complete()
    assert [len(split.images) for split in (task.train, task.validation, task.test)] == [220, 20, 60]
    assert torch.bincount(task.validation.targets).tolist() == [2] * 10
    images, targets = next(iter(task.test))
    assert images.shape == (60, 1, 28, 28) and targets.tolist() == [i % 10 for i in range(60)]
    assert torch.allclose(images * 0.3530 + 0.2860, (images * 0.3530 + 0.2860).clamp(0, 1), atol=1e-6)
    assert (task.name, task.source, task.derived) == ("fashion", "fashion", ())


def test_train_and_validation_share_no_image(folder):
    train, validation = home._split(torch.arange(240) % 10)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(240))


def test_absent_files_are_named_with_where_it_looked_and_what_to_set(folder, tmp_path, monkeypatch):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError) as caught:
        tersor.zoo.load("fashion")
    said = str(caught.value)
    assert f"no t10k-labels-idx1-ubyte[.gz] in {folder}" in said and "set TERSOR_DATA" in said
    assert caught.value.exit_code == 2


def test_without_the_variable_the_shared_folder_beside_the_repository_is_meant(monkeypatch):
    monkeypatch.delenv("TERSOR_DATA", raising=False)
    repository = Path(home.__file__).parents[2]
    assert home._usual_folders() == [repository.parent / "shared" / "data" / "fashion-mnist"]


def test_files_that_do_not_belong_together_are_said(folder):
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(torch.zeros(59, dtype=torch.uint8)))
    with pytest.raises(
        InputError, match=r"t10k files do not belong together. Got images \[60, 28, 28\], labels \[59\]"
    ):
        tersor.zoo.load("fashion")


@pytest.mark.skipif(not any(path.is_dir() for path in home._usual_folders()), reason="Fashion-MNIST is not here")
def test_the_real_files_are_split_evenly_and_standardised():
    images, targets, test_images, test_targets = home.fashion_images()
    train, validation = home._split(targets)
    assert (len(train), len(validation), len(test_images)) == (55_000, 5_000, 10_000)
    assert torch.bincount(targets[validation]).tolist() == [500] * 10
    assert torch.bincount(test_targets).tolist() == [1000] * 10
    assert abs(float(images.mean())) < 0.001 and abs(float(images.std()) - 1) < 0.001
