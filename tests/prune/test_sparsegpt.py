"""SparseGPT against a naive optimal brain surgeon, its counts, its patterns, and what it passes over."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.observe.hessian import inverse_factor
from tersor.prune.layerwise import sparsegpt
from tersor.prune.layerwise.optimal_brain import settle, surgery, zeros_by_block
from tersor.prune.layerwise.sparsegpt import SparseGPT
from tersor.prune.sparse.patterns import NM, Element, Rows
from tersor.prune.sparse.scopes import Global
from tersor.tensor.masks import keep_largest


def correlated(rows, columns, seed=0):
    """Rows whose columns hang together: a quarter as many causes, and noise."""
    generator = torch.Generator().manual_seed(seed)
    causes = -(-columns // 4)
    mixed = torch.randn(rows, causes, generator=generator) @ torch.randn(causes, columns, generator=generator)
    return (mixed + 0.3 * torch.randn(rows, columns, generator=generator)).double()


def naive(W, H, keep):
    """Optimal brain surgery with an inverse of its own for each column: W [outputs, n], H [n, n]."""
    W = W.clone()
    for row, j in itertools.product(range(len(W)), range(W.shape[1])):
        if not keep[row, j]:
            inverse = torch.linalg.inv(H[j:, j:])
            W[row, j:] -= W[row, j] / inverse[0, 0] * inverse[0]
            W[row, j] = 0
    return W


@pytest.mark.parametrize("block", [2, 3, 16])
def test_the_weights_are_those_of_a_naive_surgeon_with_the_same_mask(block):
    x, W = correlated(60, 7), torch.randn(4, 7, dtype=torch.float64)
    H = x.T @ x / 60
    new, keep = surgery(W[None], inverse_factor(H[None], 0.0, "damping"), 14, block=block)
    assert int((~keep).sum()) == 14 and torch.equal(new != 0, keep)
    assert torch.allclose(new[0], naive(W, H, keep[0]), rtol=1e-8)


def test_each_block_loses_its_cheapest_weights_by_the_inverse_of_what_is_left():
    x, W = correlated(60, 6), torch.randn(3, 6, dtype=torch.float64)
    H = x.T @ x / 60
    _, keep = surgery(W[None], inverse_factor(H[None], 0.0, "damping"), 9, block=6)
    costs = torch.stack([W[:, j].square() / torch.linalg.inv(H[j:, j:])[0, 0] for j in range(6)], 1)
    assert torch.equal(keep[0], keep_largest(costs, 9))


def test_the_last_column_s_best_answer_is_that_of_least_squares():
    """With one weight gone first, the others must be the least-squares solution without it."""
    x, W = correlated(50, 5), torch.randn(1, 5, dtype=torch.float64)
    W[0, 0] = 1e-3  # the cheapest
    new, keep = surgery(W[None], inverse_factor((x.T @ x)[None], 0.0, "damping"), 1, block=5)
    assert keep[0, 0].tolist() == [False, True, True, True, True]
    best = torch.linalg.lstsq(x[:, 1:], x @ W[0]).solution
    assert torch.allclose(new[0, 0, 1:], best, rtol=1e-8)


def test_damping_is_added_to_the_diagonal_and_dead_inputs_cost_nothing():
    x = correlated(30, 4)
    x[:, 2] = 0
    H = x.T @ x
    U = inverse_factor(H[None], 0.1, "damping")[0]
    damped = H + 0.1 * H.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    damped[2, 2] = 1e-6 * H.diagonal().mean()
    assert torch.allclose(U.T @ U, torch.linalg.inv(damped)) and torch.equal(U, U.triu())
    W = torch.randn(2, 4, dtype=torch.float64)
    new, keep = surgery(W[None], inverse_factor(H[None], 0.01, "damping"), 2, block=4)
    assert torch.equal(keep[0], torch.tensor([True, True, False, True]).expand(2, 4))


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_zeros_are_divided_exactly_within_what_blocks_hold(blocks, share):
    sizes = [size for size, _ in blocks]
    standing = [int(size * part) for size, part in blocks]
    zeros = sum(standing) + int(share * (sum(sizes) - sum(standing)))
    found = zeros_by_block(zeros, sizes, standing)
    assert sum(found) == zeros
    assert all(held <= got <= size for held, got, size in zip(standing, found, sizes, strict=True))


class Net(nn.Module):
    """Convolutions plain, grouped and depthwise, a layer that is called twice, two that read one tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, (3, 1), groups=2)
        self.twice = nn.Conv2d(8, 8, 1)
        self.left, self.right, self.fc = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.depthwise(F.relu(self.stem(x)))))
        x = F.relu(self.grouped(x))
        x = self.twice(F.relu(self.twice(x))).mean((2, 3))
        return self.fc(F.relu(self.left(x)) * self.right(x))


LAYERS = ["stem", "depthwise", "grouped", "twice", "left", "right", "fc"]


