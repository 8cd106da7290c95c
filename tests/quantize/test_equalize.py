import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.graph.trace import trace
from tersor.quantize.commuting import commuting, rescale
from tersor.quantize.equalize import Equalize
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int
from tersor.quantize.weight_only import QuantizeWeights
from tersor.zoo.batches import TensorBatches


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with ReLU."""

    def __init__(self, width=16, blocks=2):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(blocks):
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 1), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def task_of(model, shape=(3, 8, 8)):
    torch.manual_seed(2)
    batches = TensorBatches(torch.randn(32, *shape), torch.arange(32) % 5, 16)
    return Task(model, batches, batches, batches).complete()


@pytest.fixture(scope="module")
def even():
    torch.manual_seed(0)
    return Separable().eval()


@pytest.fixture(scope="module")
def separable(even):
    """The same function, its channels' weights some hundred times apart, as in networks whose norms were folded."""
    model, generator = even, torch.Generator().manual_seed(0)
    pairs, _ = commuting(model, trace(model, (torch.randn(2, 3, 8, 8),)))
    for pair in pairs:
        factor = (5 * torch.rand(pair.size, generator=generator) - 2.5).exp()
        model = apply(model, Plan("by hand", rescale(model, pair, factor)))
    return model


def ranges(weight, axis):
    return weight.abs().transpose(0, axis).flatten(1).amax(1)


def test_two_layers_end_with_the_geometric_mean_of_their_ranges_as_the_paper_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    made, read = ranges(model[0].weight.detach(), 0), ranges(model[2].weight.detach(), 1)
    result = Equalize().run(model, task_of(model, (6,)))
    for weight, axis in ((result.model[0].weight, 0), (result.model[2].weight, 1)):
        assert torch.allclose(ranges(weight.detach(), axis), (made * read).sqrt(), rtol=1e-5)
    assert torch.allclose(result.model[0].bias, model[0].bias * (read / made).sqrt(), rtol=1e-5)


def test_every_range_between_two_layers_is_equal_on_both_sides_and_the_function_is_the_same(separable):
    result = Equalize().run(separable, task_of(separable))
    assert result.facts["verified"] < 1e-5
    assert [skip.place for skip in result.plans[0].skips] == ["head:linear[0]"]
    weights = [m.weight.detach() for m in result.model.features if isinstance(m, nn.Conv2d)] + [
        result.model.head.weight
    ]
    for first, second in zip(weights, weights[1:], strict=False):
        grouped = second.shape[1] == 1
        assert torch.allclose(ranges(first, 0), ranges(second, 0 if grouped else 1), rtol=0.02)


def test_weights_with_one_scale_each_lose_less_once_their_channels_are_equal(even, separable):
    task, scheme = task_of(separable), Int(8, "per_tensor")
    x = task.calibration.images
    models = (even, separable, Equalize().run(separable, task).model)
    with torch.no_grad():
        best, uneven, equal = (
            float((QuantizeWeights(scheme).run(model, task).model(x) - model(x)).norm()) for model in models
        )
    assert equal < 0.1 * uneven and equal < 1.5 * best


def test_dead_channels_stay_as_they_are_and_their_biases_do_not_grow():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2] *= 1e-9
    result = Equalize().run(model, task_of(model, (6,)))
    assert torch.equal(result.model[0].bias[1:3], model[0].bias[1:3])
    assert not torch.equal(result.model[0].bias[[0, 3]], model[0].bias[[0, 3]])


def test_masked_weights_keep_their_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    keep = torch.rand(8, 6) > 0.5
    model = apply(model, Plan("by hand", (Mask(TensorPlace("0", "weight"), keep),)))
    other = Equalize().run(model, task_of(model, (6,))).model
    assert bool((other[0].weight[~keep] == 0).all()) and not torch.equal(other[0].weight, model[0].weight)


def test_a_pair_with_a_layer_that_is_left_out_is_a_skip_that_names_it(separable):
    plan = Equalize(where=~ByName("features.2")).plan(separable, task_of(separable))
    said = {skip.place: skip.reason for skip in plan.skips}
    assert said["features.0:conv2d[0]"] == "where leaves out features.2"
    assert "features.2" not in {edit.place.module for edit in plan.edits} and plan.edits


def test_equal_ranges_are_nothing_to_do(separable):
    task = task_of(separable)
    equal = Equalize().run(separable, task).model
    plan = Equalize().plan(equal, task)
    assert not plan.edits and sum("equal already" in skip.reason for skip in plan.skips) == 5


def test_relu6_and_batch_norm_are_named():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU6(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    said = [skip.reason for skip in Equalize().plan(model, task_of(model, (6,))).skips]
    assert "clips at 6" in said[0] and "fold batch norm first" in said[1]


def test_a_quantised_model_is_refused(separable):
    task = task_of(separable)
    with pytest.raises(InputError, match="quantised already"):
        Equalize().plan(Quantize().run(separable, task).model, task)


def test_no_sweep_is_refused():
    with pytest.raises(InputError, match="Equalize.sweeps"):
        Equalize(sweeps=0)


def test_a_functional_relu_between_layers_is_found():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    assert len(Equalize().plan(Net(), task_of(Net(), (6,))).lines) == 1
