"""Moments of each channel are the reference's after the correction, masks stay, and what cannot be is a skip."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Cut, Mask, Slice
from tersor.core.errors import InputError
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, save_artifact
from tersor.measure.quality import evaluate
from tersor.prune.layerwise.correct_variance import CorrectVariance
from tersor.prune.sparse.prune import Prune
from tersor.zoo.digits import digits


class Net(nn.Module):
    """Convolutions with a bias, and with a norm instead; a grouped one; a shortcut; tokens."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.plain, self.grouped = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, groups=2)
        self.tokens, self.fc = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.plain(x))
        x = self.grouped(x)
        return self.fc(F.relu(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))


def net():
    torch.manual_seed(0)
    model = Net()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    nn.init.uniform_(model.norm.bias, -1, 1)
    nn.init.uniform_(model.norm.running_mean, -0.2, 0.2)
    nn.init.uniform_(model.norm.running_var, 0.2, 0.6)
    return model.eval()


def task_of(model, shape=(3, 6, 6)):
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(20, *shape, generator=generator), torch.arange(20) % 4) for _ in range(3)]
    return Task(model, batches, batches, batches, calibration=batches).complete()


def moments(model, task, layers):
    """layer → (mean, variance) of each output channel over all calibration samples, positions and calls."""
    seen = {path: [] for path in layers}
    model = copy.deepcopy(model).eval()
    for path in layers:
        layer = model.get_submodule(path)
        axis = 1 if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)) else -1
        layer.register_forward_hook(
            lambda _, args, y, path=path, axis=axis: seen[path].append(y.movedim(axis, -1).flatten(0, -2).double())
        )
    with torch.no_grad():
        for x, _ in task.calibration:
            model(x)
    return {path: (torch.cat(rows).mean(0), torch.cat(rows).var(0, correction=0)) for path, rows in seen.items()}


WITH_MEAN = ["norm", "plain", "grouped", "tokens", "fc"]


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_mean_and_variance_of_every_channel_are_the_reference_s(sparsity):
    model = net()
    task = task_of(model)
    masked = Prune(sparsity).run(model, task).model
    layers = ["stem", *WITH_MEAN]
    wanted, before = moments(model, task, layers), moments(masked, task, layers)
    result = CorrectVariance().run(masked, task)
    got = moments(result.model, task, layers)
    assert [place for place, _ in result.plans[0].lines] == ["stem", "norm", "plain", "grouped", "tokens", "fc"]
    for path in layers:
        varies = before[path][1] > 1e-6
        assert torch.allclose(got[path][1][varies], wanted[path][1][varies], rtol=1e-3), path
        assert (before[path][1] / wanted[path][1] - 1).abs().max() > 0.03
    for path in WITH_MEAN:
        assert torch.allclose(got[path][0], wanted[path][0], atol=2e-4), path
    assert not torch.allclose(got["stem"][0], wanted["stem"][0], atol=2e-4), "it has no bias; the norm takes it over"