def task_of(model, shape=(4, 7, 7), count=3, size=32):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(shape[0], shape[0], generator=generator)
    batches = [
        (torch.einsum("bc...,cd->bd...", torch.randn(size, *shape, generator=generator), mix), torch.arange(size) % 3)
        for _ in range(count)
    ]
    return Task(model.eval(), batches, batches, batches, calibration=batches).complete()


def net():
    torch.manual_seed(0)
    return Net()


def tensors(plan, kind):
    return {edit.place.module: edit for edit in plan.edits if isinstance(edit, kind)}


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_every_layer_has_exactly_its_zeros_and_less_error_than_by_magnitude(sparsity):
    model = net()
    task = task_of(model)
    result = SparseGPT(sparsity).run(model, task)
    (plan,) = result.plans
    assert [place for place, _ in plan.lines] == LAYERS and [skip.place for skip in plan.skips] == ["the model"]
    for path in LAYERS:
        weight, kept = result.model.get_submodule(path).weight, tensors(plan, Mask)[path].keep
        assert int((~kept).sum()) == int(sparsity * kept.numel() + 1e-9) == int((weight == 0).sum())
        assert torch.equal(weight != 0, kept)
    x = task.test[0][0]
    errors = [F.mse_loss(pruned(x), model(x)) for pruned in (result.model, by_magnitude(model, sparsity))]
    assert errors[0] < 0.3 * errors[1]


def by_magnitude(model, sparsity):
    pruned = copy.deepcopy(model)
    for path in LAYERS:
        weight = pruned.get_submodule(path).weight.data
        weight *= keep_largest(weight.abs(), int(sparsity * weight.numel() + 1e-9))
    return pruned


def test_on_correlated_inputs_each_layer_s_error_is_far_below_magnitude_s():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 16))
    x = correlated(512, 24).float()
    data = [(x, torch.zeros(512, dtype=torch.int64))]
    task = Task(model, data, data, data, calibration=data).complete()
    result = SparseGPT(0.6).run(model, task)
    keep = keep_largest(model[0].weight.abs(), int(0.6 * 384))
    plain = F.linear(x, model[0].weight * keep, model[0].bias)
    with torch.no_grad():
        ours, theirs = (F.mse_loss(y, model(x)) for y in (result.model(x), plain))
    assert ours < 0.3 * theirs
    text = result.plans[0].lines[0][1]
    assert text.startswith("230 of 384 zero; relative squared error ")
    with torch.no_grad():
        left = F.mse_loss(result.model(x), model(x)) / model(x).square().mean()
    assert float(text.split("error ")[1]) == pytest.approx(float(left), rel=0.01)


def test_what_is_left_of_each_row_is_the_least_squares_solution():
    x, W = correlated(60, 7), torch.randn(3, 7, dtype=torch.float64)
    keep = torch.rand(3, 7) > 0.5
    keep[2] = False
    new = settle(W[None], (x.T @ x)[None], keep[None], 0.0)[0]
    for row in range(3):
        best = torch.linalg.lstsq(x[:, keep[row]], x @ W[row]).solution
        assert torch.allclose(new[row, keep[row]], best, rtol=1e-7) and (new[row, ~keep[row]] == 0).all()


@pytest.mark.parametrize("settled", [0, 1024])
def test_the_second_layer_aims_at_the_dense_model_s_outputs(settled, monkeypatch):
    """Its inputs are the pruned first layer's, its targets the original's: no weights do better with its mask."""
    monkeypatch.setattr(sparsegpt, "SETTLED", settled)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    x = correlated(400, 12).float()
    data = [(x, torch.arange(400) % 4)]
    task = Task(model, data, data, data, calibration=data).complete()
    result = SparseGPT(0.5, damping=1e-8).run(model, task)
    with torch.no_grad():
        read = result.model[:2](x).double()
        wanted, got = model(x).double(), result.model(x).double()
    best = 0.0
    for row, keep in enumerate(result.model[2].weight != 0):
        rows = F.pad(read[:, keep], (0, 1), value=1.0)
        best += float((rows @ torch.linalg.lstsq(rows, wanted[:, row]).solution - wanted[:, row]).square().sum())
    error = float((got - wanted).square().sum())
    assert error == pytest.approx(best, rel=1e-3) if settled else best < error < 1.5 * best


@pytest.mark.parametrize("kept", [1, 2])
def test_patterns_hold_along_the_inputs_at_each_kernel_position(kept):
    model = net()
    plan = SparseGPT(pattern=NM(kept, 4)).plan(model, task_of(model))
    masks = tensors(plan, Mask)
    assert {skip.place: skip.reason for skip in plan.skips} == {
        "depthwise.weight": "1 inputs are no multiple of 4: 1 = 0 × 4 + 1",
        "fc.weight": "6 inputs are no multiple of 4: 6 = 1 × 4 + 2",
        "the model": "8 parameters of fewer than two axes stay: 55 numbers",
    }  # fmt: skip
    for path in ("stem", "grouped", "twice", "left"):
        keep = masks[path].keep.movedim(1, -1)
        assert (keep.reshape(-1, 4).sum(1) == kept).all(), path


