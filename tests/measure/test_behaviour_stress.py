import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.measure.behaviour.attacks import Attacked, Corrupted, Scale
from tersor.measure.behaviour.collect import collect
from tersor.measure.behaviour.corruptions import NUMBERS, PICTURES, SEVERITIES
from tersor.measure.behaviour.data import EvaluationData, Pixels
from tersor.measure.behaviour.inputs import Reach
from tersor.measure.behaviour.robustness import Stress, robustness
from tersor.measure.runnable import Runnable, open_onnx

torch.manual_seed(0)
PHOTO = F.interpolate(torch.rand(4, 3, 6, 6), (32, 32), mode="bicubic").clamp(0, 1)
X = torch.randn(80, 8)
Y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


def data(**more):
    return EvaluationData([(X[:40], Y[:40]), (X[40:], Y[40:])], **more)


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", PICTURES)
def test_a_corruption_moves_a_picture_further_at_each_severity(name, size):
    photo = F.interpolate(PHOTO, (size, size), mode="bilinear")
    moved = []
    for severity in SEVERITIES:
        changed = PICTURES[name](photo, severity, seeded())
        assert changed.shape == photo.shape and changed.dtype == photo.dtype and torch.isfinite(changed).all()
        assert torch.equal(changed, PICTURES[name](photo, severity, seeded()))
        moved.append(float((changed - photo).square().mean()))
    # how far pixels move hangs on where cells meet the picture's own edges: see the test below
    assert 0 < moved[0] < moved[-1] and moved == sorted(moved) or name == "pixelate", moved


@pytest.mark.parametrize(("size", "shares"), [(32, (0.95, 0.9, 0.85, 0.75, 0.65)), (96, (0.6, 0.5, 0.4, 0.3, 0.25))])
def test_pixelate_leaves_so_many_rows_and_columns(size, shares):
    ramp = torch.arange(size * size, dtype=torch.float32).reshape(1, 1, size, size) / size**2
    for severity, share in zip(SEVERITIES, shares, strict=True):
        changed = PICTURES["pixelate"](ramp, severity, seeded())[0, 0]
        assert len(changed.unique()) == int(size * share) ** 2
        assert changed.mean() == pytest.approx(float(ramp.mean()), abs=0.03)


def test_noise_has_the_strength_that_the_paper_says():
    grey = torch.full((64, 1, 32, 32), 0.5)
    assert (PICTURES["gaussian_noise"](grey, 5, seeded()) - grey).std() == pytest.approx(0.10, rel=0.02)
    assert (PICTURES["speckle_noise"](grey, 3, seeded()) - grey).std() == pytest.approx(0.06, rel=0.02)
    shot = PICTURES["shot_noise"](grey, 4, seeded())
    assert shot.mean() == pytest.approx(0.5, rel=0.01) and shot.var() == pytest.approx(0.5 / 75, rel=0.03)
    assert (PICTURES["impulse_noise"](grey, 5, seeded()) != grey).float().mean() == pytest.approx(0.07, rel=0.05)
    assert (NUMBERS["dropped_values"](torch.zeros(100, 50), 4, seeded()) == 0.5).float().mean() == pytest.approx(
        0.2, rel=0.1
    )


def test_blurs_keep_what_is_flat_and_the_middle_of_mass():
    flat = torch.full((1, 2, 16, 16), 0.3)
    point = torch.zeros(1, 1, 33, 33)
    point[0, 0, 16, 16] = 1
    for name in ("gaussian_blur", "defocus_blur", "motion_blur"):
        torch.testing.assert_close(PICTURES[name](flat, 5, seeded()), flat)
        assert PICTURES[name](point, 5, seeded()).sum() == pytest.approx(1, abs=1e-4)
    blurred = PICTURES["gaussian_blur"](point, 5, seeded())[0, 0]
    from scipy.ndimage import gaussian_filter

    np.testing.assert_allclose(blurred, gaussian_filter(point[0, 0].numpy(), 1.0, mode="nearest"), atol=1e-6)


def test_brightness_raises_the_value_and_contrast_keeps_the_mean():
    import colorsys

    bright = PICTURES["brightness"](PHOTO, 3, seeded())
    for before, after in zip(PHOTO[0].flatten(1).T[:40], bright[0].flatten(1).T[:40], strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before.tolist())
        expected = colorsys.hsv_to_rgb(h, s, min(v + 0.15, 1))
        np.testing.assert_allclose(after, expected, atol=1e-5)
    dull = PICTURES["contrast"](PHOTO, 5, seeded())
    torch.testing.assert_close(dull.mean(dim=(2, 3)), PHOTO.mean(dim=(2, 3)))
    torch.testing.assert_close(dull.std(dim=(2, 3)), 0.15 * PHOTO.std(dim=(2, 3)))