def test_a_layer_that_is_called_twice_comes_nearer_over_all_its_calls():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    task = task_of(model, (8,))
    masked = Prune(0.6).run(model, task).model
    one = moments(model, task, ["0"])["0"]
    errors = [
        float((moments(other, task, ["0"])["0"][1] / one[1] - 1).abs().max())
        for other in (masked, CorrectVariance().run(masked, task).model)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_masks_stay_and_what_they_hide_is_rescaled_with_the_rest():
    model = net()
    task = task_of(model)
    masked = Prune(0.5).run(model, task).model
    corrected = CorrectVariance().run(masked, task).model
    for path in ("stem", "plain", "grouped", "tokens", "fc"):
        old, new = masked.get_submodule(path), corrected.get_submodule(path)
        assert torch.equal(old.weight == 0, new.weight == 0)
        assert torch.equal(old.parametrizations.weight[0].keep, new.parametrizations.weight[0].keep)
        ratio = new.parametrizations.weight.original / old.parametrizations.weight.original
        per_channel = ratio.flatten(1)
        assert torch.allclose(per_channel, per_channel[:, :1].expand_as(per_channel), rtol=1e-4)
    assert not any(module._forward_hooks for module in [*masked.modules(), *corrected.modules()])


def test_a_norm_is_corrected_by_its_statistics_so_that_training_starts_from_its_own_scale():
    model = net()
    task = task_of(model)
    corrected = CorrectVariance().run(Prune(0.6).run(model, task).model, task).model
    assert torch.equal(corrected.norm.weight, model.norm.weight) and torch.equal(corrected.norm.bias, model.norm.bias)
    assert not torch.equal(corrected.norm.running_mean, model.norm.running_mean)
    assert (corrected.norm.running_var >= 0).all()


def test_a_channel_without_weights_gets_its_mean():
    model = net()
    task = task_of(model)
    keep = torch.ones(8, 8, 3, 3, dtype=torch.bool)
    keep[3] = False
    masked = apply(model, Plan("row", (Mask(TensorPlace("plain", "weight"), keep),)))
    result = CorrectVariance().run(masked, task)
    (mean, variance), (wanted, _) = (moments(one, task, ["plain"])["plain"] for one in (result.model, model))
    assert variance[3] < 1e-12 and mean[3] == pytest.approx(float(wanted[3]), abs=1e-5)
    assert torch.isfinite(result.model(task.test[0][0])).all()
    assert dict(result.plans[0].lines)["plain"].endswith("; 1 do not vary")


def test_the_reference_itself_is_left_alone():
    model = net()
    task = task_of(model)
    plan = CorrectVariance().plan(model, task)
    assert not plan.edits
    assert {skip.place for skip in plan.skips} == {"stem", *WITH_MEAN}
    assert {skip.reason for skip in plan.skips} == {"its moments are the reference's"}


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.first, self.tied, self.layer_norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.tied.weight = self.first.weight
        self.normed, self.functional = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
        self.cut = nn.Linear(4, 6)

    def forward(self, x):
        x = self.layer_norm(self.tied(self.first(self.norm(self.up(x)).mean((2, 3)))))
        return self.cut(F.linear(self.normed(x), self.functional.weight))


def test_what_cannot_be_corrected_is_a_skip_with_its_reason():
    model = Odd().eval()
    keep = torch.tensor([0, 2, 3])
    cuts = tuple(Cut(TensorPlace("cut", name), 0, keep, "producer") for name in ("weight", "bias"))
    shrunk = apply(model, Plan("cut", (Slice(cuts),)))
    shrunk.more = nn.Linear(2, 2)
    plan = CorrectVariance().plan(shrunk, task_of(model))
    assert {skip.place: skip.reason for skip in plan.skips} == {
        "up": "only convolutions, linear layers and batch norms are corrected, not ConvTranspose2d",
        "layer_norm": "only convolutions, linear layers and batch norms are corrected, not LayerNorm",
        "norm": "it keeps no running statistics", "first": "its weight is tied to tied.weight",
        "tied": "its weight is tied to first.weight", "normed": "its weight is a _WeightNorm of what is stored",
        "functional": "the forward does not call it as a module", "cut": "3 channels, 6 in the reference",
        "more": "the reference has no such layer",
    }  # fmt: skip


def test_settings_and_data_are_checked():
    model = net()
    with pytest.raises(InputError, match="CorrectVariance.batches"):
        CorrectVariance(batches=0)
    with pytest.raises(InputError, match="no reference"):
        CorrectVariance().plan(model, Task(model))
    task = task_of(model)
    broken = apply(Prune(0.5).run(model, task).model, Plan("nothing"))
    with torch.no_grad():
        broken.plain.bias[0] = float("inf")
    with pytest.raises(InputError, match="plain"):
        CorrectVariance(where=ByName("plain")).plan(broken, task)


def test_digits_come_back_without_training_and_are_saved(tmp_path):
    task = digits().complete()
    result = Prune(0.85).run(task.model, task)
    corrected = CorrectVariance().run(result.model, task)
    before, after = (evaluate(one.model, task, "test").values.mean() for one in (result, corrected))
    assert after > before + 0.1
    save_artifact(tmp_path, corrected.model, original=task.model, plans=(*result.plans, *corrected.plans))
    loaded = load_artifact(tmp_path, task.factory())
    assert torch.equal(loaded(task.example_inputs[0]), corrected.model.eval()(task.example_inputs[0]))