def test_a_pattern_repairs_as_the_naive_surgeon_does():
    x, W = correlated(60, 8), torch.randn(3, 8, dtype=torch.float64)
    H = x.T @ x / 60
    new, keep = surgery(W[None], inverse_factor(H[None], 0.0, "damping"), 0, pattern=(2, 4), block=6)
    assert torch.allclose(new[0], naive(W, H, keep[0]), rtol=1e-8)
    moved = naive(W, H, torch.cat([keep[0, :, :4], torch.ones(3, 4, dtype=torch.bool)], 1))
    costs = torch.stack([moved[:, j].square() / torch.linalg.inv(H[j:, j:])[0, 0] for j in range(4, 8)], 1)
    for row in range(3):
        assert torch.equal(keep[0, row, 4:], keep_largest(costs[row], 2))


def test_masks_that_stand_already_stay_and_count():
    model = net()
    task = task_of(model)
    first = torch.rand(8, 8, 1, 1, generator=torch.Generator().manual_seed(5)) > 0.4
    masked = apply(model, Plan("first", (Mask(TensorPlace("twice", "weight"), first),)))
    for settings_ in ({"sparsity": 0.7}, {"pattern": NM()}):
        result = SparseGPT(**settings_, where=ByName("twice")).run(masked, task)
        weight = result.model.twice.weight
        assert (weight[~first] == 0).all()
        if "sparsity" in settings_:
            assert int((weight == 0).sum()) == int(0.7 * 64)
        else:
            assert ((weight != 0).view(8, 2, 4).sum(2) <= 2).all()
    plan = SparseGPT(0.2, where=ByName("twice")).plan(masked, task)
    assert not plan.edits
    assert {skip.place: skip.reason for skip in plan.skips}["twice.weight"].endswith("than are masked already")


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1)
        self.tied, self.normed = nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.functional, self.one = nn.Linear(4, 4), nn.Linear(1, 1)
        self.tied.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.tied(self.up(self.embed(x)[..., None])[..., 0])
        x = F.linear(self.normed(x), self.functional.weight)
        x = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return x + self.one(x[:, :1])


def test_what_cannot_be_solved_for_is_a_skip_with_its_reason():
    model = Odd()
    plan = SparseGPT().plan(model, task_of(model, shape=(4,)))
    assert {skip.place: skip.reason for skip in plan.skips} == {
        "embed.weight": "its weight is tied to tied.weight",
        "up.weight": "only convolutions and linear layers are reconstructed, not ConvTranspose1d",
        "normed.weight": "it is computed by _WeightNorm: a mask on it would be trained away",
        "functional": "the forward does not call it as a module",
        "one.weight": "no more of its weights are to go than are masked already",
        "attention.in_proj_weight": "only convolutions and linear layers are reconstructed, not MultiheadAttention",
        "attention.out_proj": "the forward does not call it as a module",
        "the model": "8 parameters of fewer than two axes stay: 37 numbers",
    }
    assert not plan.edits


def test_a_sparsity_for_each_layer_leaves_the_others_dense_and_names_must_exist():
    model = net()
    task = task_of(model)
    plan = SparseGPT({"stem": 0.25, "fc": 0.5}).plan(model, task)
    assert {place: int((~mask.keep).sum()) for place, mask in tensors(plan, Mask).items()} == {"stem": 72, "fc": 9}
    assert {skip.place for skip in plan.skips if "no name in sparsity=" in skip.reason} == {
        f"{path}.weight" for path in LAYERS if path not in ("stem", "fc")
    }
    with pytest.raises(InputError, match="Nearest names: stem"):
        SparseGPT({"stam": 0.25}).plan(model, task)


def test_layers_that_compete_lose_together_what_is_asked():
    model = net()
    with torch.no_grad():
        model.stem.weight *= 10
    task = task_of(model)
    masks = tensors(SparseGPT(0.4, scope=Global()).plan(model, task), Mask)
    zeros = {path: int((~mask.keep).sum()) for path, mask in masks.items()}
    assert sum(zeros.values()) == int(0.4 * sum(mask.keep.numel() for mask in masks.values()) + 1e-9)
    assert zeros["stem"] < 0.2 * model.stem.weight.numel()
    assert zeros["twice"] > 0.3 * model.twice.weight.numel()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"sparsity": 1.0}, "SparseGPT.sparsity"), ({"sparsity": {"a": -0.1}}, "SparseGPT.sparsity"),
        ({"pattern": Rows()}, "no pattern for"), ({"pattern": Element(per_row=True)}, "no pattern for"),
        ({"rows": 0}, "too few"), ({"damping": float("inf")}, "SparseGPT.damping"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings_, message):
    with pytest.raises(InputError, match=message):
        SparseGPT(**settings_)


def test_weights_that_are_not_finite_and_a_hopeless_damping_are_refused_by_name():
    model = net()
    task = task_of(model)
    with pytest.raises(InputError, match="hang together linearly"):
        SparseGPT(damping=0.0, rows=2, batches=1, where=ByName("stem")).plan(model, task)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="fc"):
        SparseGPT().plan(model, task)
