import pytest
from torch import nn

from tersor.core.attached import CHILD, attach, attached, detach
from tersor.core.errors import InputError
from tersor.core.place import ByType, Everything, select
from tersor.train.layers import Reading, resolve


def encoder(layers):
    return nn.ModuleDict(
        {
            "stem": nn.Linear(2, 2),
            "layer": nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(layers)),
        }
    )


def names(pairs, student, teacher, spread="uniform"):
    return [(s.path, t.path) for s, t in resolve(Reading(tuple(pairs.items()), spread=spread), student, teacher)]


@pytest.mark.parametrize(
    ("n", "m", "spread", "expected"),
    [
        (4, 12, "uniform", [2, 5, 8, 11]),
        (4, 6, "uniform", [0, 2, 3, 5]),
        (3, 3, "uniform", [0, 1, 2]),
        (1, 5, "uniform", [4]),
        (4, 12, "top", [8, 9, 10, 11]),
        (4, 12, "bottom", [0, 1, 2, 3]),
    ],
)
def test_fewer_layers_of_the_student_are_spread_over_the_teacher_s(n, m, spread, expected):
    found = names({"layer.*": "layer.*"}, encoder(n), encoder(m), spread)
    assert found == [(f"layer.{i}", f"layer.{place}") for i, place in enumerate(expected)]


def test_a_pattern_means_the_outermost_of_nested_modules_and_a_name_exactly_itself():
    model = encoder(2)
    assert names({"layer.*": "layer.*"}, model, model) == [("layer.0", "layer.0"), ("layer.1", "layer.1")]
    assert names({"layer.*.0": "layer.*.1"}, model, model) == [("layer.0.0", "layer.0.1"), ("layer.1.0", "layer.1.1")]
    assert names({"layer": "stem", "": ""}, model, model) == [("layer", "stem"), ("", "")]


def test_a_pair_that_two_patterns_mean_counts_once():
    model = encoder(2)
    assert names({"layer.*": "layer.*", "layer.1": "layer.1"}, model, model) == [(f"layer.{i}",) * 2 for i in range(2)]


def test_more_layers_of_the_student_than_of_the_teacher_are_an_error():
    with pytest.raises(InputError, match=r"more layers here.*Got 3 of the student.*2 of the teacher"):
        names({"layer.*": "layer.*"}, encoder(3), encoder(2))


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ({"stme": "stem"}, "layer 'stme': no layer of the student has this name. Nearest names: stem"),
        (
            {"stem": "layer.7"},
            "layer 'layer.7': no layer of the teacher has this name. Nearest names: layer.1, layer.0",
        ),
        ({"block.*": "stem"}, "no layer of the student"),
    ],
)
def test_a_name_that_matches_nothing_is_answered_with_the_nearest(pairs, says):
    with pytest.raises(InputError, match=says):
        names(pairs, encoder(2), encoder(2))


def test_what_only_training_needs_is_meant_by_no_selector_and_no_pattern():
    model = nn.Sequential(nn.Linear(2, 2))
    attach(model, "maps", nn.Linear(3, 3))
    assert list(select(model, ByType("Linear"))) == ["0"] and list(select(model, Everything())) == ["", "0"]
    with pytest.raises(InputError, match="no layer"):
        names({f"{CHILD}.parts.maps": "0"}, model, model)
    assert attached(model, "maps").in_features == 3 and len(list(model.parameters())) == 4
    detach(model, "maps")
    assert CHILD not in model._modules
    with pytest.raises(InputError, match="is not there"):
        attached(model, "maps")
