from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tersor.core.errors import InputError
from tersor.zoo import cifar
from tersor.zoo.resnet_cifar import CifarResNet


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Batches of four images each under a TERSOR_DATA of their own; red is 51, green 102, blue 255."""
    data = tmp_path / cifar.FOLDER
    data.mkdir()
    for number, name in enumerate((*cifar.TRAIN, *cifar.TEST)):
        records = np.empty((4, 3073), np.uint8)
        records[:, 0] = [number, 1, 2, 3]
        records[:, 1:1025], records[:, 1025:2049], records[:, 2049:] = 51, 102, 255
        records[0, 1 + 2] = 0  # red, row 0, column 2
        (data / name).write_bytes(records.tobytes())
    monkeypatch.setenv("TERSOR_DATA", str(tmp_path))
    return data


def test_images_come_in_the_order_of_the_files_by_colour_and_standardised(folder):
    train, test = cifar.read_cifar10()
    assert train.images.shape == (20, 3, 32, 32) and len(train) == 20
    assert train.targets.tolist() == [n for batch in range(5) for n in (batch, 1, 2, 3)]
    assert test.targets.tolist() == [5, 1, 2, 3]
    expected = [(0.2 - 0.4914) / 0.2470, (0.4 - 0.4822) / 0.2435, (1 - 0.4465) / 0.2616]
    assert torch.allclose(test.images[3].mean(dim=(1, 2)), torch.tensor(expected), atol=1e-5)
    assert test.images[0, 0, 0, 2] == pytest.approx(-0.4914 / 0.2470)
    assert test.images[0, 0, 2, 0] == pytest.approx(expected[0])


def test_absent_files_are_named_with_where_it_looked_and_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSOR_DATA", str(tmp_path))
    with pytest.raises(InputError, match=rf"no {tmp_path / cifar.FOLDER}.*set TERSOR_DATA"):
        cifar.read_cifar10()
    assert cifar.trained_resnet20() is None


def test_without_the_variable_the_shared_folder_beside_the_repository_is_meant(monkeypatch):
    monkeypatch.delenv("TERSOR_DATA", raising=False)
    assert cifar.data_roots() == [Path(cifar.__file__).parents[2].parent / "shared" / "data"]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"\xff" + raw[1:], lambda raw: b""])
def test_a_damaged_batch_is_said(folder, damage):
    path = folder / "data_batch_3.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"not a binary batch.*data_batch_3.bin|data_batch_3.bin.*not a binary batch"):
        cifar.read_cifar10()


def test_augmentation_keeps_the_shape_and_differs_between_images():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1)
    augmented = cifar.augment(images)
    assert augmented.shape == images.shape
    assert len({tuple(image.flatten()[:64].tolist()) for image in augmented}) > 4


def test_a_checkpoint_is_found_beside_the_data_and_one_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSOR_DATA", str(tmp_path))
    path = tmp_path / cifar.CHECKPOINT
    path.parent.mkdir()
    model = CifarResNet(20)
    save_file(model.state_dict(), path)
    found = cifar.trained_resnet20()
    assert found is not None and not found.training
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    save_file({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="the checkpoint cannot be read"):
        cifar.trained_resnet20()


@pytest.mark.parametrize("depth, parameters", [(20, 0.27e6), (56, 0.85e6)])
def test_the_networks_have_the_layers_and_parameters_of_the_paper(depth, parameters):
    model = CifarResNet(depth)
    weighted = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(weighted) == depth + 2  # the two projections
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_depth_that_is_no_such_network_is_refused():
    with pytest.raises(InputError, match=r"expected 6 n \+ 2|Expected 6 n \+ 2"):
        CifarResNet(18)
