"""Layers that shrink behind an adapter: the net computes what it computes with those rows of the weight at zero."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Swap
from tersor.core.errors import InputError, TrainingError
from tersor.core.place import ByName
from tersor.core.plan import Plan
from tersor.core.scattered import Scattered
from tersor.core.task import Task
from tersor.core.verify import verify_edits
from tersor.export.artifact import load_artifact, save_artifact
from tersor.export.onnx import export_onnx
from tersor.measure.compute import macs
from tersor.prune.blocks.adapter import PruneBehindAdapter


class Frozen(nn.Module):
    """A layer and a norm whose channels ``odd`` freezes, and a head that reads them."""

    def __init__(self, layer, norm, head, odd=lambda x: x.sort(dim=1).values):
        super().__init__()
        self.layer, self.norm, self.head, self.odd = layer, norm, head, odd

    def forward(self, x):
        x = self.odd(F.relu(self.norm(self.layer(x))))
        return self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)


def image_net(odd=lambda x: x.sort(dim=1).values, **options):
    layer = nn.Conv2d(3, 8, 3, **{"padding": 1, "bias": False, **options})
    return Frozen(layer, nn.BatchNorm2d(8), nn.Linear(8, 4), odd)


NETS = {
    "conv2d without bias": (image_net, (3, 6, 6)),
    "conv2d with options": (lambda: image_net(stride=2, padding=2, dilation=2, bias=True), (3, 9, 9)),
    "conv2d, same": (lambda: image_net(padding="same"), (3, 6, 6)),
    "conv1d": (lambda: Frozen(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 4)), (3, 9)),
    "conv3d": (lambda: Frozen(nn.Conv3d(2, 8, 2), nn.BatchNorm3d(8), nn.Linear(8, 4)), (2, 4, 4, 4)),
    "linear": (lambda: Frozen(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 4)), (6,)),
    "linear over positions": (
        lambda: Frozen(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 4), lambda x: x.transpose(1, 2).sort(1).values),
        (5, 6),
    ),
}


def prepared(net):
    torch.manual_seed(0)
    for value in [*net.parameters(), *net.buffers()]:
        if value.is_floating_point():
            nn.init.normal_(value.data, 0, 0.3) if value.ndim > 1 else nn.init.uniform_(value.data, 0.5, 1.5)
    return net.double().eval()


def task_of(net, shape, **more):
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(n, *shape, generator=generator, dtype=torch.float64), torch.arange(n) % 4) for n in (5, 3)]
    return Task(net, batches, batches, batches, batches, example_inputs=(batches[0][0],), **more)


@pytest.fixture(params=NETS)
def case(request):
    make, shape = NETS[request.param]
    net = prepared(make())
    return net, task_of(net, shape)


def masked(net, shrunk, path="layer"):
    """The net with zeros for the rows that are gone and the shrunk layer's bias, looked up one by one."""
    net = copy.deepcopy(net)
    layer, small = net.get_submodule(path), shrunk.get_submodule(path)
    layer.bias = nn.Parameter(small.bias.detach().clone())
    for channel, row in enumerate(small.table.tolist()):
        if row == small.kept:
            layer.weight.data[channel] = 0
        else:
            assert torch.equal(layer.weight[channel], small.weight[row])
    return net


@pytest.mark.parametrize("fill", ["mean", "bias"])
def test_the_net_computes_what_it_computes_with_the_removed_rows_at_zero(case, fill):
    net, task = case
    shrunk = PruneBehindAdapter(0.5, fill=fill).run(net, task)
    reference = masked(net, shrunk.model)
    assert isinstance(shrunk.model.layer, Scattered) and shrunk.model.layer.weight.shape[0] == 4
    for x, _ in task.calibration:
        got, expected = shrunk.model(x), reference(x)
        assert (got - expected).abs().max() < 1e-9 * expected.abs().max()
        assert (got - net(x)).abs().max() > 1e-4 * expected.abs().max()
    assert shrunk.facts["verified"] < 1e-9


def test_half_of_the_layers_work_is_gone(case):
    net, task = case
    shrunk = PruneBehindAdapter(0.5).run(net, task).model
    head = 4 * 8
    before, after = (macs(model, task.example_inputs).value - head for model in (net, shrunk))
    assert after == before / 2