def test_pixels_are_found_again_behind_mean_and_deviation():
    mean, deviation = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x = (PHOTO - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    scale = Scale.of(Reach.of(x), data(pixels=Pixels(mean, deviation)))
    torch.testing.assert_close(scale.to_unit(x), PHOTO)
    torch.testing.assert_close(scale.back(scale.to_unit(x)), x)
    changed = Corrupted("brightness", 5, scale).of((x,), {}, None, 0)[0][0]
    unit = scale.to_unit(changed)
    assert unit.min() > -1e-5 and unit.max() < 1 + 1e-5 and (unit - PHOTO).mean() > 0.1
    with pytest.raises(InputError, match="another number of channels"):
        Scale.of(Reach.of(X), data(pixels=Pixels(mean, deviation)))


def test_a_feature_that_never_changes_stays_what_it_is():
    x = torch.cat([X, torch.full((80, 1), 7.0)], dim=1)
    scale = Scale.of(Reach.of(x), data())
    torch.testing.assert_close(scale.back(scale.to_unit(x)), x)
    noisy = Corrupted("noise", 5, scale).of((x,), {}, None, 0)[0][0]
    assert (noisy[:, 8] == 7).all() and not torch.equal(noisy, x)


def attack(model, budget, steps, **more):
    known = data(**more)
    return Attacked(Runnable("one", model), known.based, Scale.of(Reach.of(X), known), budget, steps)


@pytest.mark.parametrize("steps", [1, 5])
def test_an_attack_stays_in_its_budget_and_raises_the_loss(steps):
    model = trained()
    change = attack(model, 0.05, steps)
    changed = change.of((X,), {}, Y, 0)[0][0]
    span = X.amax(0) - X.amin(0)
    assert ((changed - X).abs() <= 0.05 * span * (1 + 1e-5)).all()
    assert F.cross_entropy(model(changed), Y) > 1.2 * F.cross_entropy(model(X), Y)
    again = attack(model, 0.05, steps).of((X,), {}, Y, 0)[0][0]
    assert torch.equal(changed, again)


def test_fgsm_is_one_step_along_the_gradients_sign():
    model = trained()
    changed = attack(model, 0.03, 1).of((X,), {}, Y, 0)[0][0]
    leaf = X.clone().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(model(leaf), Y), leaf)[0]
    torch.testing.assert_close(changed, X + 0.03 * (X.amax(0) - X.amin(0)) * gradient.sign())


def test_a_model_in_float16_is_attacked_though_its_own_gradients_vanish():
    sure = nn.Linear(X.shape[1], 3)
    with torch.no_grad():
        sure.weight.copy_(6 * torch.randn(sure.weight.shape, generator=torch.Generator().manual_seed(0)))
    right = sure(X).argmax(1)
    half = copy.deepcopy(sure).half()
    leaf = X.clone().requires_grad_()
    F.cross_entropy(half(leaf.half()).float(), right).backward()
    assert (leaf.grad == 0).float().mean() > 0.2
    for given in (X, X.half()):
        changed = attack(half, 0.03, 1).of((given,), {}, right, 0)[0][0]
        assert ((changed - given).abs() > 0.02 * (X.amax(0) - X.amin(0))).float().mean() > 0.99
    assert all(parameter.dtype == torch.float16 for parameter in half.parameters())


def test_pgd_beats_fgsm_and_random_noise_does_not_come_near():
    model, small = trained(), Stress(80, (5,), (0.1,), 10)
    found, _ = robustness(*(Runnable(n, model) for n in "ab"), data(), collect_clean(model), small)
    by = {(each.name, each.against): each.original.value for each in found.attacks}
    assert by["pgd", "a"] <= by["fgsm", "a"] < found.clean.original.value
    assert found.clean.original.value - by["pgd", "a"] > 0.1
    noise = next(each for each in found.corruptions if each.name == "noise")
    assert noise.original.value > by["pgd", "a"]


def collect_clean(model, other=None):
    return collect(Runnable("a", model), Runnable("b", other or model), data())


def test_equal_models_lose_nothing_under_any_stress():
    model = trained()
    found, skipped = robustness(
        Runnable("a", model), Runnable("b", model), data(), collect_clean(model), Stress(40, (1, 5), (0.05,), 3)
    )
    assert not skipped and found.samples == 40
    assert {(each.name, each.severity) for each in found.corruptions} == {(n, s) for n in NUMBERS for s in (1, 5)}
    for each in (*found.corruptions, *found.attacks, found.mean):
        assert each.drop.value == 0 and each.drop.low <= 0 <= each.drop.high
        assert each.agreement is None or each.agreement.value == 1


