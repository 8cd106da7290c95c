import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import (
    ActivationPlace,
    Both,
    ByName,
    ByType,
    Either,
    Everything,
    Not,
    TensorPlace,
    aliases,
    module_at,
    select,
    tensor_at,
)
from tersor.core.plan import Plan


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tied()


def test_places_print_as_people_write_them():
    assert str(TensorPlace("layers.0.conv", "weight")) == "layers.0.conv.weight"
    assert str(TensorPlace("", "weight")) == "weight"
    assert str(ActivationPlace("layers.0", "add", 1)) == "layers.0:add[1]"
    assert str(ActivationPlace("", "input")) == "<model>:input[0]"


def test_parameters_and_buffers_are_found_and_the_model_itself_is_the_empty_path(model):
    assert tensor_at(model, TensorPlace("head", "weight")) is model.embed.weight
    assert tensor_at(model, TensorPlace("norm", "running_mean")) is model.norm.running_mean
    assert module_at(model, "") is model


def test_an_unknown_module_is_answered_with_the_nearest_names(model):
    with pytest.raises(InputError, match="haed: no such module. Nearest names: head"):
        module_at(model, "haed")


@pytest.mark.parametrize("name", ["bias", "wieght", "in_features"])
def test_what_is_no_tensor_is_an_error(model, name):
    with pytest.raises(InputError, match=rf"head.{name}: no such tensor. Got \w+; expected a parameter or buffer"):
        tensor_at(model, TensorPlace("head", name))


def test_a_tensor_that_is_a_plain_attribute_is_an_error(model):
    model.head.extra = torch.zeros(3)
    with pytest.raises(InputError, match="Got a plain attribute"):
        tensor_at(model, TensorPlace("head", "extra"))


def test_tied_weights_name_all_their_places_from_each_of_them(model):
    both = {TensorPlace("embed", "weight"), TensorPlace("head", "weight")}
    for place in both:
        assert set(aliases(model, place)) == both
    assert aliases(model, TensorPlace("norm", "weight")) == (TensorPlace("norm", "weight"),)


def test_a_module_under_two_names_has_two_places():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert set(aliases(model, TensorPlace("a", "bias"))) == {TensorPlace("a", "bias"), TensorPlace("b", "bias")}


def test_tied_weights_are_still_known_as_tied_when_masked(model):
    masked = apply(model, Plan("mask", (Mask(TensorPlace("head", "weight"), torch.ones(5, 3, dtype=torch.bool)),)))
    found = aliases(masked, TensorPlace("embed", "weight"))
    assert set(found) == {TensorPlace("embed", "weight"), TensorPlace("head", "weight")}


def network():
    return nn.ModuleDict(
        {"body": nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 2)), "head": nn.Linear(2, 2)}
    )


@pytest.mark.parametrize(
    "where, paths",
    [
        (ByName("body.*"), ["body.0", "body.1", "body.2"]),
        (ByName("head"), ["head"]),
        (ByType("Linear"), ["body.2", "head"]),
        (ByType("_ConvNd"), ["body.0"]),  # a base class
        (ByType("Linear") & ByName("body.*"), ["body.2"]),
        (ByType("Conv2d") | ByName("head"), ["body.0", "head"]),
        (ByType("Linear") & ~ByName("head"), ["body.2"]),
        (Everything(), ["", "body", "body.0", "body.1", "body.2", "head"]),
    ],
    ids=repr,
)
def test_selectors_compose(where, paths):
    assert list(select(network(), where)) == paths


def test_selectors_are_data():
    where = ByType("Linear") & ~ByName("head") | Everything()
    assert where == ByType("Linear") & ~ByName("head") | Everything()
    again = eval(repr(where), {c.__name__: c for c in (Everything, ByName, ByType, Both, Either, Not)})  # noqa: S307
    assert again == where
    assert hash(where) == hash(ByType("Linear") & ~ByName("head") | Everything())


def test_a_selector_that_matches_nothing_is_an_error_with_the_nearest_names():
    with pytest.raises(InputError, match="matches no module. Nearest names: head"):
        select(network(), ByName("heed"))
    with pytest.raises(InputError, match="matches no module"):
        select(network(), ByType("LSTM") & Everything())


@pytest.mark.parametrize(
    "where", [~ByName("haed.*"), ByName("head") | ByName("haed.*"), Everything() & ~ByName("haed.*")]
)
def test_a_name_within_a_selector_that_no_module_has_is_a_warning_with_the_nearest_names(where):
    with pytest.warns(UserWarning, match=r"no module is called 'haed\.\*'. Nearest names: head"):
        assert "head" in select(network(), where)