def test_it_saves_loads_and_trains_and_no_path_shifts(case, tmp_path):
    net, task = case
    method = PruneBehindAdapter(0.5)
    plan = method.plan(net, task)
    shrunk = apply(net, plan)
    names = set(net.state_dict()) | {"layer.bias", "layer.table"}
    assert set(shrunk.state_dict()) == names
    save_artifact(tmp_path / "saved", shrunk, original=net, plans=[plan])
    fresh = copy.deepcopy(net)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    loaded = load_artifact(tmp_path / "saved", fresh)
    (x, _), *_ = task.calibration
    assert torch.equal(loaded(x), shrunk.eval()(x))
    shrunk.train()(x).square().mean().backward()
    assert shrunk.layer.weight.grad is not None and shrunk.layer.bias.grad.abs().min() >= 0


def test_the_mean_is_each_channels_over_all_calibration_values_and_the_steadiest_go():
    net = prepared(image_net(bias=True))
    net.norm = nn.Identity()
    task = task_of(net, (3, 6, 6))
    shrunk = PruneBehindAdapter(0.25).run(net, task).model
    with torch.no_grad():
        values = torch.cat([net.layer(x).transpose(0, 1).flatten(1) for x, _ in task.calibration], 1)
    gone = [channel for channel, row in enumerate(shrunk.layer.table.tolist()) if row == 6]
    assert sorted(gone) == sorted(values.var(1, correction=0).argsort()[:2].tolist())
    for channel in range(8):
        expected = values[channel].mean() if channel in gone else net.layer.bias[channel]
        assert shrunk.layer.bias[channel].item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_batch_norm_behind_the_layer_says_how_much_a_channels_variance_matters():
    net = prepared(image_net())
    task = task_of(net, (3, 6, 6))
    net.norm.weight.data[:] = 1
    net.norm.weight.data[[1, 6]] = 1e-6
    shrunk = PruneBehindAdapter(0.25).run(net, task).model
    assert [channel for channel, row in enumerate(shrunk.layer.table.tolist()) if row == 6] == [1, 6]


def test_a_line_says_how_much_of_the_variance_is_lost():
    net = prepared(image_net())
    net.norm = nn.Identity()
    task = task_of(net, (3, 6, 6))
    plan = PruneBehindAdapter(0.5).plan(net, task)
    with torch.no_grad():
        variance = torch.cat([net.layer(x).transpose(0, 1).flatten(1) for x, _ in task.calibration], 1).var(
            1, correction=0
        )
    lost = variance.sort().values[:4].sum() / variance.sum()
    ((place, text),) = plan.lines
    assert [skip.place for skip in plan.skips] == ["head"]
    assert place == "layer" and text.startswith(f"8 -> 4 computed channels, {lost:.2%} of their variance lost; frozen:")
    assert "sort" in text


def test_a_wrong_table_does_not_pass_verification():
    net = prepared(image_net())
    task = task_of(net, (3, 6, 6))
    plan = PruneBehindAdapter(0.5).plan(net, task)
    shrunk = apply(net, plan)
    shrunk.layer.table = shrunk.layer.table.flip(0)
    with pytest.raises(Exception, match="differs"):
        verify_edits(net, shrunk, plan, task)


def test_an_exported_net_computes_the_same(tmp_path):
    import onnxruntime

    for name in ("conv2d without bias", "linear over positions"):
        make, shape = NETS[name]
        net = prepared(make())
        shrunk = PruneBehindAdapter(0.5).run(net, task_of(net, shape)).model.float()
        x = torch.randn(3, *shape)
        export_onnx(shrunk, (x,), tmp_path / "net.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
        (got,) = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
        assert torch.allclose(torch.from_numpy(got), shrunk(x[:2]), rtol=1e-4, atol=1e-5)


# What stays, and bad input -------------------------------------------------------------------------------------------


def skips(net, shape=(3, 6, 6), **settings):
    plan = PruneBehindAdapter(**settings).plan(net, task_of(net, shape))
    return {skip.place: skip.reason for skip in plan.skips}, [edit.module for edit in plan.edits if type(edit) is Swap]


def test_open_groups_are_left_to_the_method_that_really_removes_them():
    net = prepared(image_net(odd=lambda x: x))
    said, swapped = skips(net)
    assert not swapped and "layer" not in said


def test_what_the_model_returns_shrinks_only_on_request():
    net = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    assert skips(net)[1] == ["0"]  # a ReLU makes other values of it: the model does not return the layer's own
    net = prepared(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3)))
    said, swapped = skips(net)
    assert not swapped and "outputs=True" in said["1"]
    assert skips(net, outputs=True)[1] == ["1"]


