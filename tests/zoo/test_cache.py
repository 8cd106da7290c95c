import pytest
import torch
from torch import nn

from tersor.core.files import cache_folder
from tersor.core.progress import Progress
from tersor.zoo.cache import cache_path, trained_once


class Heard(Progress):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(2, 2)


def trainer(model, value, calls):
    def train():
        calls.append(value)
        nn.init.constant_(model.weight, value)

    return train


def test_weights_are_trained_once_and_read_afterwards(tmp_path, model):
    calls, path = [], tmp_path / "deep" / "weights.safetensors"
    trained_once(model, path, trainer(model, 3.0, calls), Progress())
    other = nn.Linear(2, 2)
    trained_once(other, path, trainer(other, 9.0, calls), Progress())
    assert calls == [3.0]
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    assert not other.training
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other shapes"])
def test_damaged_weights_are_said_and_trained_again(tmp_path, model, damage):
    path, calls, heard = tmp_path / "weights.safetensors", [], Heard()
    trained_once(model, path, trainer(model, 3.0, calls), Progress())
    whole = path.read_bytes()
    if damage == "other shapes":
        larger = nn.Linear(3, 3)
        path.unlink()
        trained_once(larger, path, lambda: None, Progress())
    else:
        path.write_bytes({"truncated": whole[:-5], "garbage": b"\xff" * 300, "empty": b""}[damage])
    trained_once(model, path, trainer(model, 4.0, calls), heard)
    assert calls == [3.0, 4.0]
    assert len(heard.said) == 1 and str(path) in heard.said[0] and "training again" in heard.said[0]
    again = nn.Linear(2, 2)
    trained_once(again, path, trainer(again, 5.0, calls), heard)
    assert calls == [3.0, 4.0] and again.weight[0, 0].item() == 4.0


def test_a_cache_that_cannot_be_written_is_said_and_loses_nothing(tmp_path, model):
    (tmp_path / "file").write_text("in the way")
    calls, heard = [], Heard()
    trained_once(model, tmp_path / "file" / "weights.safetensors", trainer(model, 3.0, calls), heard)
    assert model.weight[0, 0].item() == 3.0
    assert len(heard.said) == 1 and "cannot be kept" in heard.said[0]


def test_the_key_follows_architecture_and_recipe(tmp_path):
    def key(model, **recipe):
        return cache_path(tmp_path, "digits", model, recipe).name

    assert key(nn.Linear(2, 2), seed=0) == key(nn.Linear(2, 2), seed=0)
    assert len({key(nn.Linear(2, 2), seed=0), key(nn.Linear(2, 2), seed=1), key(nn.Linear(2, 3), seed=0)}) == 3


def test_the_folder_is_the_one_set_or_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("TERSOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tersor"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "tersor"
