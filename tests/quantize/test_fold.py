import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import InputError, VerificationError
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, save_artifact
from tersor.quantize.fold import FoldBatchNorm


def awake(model):
    """Fresh norms hide mistakes: give every affine, statistic and bias random values, some of them negative."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_()
            if module.running_var is not None:
                module.running_var.uniform_(0.3, 2)
    return model.double().eval()


def fold(model, x, **fields):
    result = FoldBatchNorm(**fields).run(model, Task(model, example_inputs=(x,)))
    return result.model, result.plans[0]


FOLDABLE = {
    "conv without bias": (lambda: [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)], (2, 3, 6, 6)),
    "conv with bias": (lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)], (2, 3, 6, 6)),
    "grouped conv": (lambda: [nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)], (2, 4, 6, 6)),
    "conv1d": (lambda: [nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)], (2, 3, 6)),
    "linear": (lambda: [nn.Linear(3, 8), nn.BatchNorm1d(8)], (5, 3)),
    "linear without bias": (lambda: [nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8)], (5, 3)),
    "norm without affine": (lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)], (2, 3, 6, 6)),
    "grouped transposed conv": (lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_folded_model_computes_the_same(name):
    make, shape = FOLDABLE[name]
    model, x = awake(nn.Sequential(*make(), nn.ReLU())), torch.randn(shape, dtype=torch.float64)
    folded, plan = fold(model, x)
    expected = model(x)
    assert isinstance(folded[1], nn.Identity) and not plan.skips
    assert (folded(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert isinstance(model[1], nn.modules.batchnorm._BatchNorm)


class NormAndActivation(nn.BatchNorm2d):
    """A norm as timm has them: its activation is its child."""

    def __init__(self, channels, activation):
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.1), activation

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class NormAndDouble(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_norm_that_holds_an_activation_leaves_it_where_it_was(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(2, 4, 3), NormAndActivation(4, nn.PReLU()), nn.Conv2d(4, 4, 1), NormAndDouble(4))

    model = awake(build()).float()
    x = torch.randn(2, 2, 5, 5)
    folded, plan = fold(model, x)
    assert [(skip.place, skip.reason) for skip in plan.skips] == [("3:batch_norm[0]", "its forward computes mul too")]
    assert [type(part).__name__ for part in folded[1]] == ["Dropout", "PReLU"] and isinstance(folded[3], NormAndDouble)
    assert torch.equal(folded[1].act.weight, model[1].act.weight)
    assert torch.allclose(folded(x), model(x), rtol=1e-4, atol=1e-5)
    save_artifact(tmp_path, folded, original=model, plans=(plan,))
    assert torch.equal(load_artifact(tmp_path, build())(x), folded(x))


def test_what_a_norm_s_own_weight_passes_through_is_no_child_to_leave():
    plain = awake(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)))
    masked = apply(plain, Plan("x", (Mask(TensorPlace("1", "weight"), torch.tensor([True, False, True, True])),)))
    folded, _ = fold(masked, torch.randn(2, 2, 5, 5).double())
    assert isinstance(folded[1], nn.Identity) and not folded[0].weight[1].any()


def test_a_masked_weight_is_folded_and_keeps_its_zeros():
    model = awake(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)))
    keep = torch.rand(model[0].weight.shape) > 0.5
    masked = apply(model, Plan("mask", (Mask(TensorPlace("0", "weight"), keep),)))
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    folded, _ = fold(masked, x)
    assert torch.allclose(folded(x), masked(x), rtol=1e-9)
    assert (folded[0].weight[~keep] == 0).all()


class Unfoldable(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(2, 2, 1)
        self.first, self.second = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.read_twice, self.after_read_twice = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.conv, self.twice = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.own, self.batch_statistics = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)
        self.before, self.functional = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.after_relu = nn.BatchNorm2d(2)

    def forward(self, x):
        x = self.first(self.shared(x)) + self.second(self.shared(x + 1))
        y = self.read_twice(x)
        x = self.after_read_twice(y) + y
        x = self.twice(self.twice(self.conv(x)))
        x = self.batch_statistics(self.own(x))
        norm = self.functional
        x = F.batch_norm(self.before(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return self.after_relu(x.relu())


def test_each_norm_that_cannot_be_folded_is_skipped_with_the_reason():
    model, x = awake(Unfoldable()), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    folded, plan = fold(model, x)
    reasons = {skip.place.split(":")[0] + skip.place[-3:]: skip.reason for skip in plan.skips}
    assert not plan.edits and torch.equal(folded(x), model(x))
    assert "shared is called more than once" in reasons["first[0]"]
    assert "shared is called more than once" in reasons["second[0]"]
    assert "also read by add" in reasons["after_read_twice[0]"]
    assert "called more than once" in reasons["twice[0]"] and "called more than once" in reasons["twice[1]"]
    assert "track_running_stats" in reasons["batch_statistics[0]"]
    assert "function" in reasons["<model>[0]"]
    assert "follows relu" in reasons["after_relu[0]"]


def test_tied_weights_are_not_rewritten():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    model[2].weight = model[0].weight
    _, plan = fold(awake(model), torch.randn(2, 2, 4, 4, dtype=torch.float64))
    assert not plan.edits and "shared" in plan.skips[0].reason


def test_where_says_which_norms():
    model = awake(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    folded, plan = fold(model, x, where=ByName("3"))
    assert isinstance(folded[1], nn.BatchNorm2d) and isinstance(folded[3], nn.Identity)
    assert [(skip.place, skip.reason) for skip in plan.skips] == [("1", "left out by where")]
    assert torch.allclose(folded(x), model(x))
    with pytest.raises(InputError, match="matches no module"):
        fold(copy.deepcopy(model), x, where=ByName("norm*"))


def test_a_wrong_fold_is_caught_before_it_is_handed_on(monkeypatch):
    from tersor.quantize import fold as module

    right = module._scale_outputs
    monkeypatch.setattr(module, "_scale_outputs", lambda weight, *rest: right(weight, *rest).roll(1, 0))
    model = awake(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(VerificationError, match="FoldBatchNorm: the edited model differs from the original"):
        fold(model, torch.randn(2, 2, 5, 5, dtype=torch.float64))


def test_the_difference_that_folding_makes_is_noted():
    model = awake(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))).float()
    result = FoldBatchNorm().run(model, Task(model, example_inputs=(torch.randn(2, 2, 5, 5),)))
    assert 0 <= result.facts["verified"] < 1e-5