def test_what_saves_little_is_skipped_with_the_arithmetic():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.big, self.small = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.small(self.big(x).sort(1).values).sort(1).values

    said, swapped = skips(prepared(Two()), (6,), worth=0.2)  # 48 and 16 of 64: halves are 37.5 % and 12.5 %
    assert swapped == ["big"] and said["small"].startswith("would save 12.50%")


def test_one_channel_always_stays_computed():
    net = prepared(image_net())
    plan = PruneBehindAdapter(0.99).plan(net, task_of(net, (3, 6, 6)))
    assert apply(net, plan).layer.kept == 1


def test_layers_without_an_adapter_are_named():
    net = prepared(Frozen(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)))
    assert "sort" in skips(net)[0]["layer"] and "a ConvTranspose2d has no adapter" in skips(net)[0]["layer"]
    grouped = Frozen(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Linear(8, 4))
    assert "groups=2" in skips(prepared(grouped), (4, 6, 6))[0]["layer"]
    padded = image_net(padding_mode="reflect")
    assert "padding_mode='reflect'" in skips(prepared(padded))[0]["layer"]


def test_tied_and_shared_layers_and_weights_that_others_read_stay():
    net = prepared(image_net())
    net.again = net.layer
    said, swapped = skips(net)
    assert not swapped and "the same module" in said["layer"]
    net = prepared(image_net())
    net.other = nn.Conv2d(3, 8, 3, bias=False).double()
    net.other.weight = net.layer.weight
    said, swapped = skips(net)
    assert not swapped and "tied with other.weight" in said["layer"]
    net = prepared(image_net())
    net.odd = lambda x: x.sort(dim=1).values * net.layer.weight.sum()
    assert "are read at <model>:sum[0] too" in skips(net)[0]["layer"]


def test_where_and_bad_settings():
    net = prepared(image_net())
    said, swapped = skips(net, where=ByName("norm"))
    assert not swapped and "no frozen layer" in said["the model"]
    assert "is none" in skips(net, sparsity=0.1)[0]["layer"]
    for bad in ({"sparsity": 1.0}, {"worth": -0.1}, {"batches": 0}, {"fill": "zero"}):
        with pytest.raises(InputError, match=f"PruneBehindAdapter.{next(iter(bad))}"):
            PruneBehindAdapter(**bad)
    with pytest.raises(InputError, match="matches no module"):
        skips(net, where=ByName("nonsense"))


def test_values_that_are_not_finite_are_told():
    net = prepared(image_net())
    bad = [(torch.full((2, 3, 6, 6), float("inf"), dtype=torch.float64), torch.arange(2))]
    with pytest.raises(TrainingError, match="no finite variance"):
        PruneBehindAdapter().plan(net, Task(net, calibration=bad, example_inputs=(torch.randn(2, 3, 6, 6).double(),)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "lstm", "width": 4, "kept": 2},
        {"kind": "linear", "width": 4, "kept": 5},
        {"kind": "linear", "width": 4, "kept": 0},
        {"kind": "conv2d", "width": 4, "kept": 2, "options": {"groups": 2}},
        {"kind": "conv2d", "width": 4, "kept": 2, "options": {"stride": [-1, 1]}},
        {"kind": "linear", "width": 4, "kept": 2, "attributes": {"forward": 1}},
        {"kind": "linear", "width": 4, "kept": 2, "attributes": {"in_features": "x"}},
    ],
)
def test_an_artifact_cannot_ask_for_another_layer(arguments):
    with pytest.raises(InputError, match="Scattered"):
        apply(nn.Sequential(nn.Linear(2, 2)), plan_of(Swap("0", "Scattered", arguments)))


def plan_of(*edits):
    return Plan("by hand", edits)
