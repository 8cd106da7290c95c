import importlib

import pytest
import torch

import tersor.zoo
from tersor.core.errors import InputError
from tersor.zoo.residual import ResidualNet
from tersor.zoo.train import Training

home = importlib.import_module("tersor.zoo.digits")


@pytest.fixture
def quick(monkeypatch):
    """A smaller network and two epochs: the path is the same."""
    monkeypatch.setattr(home, "TRAINING", Training(epochs=3, peak_lr=0.1))
    monkeypatch.setattr(home, "network", lambda: ResidualNet((8, 16), 1, in_channels=1, classes=10))


def accuracy(task, split):
    with torch.no_grad():
        parts = [task.metric.per_sample(task.outputs(task.model, b), task.targets(b)) for b in getattr(task, split)]
    return float(torch.cat(parts).mean())


def test_the_task_is_whole_and_the_model_learnt_something(quick, tmp_path):
    task = tersor.zoo.load("digits", cache=tmp_path).complete()
    assert (task.name, task.source, task.derived) == ("digits", "digits", ())
    assert not task.model.training and task.metric.name == "accuracy"
    assert task.example_inputs[0].shape == (2, 1, 8, 8)
    assert accuracy(task, "test") > 0.5
    assert {key: value.shape for key, value in task.factory().state_dict().items()} == {
        key: value.shape for key, value in task.model.state_dict().items()
    }


def test_the_weights_come_from_the_cache_and_the_random_state_is_left_alone(quick, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = home.digits(cache=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    torch.manual_seed(6)
    second = home.digits(cache=tmp_path)
    assert kept.stat().st_mtime_ns == written
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_training_is_decided_by_the_seed(quick, tmp_path):
    weights = [
        home.digits(seed=seed, cache=tmp_path / name).model.fc.weight for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_folds_are_stratified_disjoint_and_cover_everything():
    _, targets = home._load()
    tests = []
    for fold in range(5):
        train, validation, test = home._split(targets, fold)
        assert sorted(torch.cat([train, validation, test]).tolist()) == list(range(1797))
        for part, share in ((train, 0.6), (validation, 0.2), (test, 0.2)):
            assert abs(len(part) / 1797 - share) < 0.002
            assert float((torch.bincount(targets[part]) / torch.bincount(targets) - share).abs().max()) < 0.01
        tests += test.tolist()
    assert sorted(tests) == list(range(1797))


def test_only_training_batches_are_augmented(quick, tmp_path):
    task = home.digits(cache=tmp_path)
    assert task.train.augment is not None and task.train.shuffle
    for split in (task.validation, task.test, task.calibration):
        assert split.augment is None and not split.shuffle


def test_an_unknown_fold_or_task_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such fold. Got 5"):
        home.digits(fold=5, cache=tmp_path)
    with pytest.raises(InputError, match="Did you mean digits"):
        tersor.zoo.load("digit")


@pytest.mark.slow
def test_the_real_network_reads_more_than_98_percent_of_the_held_out_digits(tmp_path):
    task = home.digits(cache=tmp_path)
    assert accuracy(task, "test") >= 0.98