def test_the_mean_over_corruptions_is_theirs():
    one, other = trained(0), trained(1)
    found, _ = robustness(
        Runnable("a", one), Runnable("b", other), data(), collect_clean(one, other), Stress(80, (3, 5), (), 0)
    )
    for which in ("original", "compressed", "drop"):
        each = [getattr(condition, which).value for condition in found.corruptions]
        assert getattr(found.mean, which).value == pytest.approx(np.mean(each))
    assert found.mean.agreement.value == pytest.approx(np.mean([each.agreement.value for each in found.corruptions]))


def test_a_file_is_attacked_by_transfer_and_that_is_said(perceptron):
    file, model = open_onnx(perceptron(width=8, layers=2), threads=1), trained()
    clean = collect(Runnable("torch", model), file, data())
    found, skipped = robustness(Runnable("torch", model), file, data(), clean, Stress(40, (), (0.05,), 3))
    assert {each.against for each in found.attacks} == {"torch"} and found.mean is None
    assert "by transfer only" in skipped[0].why and file.name in skipped[0].what
    found, skipped = robustness(file, file, data(), collect(file, file, data()), Stress(40, (1,), (0.05,), 3))
    assert not found.attacks and all("neither is a PyTorch model" in each.why for each in skipped)


def test_a_model_without_a_gradient_is_left_out_with_the_reason():
    class Detached(nn.Module):
        def forward(self, x):
            return torch.nn.functional.pad(x.detach(), (0, 0))

    found, skipped = robustness(
        Runnable("a", Detached()), Runnable("b", Detached()), data(), collect_clean(Detached()),
        Stress(40, (1,), (0.05,), 3),
    )  # fmt: skip
    assert not found.attacks and "no gradient" in skipped[0].why


def test_too_little_time_takes_fewer_samples_and_says_so():
    model = trained()
    found, skipped = robustness(
        Runnable("a", model), Runnable("b", model), data(), collect_clean(model), Stress(80, (1,), (), 0, seconds=1e-9)
    )
    assert found.samples == 50 and "80 samples would take" in skipped[0].why


def test_a_model_that_breaks_under_noise_leaves_out_that_corruption_alone():
    class Brittle(nn.Module):
        def forward(self, x):
            return trained_once(x) / (x.abs().amax(dim=1, keepdim=True) <= float(X.abs().max())).float()

    trained_once, pair = trained(), (Runnable("a", trained()), Runnable("b", Brittle()))
    found, skipped = robustness(*pair, data(), collect(*pair, data()), Stress(80, (1, 5), (), 0))
    assert [each.what for each in skipped if "not finite" in each.why] == ["noise 1", "noise 5"]
    assert {each.name for each in found.corruptions} == {"dropped_values"}


class Shuffled:
    def __init__(self, targets=Y):
        self.passes, self.targets = 0, targets

    def __iter__(self):
        self.passes += 1
        order = np.random.default_rng(self.passes).permutation(len(X))
        yield X[order], self.targets[order]


def test_a_loader_of_another_order_and_a_model_of_other_answers_each_time_are_seen():
    class Random(nn.Module):
        def forward(self, x):
            return model(x) * torch.randn(8, generator=own)

    torch.manual_seed(3)
    model, own, short = nn.Linear(8, 8), torch.Generator(), Stress(80, (1,), (), 0)
    one, other = Runnable("a", model), Runnable("b", nn.Linear(8, 8))
    shuffled = EvaluationData(Shuffled())
    found, skipped = robustness(one, other, shuffled, collect(one, other, shuffled), short)
    assert found is None and "other samples each time" in skipped[0].why
    right = EvaluationData(Shuffled(model(X).argmax(1)))  # always right, which says nothing of the order
    found, skipped = robustness(one, one, right, collect(one, one, right), short)
    assert found is None and "other samples each time" in skipped[0].why
    random = Runnable("c", Random())
    found, skipped = robustness(one, random, data(), collect(one, random, data()), short)
    assert found is None and "c says something else" in skipped[0].why


def test_tokens_cannot_be_corrupted():
    table = nn.Embedding(9, 4)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(12, 3))
    tokens = EvaluationData([(torch.randint(0, 9, (30, 3)), torch.zeros(30, dtype=torch.long))])
    pair = Runnable("a", model), Runnable("b", model)
    found, skipped = robustness(*pair, tokens, collect(*pair, tokens))
    assert found is None and "no real numbers" in skipped[0].why


@pytest.mark.parametrize(
    "settings", [{"samples": 0}, {"severities": (6,)}, {"budgets": (0.0,)}, {"steps": -1}, {"seconds": 0}]
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(InputError, match="unusable settings"):
        Stress(**settings)


def test_a_scale_of_pixels_that_is_none_is_refused():
    for mean, deviation in [((), ()), ((0.5,), (0.0,)), ((0.5,), (1.0, 1.0))]:
        with pytest.raises(InputError, match="no scale of pixels"):
            Pixels(mean, deviation)
