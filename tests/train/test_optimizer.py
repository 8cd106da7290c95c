import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.errors import InputError
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.core.plan import Plan
from tersor.train.optimizer import Optimizer, load_state_tensors, set_factor, state_tensors


@pytest.fixture
def model():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    weight = TensorPlace("0", "weight")
    zeros = torch.zeros(4, dtype=torch.int32)
    edits = (
        Mask(weight, torch.rand(4, 1, 3, 3) < 0.5),
        Quantizer((weight,), torch.full((4,), 0.01), zeros, -128, 127, axis=0),
        Quantizer((ActivationPlace("2", "relu"),), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), 0, 255),
    )
    return apply(plain, Plan("by hand", edits))


def names(model, group):
    found = {id(parameter): name for name, parameter in model.named_parameters()}
    return sorted(found[id(parameter)] for parameter in group["params"])


def test_weight_decay_spares_biases_norms_and_quantiser_scales(model):
    decayed, others, scales = Optimizer(lr=0.1, weight_decay=0.01, scale_lr=0.5).groups(model)
    assert names(model, decayed) == ["0.parametrizations.weight.original", "4.weight"]
    assert names(model, others) == ["0.bias", "1.bias", "1.weight", "4.bias"]
    assert names(model, scales) == ["0.parametrizations.weight.1.log_growth", "2.tersor_taps.taps.relu_0.log_growth"]
    assert [group["weight_decay"] for group in (decayed, others, scales)] == [0.01, 0.0, 0.0]
    assert [group["lr"] for group in (decayed, others, scales)] == [0.1, 0.1, 0.05]


def test_frozen_parameters_are_left_out_and_a_wholly_frozen_model_is_an_error(model):
    model[4].requires_grad_(False)
    assert not any(p is model[4].weight for group in Optimizer().groups(model) for p in group["params"])
    with pytest.raises(InputError, match="nothing to train"):
        Optimizer().groups(model.requires_grad_(False))


def test_the_factor_scales_every_group(model):
    optimizer = Optimizer(lr=0.1, scale_lr=0.5).build(model)
    set_factor(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.025]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_optimiser_with_its_tensors_loaded_goes_on_as_the_other_would(name):
    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model, copy = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer, again = Optimizer(name, 0.01).build(model), Optimizer(name, 0.01).build(copy)
    for _ in range(3):
        step(model, optimizer, x)
    copy.load_state_dict(model.state_dict())
    load_state_tensors(again, copy, state_tensors(optimizer, model))
    for _ in range(2):
        step(model, optimizer, x)
        step(copy, again, x)
    assert torch.equal(model.weight, copy.weight) and torch.equal(model.bias, copy.bias)


@pytest.mark.parametrize(
    "fields",
    [{"name": "adam"}, {"lr": 0}, {"lr": float("nan")}, {"momentum": 1.0}, {"weight_decay": -1}, {"scale_lr": -1}],
)
def test_numbers_out_of_range_are_errors_that_name_the_field(fields):
    with pytest.raises(InputError, match=f"Optimizer.{next(iter(fields))}"):
        Optimizer(**fields)
