import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.core.apply import apply, write
from tersor.core.edit import Attribute, Cut, Mask, Quantizer, Slice, Swap, Write
from tersor.core.errors import InputError
from tersor.core.fake_quantize import FakeQuantize
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.core.plan import Plan

WEIGHT = TensorPlace("0", "weight")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def plan(*edits):
    return Plan("by hand", edits)


def keep(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def random_mask(seed):
    return torch.rand(4, 3, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_a_copy_is_edited_and_the_model_given_is_untouched(model):
    before = copy.deepcopy(model.state_dict())
    edited = apply(model, plan(Mask(WEIGHT, random_mask(0)), Swap("1", "Identity"), Attribute("0", "out_features", 7)))
    assert edited is not model and isinstance(model[1], nn.ReLU) and model[0].out_features == 4
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_in_place_edits_the_model_given(model):
    assert apply(model, plan(Swap("1", "Identity")), in_place=True) is model
    assert isinstance(model[1], nn.Identity)


def test_an_error_half_way_leaves_the_model_given_untouched(model):
    with pytest.raises(InputError):
        apply(model, plan(Mask(WEIGHT, random_mask(0)), Mask(TensorPlace("9", "weight"), random_mask(0))))
    assert not parametrize.is_parametrized(model[0])


class TestMask:
    def test_masked_positions_are_zero_and_stay_zero_in_training(self, model):
        mask = random_mask(1)
        masked = apply(model, plan(Mask(WEIGHT, mask)))
        optimizer = torch.optim.SGD(masked.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            masked(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
        assert torch.equal(masked[0].weight == 0, ~mask)
        assert not torch.equal(masked[0].weight[mask], model[0].weight[mask])

    @pytest.mark.parametrize("merge", [True, False])
    def test_a_second_mask_merges_or_replaces(self, model, merge):
        first, second = random_mask(1), random_mask(2)
        masked = apply(model, plan(Mask(WEIGHT, first), Mask(WEIGHT, second, merge=merge)))
        assert torch.equal(masked[0].weight != 0, first & second if merge else second)
        assert len(masked[0].parametrizations["weight"]) == 1

    def test_a_replaced_mask_lets_the_old_values_come_back(self, model):
        masked = apply(model, plan(Mask(WEIGHT, random_mask(1)), Mask(WEIGHT, torch.ones(4, 3).bool(), merge=False)))
        assert torch.equal(masked[0].weight, model[0].weight)

    def test_the_mask_of_the_plan_is_not_shared_with_the_model(self, model):
        mask = random_mask(1)
        before = mask.clone()
        apply(model, plan(Mask(WEIGHT, mask), Mask(WEIGHT, ~mask)))
        assert torch.equal(mask, before)

    def test_tied_weights_are_masked_at_every_place_also_the_second_time(self):
        masked = apply(Tied(), plan(Mask(TensorPlace("a", "weight"), keep((1, 1, 0), (1, 1, 1), (1, 1, 1)))))
        masked = apply(masked, plan(Mask(TensorPlace("b", "weight"), keep((0, 1, 1), (1, 1, 1), (1, 1, 1)))))
        expected = keep((0, 1, 0), (1, 1, 1), (1, 1, 1))
        assert torch.equal(masked.a.weight != 0, expected) and torch.equal(masked.b.weight != 0, expected)
        assert masked.a.parametrizations.weight.original is masked.b.parametrizations.weight.original

    def test_another_shape_is_an_error(self, model):
        with pytest.raises(InputError, match=r"0.weight: .*another shape.* Got \[3, 4\]; expected \[4, 3\]"):
            apply(model, plan(Mask(WEIGHT, random_mask(0).T)))

    def test_a_copy_of_a_masked_model_has_a_mask_of_its_own(self, model):
        masked = apply(model, plan(Mask(WEIGHT, random_mask(1))))
        other = apply(masked, plan(Mask(WEIGHT, torch.zeros(4, 3).bool())))
        assert not other[0].weight.any() and masked[0].weight.any()


class TestWrite:
    def test_values_are_replaced(self, model):
        value = torch.randn(4, 3)
        assert torch.equal(apply(model, plan(Write(WEIGHT, value)))[0].weight, value)

    def test_a_buffer_can_be_written(self):
        norm = apply(nn.BatchNorm1d(2), plan(Write(TensorPlace("", "running_mean"), torch.tensor([1.0, 2.0]))))
        assert norm.running_mean.tolist() == [1.0, 2.0]

    def test_a_missing_bias_is_made_and_trained(self, model):
        written = apply(model, plan(Write(TensorPlace("2", "bias"), torch.tensor([5.0, 6.0]))))
        x = torch.randn(7, 3)
        assert torch.allclose(written(x), model(x) + torch.tensor([5.0, 6.0]))
        assert "2.bias" in dict(written.named_parameters()) and model[2].bias is None

    def test_the_stored_weight_of_a_masked_tensor_is_written(self, model):
        written = apply(model, plan(Mask(WEIGHT, random_mask(1)), Write(WEIGHT, torch.ones(4, 3))))
        assert torch.equal(written[0].weight, random_mask(1).float())

    def test_tied_weights_stay_tied(self):
        written = apply(Tied(), plan(Write(TensorPlace("b", "weight"), torch.eye(3))))
        assert written.a.weight is written.b.weight and torch.equal(written.a.weight, torch.eye(3))

    @pytest.mark.parametrize(
        "place, says", [(TensorPlace("0", "gain"), "no such parameter"), (TensorPlace("0", "bias"), "another shape")]
    )
    def test_what_does_not_fit_is_an_error(self, model, place, says):
        with pytest.raises(InputError, match=says):
            apply(model, plan(Write(place, torch.zeros(9))))


class TestQuantizer:
    def test_a_weight_has_at_most_the_integers_times_the_scale(self, model):
        scale = model[0].weight.detach().abs().amax(1) / 7
        edit = Quantizer((WEIGHT,), scale, torch.zeros(4, dtype=torch.int32), -8, 7, axis=0)
        weight = apply(model, plan(edit))[0].weight
        integers = weight / scale[:, None]
        assert torch.allclose(integers, integers.round(), atol=1e-5) and integers.abs().max() <= 8
        assert torch.allclose(weight, model[0].weight, atol=float(scale.max()) / 2)

    def test_zeros_survive_quantisation_on_top_of_a_mask(self, model):
        mask = random_mask(1)
        edit = Quantizer((WEIGHT,), torch.tensor(0.1), torch.tensor(0), -128, 127)
        weight = apply(model, plan(Mask(WEIGHT, mask), edit))[0].weight
        assert not weight[~mask].any() and weight[mask].any()

    def test_an_activation_is_quantised_and_the_step_is_trained(self, model):
        edit = Quantizer((ActivationPlace("1", "relu"),), torch.tensor(0.5), torch.tensor(0), 0, 3)
        quantised = apply(model, plan(edit))
        seen = []
        quantised[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        quantised(torch.randn(20, 3)).sum().backward()
        assert set(seen[0].unique().tolist()) <= {0.0, 0.5, 1.0, 1.5}
        (quantizer,) = [module for module in quantised.modules() if isinstance(module, FakeQuantize)]
        assert quantizer.log_growth.grad is not None

    def test_places_of_one_edit_share_one_scale(self, model):
        places = (ActivationPlace("0", "linear"), ActivationPlace("2", "linear"))
        quantised = apply(model, plan(Quantizer(places, torch.tensor(0.5), torch.tensor(0), -128, 127)))
        found = [module for module in quantised.modules() if isinstance(module, FakeQuantize)]
        assert len(found) == 1
        copied = [module for module in copy.deepcopy(quantised).modules() if isinstance(module, FakeQuantize)]
        assert len(copied) == 1 and copied[0] is not found[0]

    def test_one_scale_per_channel_is_demanded(self, model):
        with pytest.raises(InputError, match=r"0.weight: one scale per channel is needed. Got \[3\]; expected \[4\]"):
            apply(model, plan(Quantizer((WEIGHT,), torch.ones(3), torch.zeros(3), -8, 7, axis=0)))

    def test_a_group_of_inputs_has_its_own_scale(self):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(6, 4))
        runs = layer[0].weight.detach().reshape(4, 2, 3)
        scale = runs.abs().amax(2) / 7
        edit = Quantizer((WEIGHT,), scale, torch.zeros(4, 2, dtype=torch.int32), -8, 7, axis=0, group_size=3)
        got = apply(layer, plan(edit))[0].weight.detach().reshape(4, 2, 3)
        assert torch.equal(got, torch.round(runs / scale[..., None]) * scale[..., None])

    def test_groups_that_do_not_fit_are_errors(self, model):
        numbers = torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int32)
        with pytest.raises(
            InputError, match=r"0.weight: the groups do not divide.*group_size 2; expected a divisor of 3"
        ):
            apply(model, plan(Quantizer((WEIGHT,), *numbers, -8, 7, axis=0, group_size=2)))
        with pytest.raises(InputError, match=r"per row and group is needed. Got \[4, 1\]; expected \[4, 3\]"):
            apply(model, plan(Quantizer((WEIGHT,), *numbers, -8, 7, axis=0, group_size=1)))
        with pytest.raises(InputError, match="an activation has no groups"):
            apply(model, plan(Quantizer((ActivationPlace("1", "relu"),), *numbers, 0, 7, axis=0, group_size=2)))

    def test_an_activation_of_an_unknown_module_is_an_error(self, model):
        with pytest.raises(InputError, match="no such module"):
            apply(model, plan(Quantizer((ActivationPlace("7", "relu"),), torch.ones(()), torch.zeros(()), 0, 7)))


class TestSlice:
    def test_every_coupled_tensor_is_cut(self, model):
        kept = torch.tensor([0, 2])
        cuts = (
            Cut(WEIGHT, 0, kept, "producer"), Cut(TensorPlace("0", "bias"), 0, kept, "producer"),
            Cut(TensorPlace("2", "weight"), 1, kept, "consumer"),
        )  # fmt: skip
        shrunk = apply(model, plan(Slice(cuts)))
        assert torch.equal(shrunk[0].weight, model[0].weight[kept])
        assert torch.equal(shrunk[2].weight, model[2].weight[:, kept])
        x = torch.randn(6, 3)
        assert torch.allclose(shrunk(x), model[2](model[1](model[0](x)) * torch.tensor([1.0, 0, 1, 0])), atol=1e-6)

    def test_two_dimensions_of_one_tensor_are_cut_at_once(self, model):
        cuts = (Cut(WEIGHT, 0, torch.tensor([1, 3]), "producer"), Cut(WEIGHT, 1, torch.tensor([0]), "consumer"))
        shrunk = apply(model, plan(Slice(cuts)))
        assert torch.equal(shrunk[0].weight, model[0].weight[[1, 3]][:, [0]])

    def test_tied_weights_are_cut_once_and_stay_tied(self):
        model, kept = Tied(), torch.tensor([0, 2])
        cuts = (
            Cut(TensorPlace("a", "weight"), 0, kept, "producer"),
            Cut(TensorPlace("b", "weight"), 0, kept, "producer"),
        )
        shrunk = apply(model, plan(Slice(cuts)))
        assert shrunk.a.weight is shrunk.b.weight and shrunk.a.weight.shape == (2, 3)

    def test_tied_weights_follow_when_only_one_place_is_named(self):
        shrunk = apply(Tied(), plan(Slice((Cut(TensorPlace("a", "weight"), 1, torch.tensor([1]), "consumer"),))))
        assert shrunk.a.weight is shrunk.b.weight and shrunk.b.weight.shape == (3, 1)

    def test_tied_weights_that_are_to_be_cut_in_two_ways_are_an_error(self):
        cuts = [
            Cut(TensorPlace(name, "weight"), 0, torch.tensor([row]), "producer") for name, row in (("a", 0), ("b", 1))
        ]
        with pytest.raises(InputError, match="two different ways"):
            apply(Tied(), plan(Slice(tuple(cuts))))

    def test_buffers_stay_buffers_and_frozen_parameters_frozen(self):
        norm = nn.BatchNorm1d(3)
        norm.weight.requires_grad_(False)
        kept = torch.tensor([2])
        cuts = tuple(Cut(TensorPlace("", name), 0, kept, "bystander") for name in ("weight", "bias", "running_var"))
        shrunk = apply(norm, plan(Slice(cuts)))
        assert not shrunk.weight.requires_grad and shrunk.bias.requires_grad
        assert "running_var" in dict(shrunk.named_buffers()) and shrunk.running_var.shape == (1,)

    def test_channels_last_weights_keep_their_layout(self):
        conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        shrunk = apply(conv, plan(Slice((Cut(TensorPlace("", "weight"), 0, torch.arange(5), "producer"),))))
        assert shrunk.weight.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize(
        "edit",
        [Mask(WEIGHT, torch.ones(4, 3).bool()), Quantizer((WEIGHT,), torch.tensor(1.0), torch.tensor(0), -8, 7)],
        ids=["masked", "quantised"],
    )
    def test_a_parametrized_tensor_cannot_be_sliced(self, model, edit):
        with pytest.raises(InputError, match="masked or quantised tensor cannot be sliced. Prune channels first"):
            apply(model, plan(edit, Slice((Cut(WEIGHT, 0, torch.tensor([0]), "producer"),))))

    @pytest.mark.parametrize(
        "dim, indices", [(0, []), (0, [4]), (0, [-1, 2]), (2, [0]), (-1, [0]), (0, [1, 1]), (0, [2, 1])]
    )
    def test_indices_that_do_not_fit_are_an_error(self, model, dim, indices):
        with pytest.raises(InputError, match=f"dimension {dim} cannot keep these indices"):
            apply(model, plan(Slice((Cut(WEIGHT, dim, torch.tensor(indices, dtype=torch.int64), "producer"),))))


class TestSwapAndAttribute:
    def test_a_swapped_module_keeps_paths_and_mode(self, model):
        swapped = apply(model.eval(), plan(Swap("1", "Identity")))
        assert isinstance(swapped[1], nn.Identity) and not swapped[1].training
        assert swapped.state_dict().keys() == model.state_dict().keys()

    @pytest.mark.parametrize("training", [False, True])
    def test_children_that_stay_keep_their_modes_and_what_holds_them_its_own(self, training):
        norm = nn.BatchNorm1d(3).train(training)
        norm.drop, norm.act = nn.Dropout().train(not training), nn.ReLU().train(training)
        kept = apply(nn.Sequential(norm), plan(Swap("0", "Children", {"names": ["drop"]})))[0]
        assert list(dict(kept.named_children())) == ["drop"]
        assert kept.training == training and kept.drop.training != training

    @pytest.mark.parametrize(
        "edit, says",
        [
            (Swap("1", "os.system"), "unknown constructor. Got os.system; expected"),
            (Swap("", "Identity"), "the whole model cannot be swapped"),
            (Swap("4", "Identity"), "no such module"),
            (Swap("1", "Children", {"names": ["act"]}), r"no such child. Got \['act'\]"),
            (Attribute("0", "weight", None), "not a plain attribute"),
            (Attribute("0", "_forward_hooks", {}), "not a plain attribute"),
            (Attribute("", "0", None), "not a plain attribute"),
        ],
    )
    def test_what_must_not_be_swapped_or_set_is_refused(self, model, edit, says):
        with pytest.raises(InputError, match=says):
            write(model, edit)

    def test_an_attribute_is_set(self, model):
        assert apply(model, plan(Attribute("0", "out_features", 3)))[0].out_features == 3
