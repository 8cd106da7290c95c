import copy
import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import ByName, ByType, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, save_artifact
from tersor.export.onnx import export_onnx
from tersor.prune.sparse.elements import RandomWeights, Wanda, WeightFisher, WeightTaylor
from tersor.prune.sparse.elements.score import WeightScore
from tersor.prune.sparse.patterns import NM, Block, Element, Rows
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import ErdosRenyi, Global, PerLayer, PerType
from tersor.prune.sparse.unmask import Unmask
from tersor.prune.structured.channels import PruneChannels
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.quantize import Quantize
from tersor.testing import check_method
from tersor.train.finetune import Finetune
from tersor.zoo.batches import TensorBatches


class Net(nn.Module):
    """A convolution, a grouped one, a transposed one, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.grouped(F.relu(self.norm(self.stem(x))))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


@pytest.fixture
def task():
    torch.manual_seed(0)
    batches = TensorBatches(torch.randn(24, 4, 6, 6), torch.arange(24) % 5, 8)
    return Task(Net().eval(), batches, batches, batches, batches).complete()


def linear_task(*widths):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])
    batches = TensorBatches(torch.randn(8, widths[0]), torch.arange(8) % widths[-1], 4)
    return Task(model.eval(), batches, batches, batches, batches).complete()


def masks(method, task, model=None):
    """Place → mask, of what the method plans."""
    return {str(edit.place): edit.keep for edit in method.plan(model or task.model, task).edits}


def naive(scores, zeros):
    """The mask without the ``zeros`` smallest, of equal ones the earlier."""
    flat = scores.flatten().tolist()
    gone = sorted(range(len(flat)), key=lambda index: (flat[index], index))[:zeros]
    return torch.tensor([index not in gone for index in range(len(flat))]).view(scores.shape)


METHODS = {
    "element": Prune(0.7),
    "n of m": Prune(pattern=NM(1, 4), where=~ByName("head")),
    "block": Prune(0.5, pattern=Block(2, 2)),
    "rows": Prune(0.5, pattern=Rows()),
    "columns": Prune(0.5, pattern=Rows("inputs")),
    "row by row": Prune(0.5, pattern=Element(per_row=True)),
    "global": Prune(0.7, scope=Global()),
    "by size": Prune(0.7, scope=ErdosRenyi()),
    "by type": Prune(scope=PerType()),
    "by name": Prune({"stem": 0.3, "*.weight": 0.6}),
    "taylor": Prune(score=WeightTaylor(2)),
    "fisher": Prune(score=WeightFisher(4)),
    "wanda": Prune(score=Wanda(2)),
    "random": Prune(score=RandomWeights(3)),
    "unmask": Unmask(),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_score_pattern_and_scope_keeps_the_contract(name, task):
    result = check_method(METHODS[name], task.model, task)
    assert result.plans[0].edits or name == "unmask"


@given(st.floats(0, 0.999), st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_count_is_exact_and_of_equal_weights_the_earlier_goes(sparsity, widths, seed):
    task = linear_task(*widths)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in task.model:  # few different values: many ties
            layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape, generator=generator))
    found = masks(Prune(sparsity), task)
    for index, layer in enumerate(task.model):
        zeros = math.floor(sparsity * layer.weight.numel() + 1e-9)
        expected = naive(layer.weight.detach().abs(), zeros)
        assert torch.equal(found.get(f"{index}.weight", torch.ones_like(expected)), expected)


def test_two_four_keeps_two_of_every_four_input_channels_at_each_kernel_position(task):
    found = masks(Prune(pattern=NM(2, 4)), task)
    assert found.keys() == {"stem.weight", "grouped.weight", "up.weight"}
    stem = task.model.stem.weight.detach()
    for out in range(8):
        for y, x in np.ndindex(3, 3):
            assert torch.equal(found["stem.weight"][out, :, y, x], naive(stem[out, :, y, x].abs(), 2))
    up = found["up.weight"]  # [in, out, …]: groups of four along axis 0
    assert (up.view(2, 4, 6, 2, 2).sum(1) == 2).all()


def test_a_layer_whose_inputs_m_does_not_divide_is_skipped_with_the_arithmetic(task):
    skips = {skip.place: skip.reason for skip in Prune(pattern=NM(2, 4)).plan(task.model, task).skips}
    assert skips["head.weight"] == "6 inputs are no multiple of 4: 6 = 1 × 4 + 2"
    skips = {skip.place: skip.reason for skip in Prune(0.5, pattern=Block(4, 2)).plan(task.model, task).skips}
    assert skips["head.weight"] == "5 outputs are no multiple of 4: 5 = 1 × 4 + 1"
    assert skips["up.weight"] == "6 outputs are no multiple of 4: 6 = 1 × 4 + 2"
    assert skips["the model"] == "6 parameters of fewer than two axes stay: 43 numbers"


def test_blocks_go_by_the_mean_of_their_weights(task):
    keep = masks(Prune(0.5, pattern=Block(4, 2)), task)["stem.weight"]
    blocks = task.model.stem.weight.detach().abs().double().view(2, 4, 2, 2, 3, 3)
    expected = naive(blocks.mean((1, 3)), 18)
    assert torch.equal(keep.view(2, 4, 2, 2, 3, 3).all(3).all(1), expected)
    assert torch.equal(keep.view(2, 4, 2, 2, 3, 3).any(3).any(1), expected)


@pytest.mark.parametrize(("of", "dims"), [("outputs", (1, 2, 3)), ("inputs", (0, 2, 3))])
def test_whole_rows_and_columns_go(task, of, dims):
    keep = masks(Prune(0.25, pattern=Rows(of)), task)["stem.weight"]
    expected = naive(task.model.stem.weight.detach().abs().double().mean(dims), 2 if of == "outputs" else 1)
    assert torch.equal(keep.all(3).all(2).all(1 if of == "outputs" else 0), expected)
    assert keep.sum() == expected.sum() * keep.numel() // len(expected)


def test_a_transposed_convolution_s_outputs_are_its_second_axis(task):
    keep = masks(Prune(0.5, pattern=Rows(), where=ByName("up")), task)["up.weight"]
    assert keep.shape == (8, 6, 2, 2)
    assert torch.equal(keep[0, :, 0, 0], naive(task.model.up.weight.detach().abs().double().mean((0, 2, 3)), 3))
    assert (keep == keep[:1, :, :1, :1]).all()


def test_row_by_row_every_row_loses_the_same_number(task):
    found = masks(Prune(0.7, pattern=Element(per_row=True)), task)
    head = task.model.head.weight.detach().abs()
    assert torch.equal(found["head.weight"], torch.stack([naive(row, 4) for row in head]))
    assert (found["up.weight"].transpose(0, 1).flatten(1).sum(1) == 32 - 22).all()


def test_global_takes_the_smallest_of_all_and_exactly_as_many(task):
    found = masks(Prune(0.7, scope=Global(), may_empty=True), task)
    names = ["stem", "grouped", "up", "head"]
    weights = [task.model.get_submodule(name).weight.detach().abs() for name in names]
    every = torch.cat([weight.flatten() for weight in weights])
    expected = naive(every, math.floor(0.7 * len(every) + 1e-9)).split([weight.numel() for weight in weights])
    for name, weight, keep in zip(names, weights, expected, strict=True):
        assert torch.equal(found.get(f"{name}.weight", torch.ones_like(weight).bool()), keep.view(weight.shape))


def test_rows_of_different_sizes_compete_by_their_mean_within_the_total(task):
    method = Prune(0.3, pattern=Rows(), scope=Global(), may_empty=True)
    total = sum(p.numel() for p in task.model.parameters() if p.ndim > 1)
    gone = sum(int((~keep).sum()) for keep in masks(method, task).values())
    largest = 36  # weights in the longest row
    assert 0.3 * total - largest < gone <= 0.3 * total


def erdos_renyi_densities(shapes, density):
    """RigL's: raise the layers that would be denser than dense out of the sum until none is."""
    dense = set()
    while True:
        total = sum(math.prod(shape) for shape in shapes) * density - sum(math.prod(shapes[i]) for i in dense)
        raw = [sum(shape) / math.prod(shape) for shape in shapes]
        epsilon = total / sum(raw[i] * math.prod(shapes[i]) for i in range(len(shapes)) if i not in dense)
        over = [i for i in range(len(shapes)) if i not in dense and epsilon * raw[i] > 1]
        if not over:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense.add(max(over, key=lambda i: raw[i]))


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_erdos_renyi_has_the_densities_of_the_paper_and_the_exact_total(task, sparsity):
    found = masks(Prune(sparsity, scope=ErdosRenyi()), task)
    shapes = {"stem": (8, 4, 3, 3), "grouped": (8, 4, 1, 1), "up": (6, 8, 2, 2), "head": (5, 6)}
    densities = erdos_renyi_densities(list(shapes.values()), 1 - sparsity)
    zeros = {name: int((~found[f"{name}.weight"]).sum()) if f"{name}.weight" in found else 0 for name in shapes}
    for (name, shape), density in zip(shapes.items(), densities, strict=True):
        assert abs(zeros[name] - (1 - density) * math.prod(shape)) <= 1
    assert sum(zeros.values()) == math.floor(sparsity * sum(map(math.prod, shapes.values())) + 1e-9)


def test_by_type_and_by_name_each_layer_has_its_own_fraction(task):
    zeros = {place: int((~keep).sum()) for place, keep in masks(Prune(scope=PerType()), task).items()}
    assert zeros == {"stem.weight": 172, "grouped.weight": 19, "up.weight": 115, "head.weight": 24}
    plan = Prune({"stem": 0.25, "*up.weight": 0.5, "stem.weight": 0.9}).plan(task.model, task)
    assert [int((~edit.keep).sum()) for edit in plan.edits] == [72, 96]
    assert {skip.place for skip in plan.skips} >= {"grouped.weight", "head.weight"}


def test_lines_say_what_was_asked_and_what_came_of_it(task):
    lines = dict(Prune(0.7).plan(task.model, task).lines)
    assert lines["head.weight"] == "21 of 30 zero, 70.0000%; asked for 70.0000%"
    assert lines["grouped.weight"] == "22 of 32 zero, 68.7500%; asked for 70.0000%"
    assert lines["<model>"] == "378 of 542 zero, 69.7417%, in 4 weights"
    assert dict(Prune(0.5, scope=Global()).plan(task.model, task).lines)["<model>"].endswith("asked for 50.0000%")


def test_tied_weights_are_masked_once_and_everywhere():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(12, 6)
            self.out = nn.Linear(6, 12, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x).mean(1))

    torch.manual_seed(0)
    batches = TensorBatches(torch.randint(0, 12, (8, 3)), torch.arange(8), 4)
    task = Task(Tied().eval(), batches, batches, batches, batches).complete()
    for method in (Prune(0.5), Prune(0.5, score=Wanda(2))):
        model = check_method(method, task.model, task).model
        assert (model.out.weight == 0).sum() == 36 and torch.equal(model.out.weight, model.embed.weight)
        assert len(method.plan(task.model, task).edits) == 1


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.body, self.out = kind(4, 8, num_layers=2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.body(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.body(x).mean(1))


@pytest.mark.parametrize("make", [Recurrent, lambda: Recurrent(nn.GRU), Attention])
def test_recurrent_layers_and_attention_are_masked_trained_copied_and_saved(make, tmp_path):
    torch.manual_seed(0)
    batches = TensorBatches(torch.randn(12, 5, 4), torch.arange(12) % 3, 4)
    model = make().eval()
    task = Task(model, batches, batches, batches, batches).complete()
    sparse = check_method(Prune(0.5), model, task)
    trained = Finetune(epochs=2).run(sparse.model, task).model
    plain = copy.deepcopy(model)
    with torch.no_grad():  # the same weights without masks, zeros written into them
        for full, parameter in plain.named_parameters():
            path, _, name = full.rpartition(".")
            parameter.copy_(getattr(trained.get_submodule(path), name))
    x = torch.randn(3, 5, 4)
    assert torch.allclose(plain(x), trained(x), atol=1e-6) and not torch.allclose(sparse.model(x), trained(x))
    for edit in sparse.plans[0].edits:
        assert (getattr(plain.get_submodule(edit.place.module), edit.place.tensor)[~edit.keep] == 0).all()
    save_artifact(tmp_path, trained, original=model, plans=sparse.plans)
    assert torch.equal(load_artifact(tmp_path, make())(x), trained(x))
    assert torch.equal(copy.deepcopy(trained).double().float()(x), trained(x))


def test_zeros_that_stand_count_and_never_come_back_unless_asked(task):
    half = Prune(0.5).run(task.model, task).model
    with torch.no_grad():  # what is masked would be the largest by what is stored
        stored = half.stem.parametrizations.weight.original
        stored[half.stem.weight == 0] += 10
    more = Prune(0.7, score=RandomWeights()).run(half, task).model
    assert (more.stem.weight == 0).sum() == math.floor(0.7 * 288 + 1e-9)
    assert (more.stem.weight[half.stem.weight == 0] == 0).all()
    assert not Prune(0.3).plan(half, task).edits  # there are more zeros already
    assert "144 before" in dict(Prune(0.7).plan(half, task).lines)["stem.weight"]
    regrown = Prune(0.5, regrow=True).run(half, task).model
    assert (regrown.stem.weight == 0).sum() == 144
    assert torch.equal(regrown.stem.weight == 0, half.stem.weight != 0)  # the large stored ones are back


def test_regrowth_asks_the_score_about_the_weights_without_their_masks(task):
    half = Prune(0.5).run(task.model, task).model
    for score in (WeightTaylor(2), Wanda(2), WeightFisher(4)):
        of_dense = masks(Prune(0.5, score=score), task)
        of_masked = masks(Prune(0.5, score=score, regrow=True), task, half)
        for place, keep in of_masked.items():
            assert torch.equal(keep, of_dense[place])
    assert all((mask == 1).all() for mask in (module.keep for _, module in masked_modules(half.stem, False)))


def masked_modules(model, zeros):
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ == "Masked" and bool((~m.keep).any()) == zeros]


def test_unmask_from_zero_computes_the_same_and_from_stored_brings_them_back(task):
    half = Prune(0.5).run(task.model, task).model
    x = task.example_inputs[0]
    zero, stored = (Unmask(weights=weights).run(half, task).model.eval() for weights in ("zero", "stored"))
    assert torch.equal(zero(x), half.eval()(x)) and not masked_modules(zero, True)
    assert torch.equal(stored(x), task.model(x))
    assert Unmask().plan(task.model, task).skips[0].reason == "no mask stands on it"
    assert "holds nothing" in Unmask().plan(zero, task).skips[0].reason


@pytest.mark.parametrize(("value", "said"), [(math.nan, "2 NaN and 0 infinite"), (-math.inf, "0 NaN and 2 infinite")])
def test_weights_that_are_not_finite_are_counted_and_refused(task, value, said):
    with torch.no_grad():
        task.model.up.weight.view(-1)[:2] = value
    with pytest.raises(InputError, match=f"up.weight: .*{said} of 192"):
        Prune(0.5).plan(task.model, task)
    assert len(Prune(0.5, where=~ByName("up")).plan(task.model, task).edits) == 3


class Broken(WeightScore):
    def elements(self, model, task, places):
        return [torch.full_like(model.get_submodule(p.module).weight, math.nan) for p in places]


def test_scores_that_are_nan_are_refused(task):
    with pytest.raises(InputError, match="stem.weight: .*288 NaN of 288 by Broken"):
        Prune(0.5, score=Broken()).plan(task.model, task)


def test_a_mask_that_would_empty_a_layer_is_refused_unless_asked(task):
    with torch.no_grad():
        task.model.head.weight.mul_(1e-6)
    with pytest.raises(InputError, match=r"head.weight: .*1 of 4 weights all zero.*may_empty=True"):
        Prune(0.5, scope=Global()).plan(task.model, task)
    plan = Prune(0.5, scope=Global(), may_empty=True).plan(task.model, task)
    assert dict(plan.lines)["head.weight"].endswith("WARNING: nothing is left of it")
    empty = apply(task.model, plan)
    assert Prune(0.6, scope=Global()).plan(empty, task).edits  # it is empty already: nothing new


def test_what_cannot_be_masked_is_skipped_or_refused_by_name(task):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model[2].weight = nn.Parameter(torch.ones(0, 4))
    model.register_module("eight", nn.Linear(4, 4).to(torch.float8_e4m3fn))
    model.register_module("normed", parametrizations.spectral_norm(nn.Linear(4, 4)))
    skips = {skip.place: skip.reason for skip in Prune(0.5).plan(model, task).skips}
    assert "computed by _WeightNorm" in skips["0.weight"] and "int8" in skips["1.weight"]
    assert "float8_e4m3fn, too few bits" in skips["eight.weight"]
    assert "empty: shape [0, 4]" in skips["2.weight"] and "_SpectralNorm" in skips["normed.weight"]
    torch_prune.l1_unstructured(task.model.head, "weight", 0.5)
    with pytest.raises(InputError, match="head: another mask stands here"):
        Prune(0.5).plan(task.model, task)
    with pytest.raises(InputError, match="meta device"):
        Prune(0.5).plan(Net().to("meta"), task)
    assert [skip.reason for skip in Prune(0.5).plan(nn.ReLU(), task).skips] == ["it has no weights"]


@pytest.mark.parametrize("kind", ["lazy", "torch.nn.utils.prune"])
def test_a_model_that_cannot_be_copied_is_refused_with_what_to_do(kind):
    model = nn.LazyLinear(3) if kind == "lazy" else nn.Linear(4, 3)
    if kind != "lazy":
        torch_prune.l1_unstructured(model, "weight", 0.5)
    batches = TensorBatches(torch.randn(8, 4), torch.arange(8) % 3, 4)
    with pytest.raises(InputError, match=r"cannot be copied.*Run a lazy model.*prune.remove"):
        Prune(0.5).run(model, Task(model, batches, batches, batches))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sparsity": 1.0}, r"Prune.sparsity: not a fraction. Got 1.0; expected \[0, 1\)"),
        ({"sparsity": -0.1}, "not a fraction"),
        ({"sparsity": True}, "not a fraction"),
        ({"sparsity": math.nan}, "not a fraction"),
        ({"sparsity": {"stem": 1.5}}, r"sparsity\['stem'\]"),
        ({"sparsity": 0.4, "pattern": NM()}, "sparsity of its own: 0.5"),
        ({"pattern": NM(), "scope": Global()}, "nothing competes"),
        ({"sparsity": 0.4, "scope": PerType()}, "one of the two"),
        ({"sparsity": {"stem": 0.5}, "scope": Global()}, "nothing to compete for"),
        ({"score": "magnitude"}, "expected a WeightScore"),
        ({"scope": "global"}, "expected a Scope"),
    ],
)
def test_settings_out_of_range_are_errors_that_name_the_field(fields, said):
    with pytest.raises(InputError, match=said):
        Prune(**fields)


@pytest.mark.parametrize(
    "make", [lambda: NM(5, 4), lambda: NM(0, 4), lambda: Block(0, 1), lambda: Rows("rows"), lambda: PerType(linear=1)]
)
def test_patterns_and_scopes_check_their_settings(make):
    with pytest.raises(InputError):
        make()


def test_a_name_that_matches_nothing_is_an_error_with_the_nearest(task):
    with pytest.raises(InputError, match="matches no weight.*stem.weight"):
        Prune({"stm.weight": 0.5}).plan(task.model, task)
    with pytest.raises(InputError, match="no weight that may be masked"):
        Prune({"0": 0.5}).plan(nn.Sequential(nn.BatchNorm1d(4)), task)
    with pytest.raises(InputError, match="nobody's inputs"):
        Prune(score=Wanda()).plan(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), embedding_task())


def embedding_task():
    batches = TensorBatches(torch.zeros(4, dtype=torch.int64), torch.arange(4), 2)
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    return Task(model, batches, batches, batches, batches).complete()


def test_parts_of_the_way_lead_from_dense_to_the_whole(task):
    for method in (Prune(0.8), Prune(scope=PerType()), Prune({"*": 0.8}), Prune(pattern=NM(1, 4)), Prune()):
        for way in (method.part, method.remaining):
            counts = [sum(int((~k).sum()) for k in masks(way(w), task).values()) for w in (0, 0.3, 0.6, 1)]
            assert counts == sorted(counts) and counts[0] == 0
            assert counts[-1] == sum(int((~k).sum()) for k in masks(method, task).values())
    assert Prune(0.9).remaining(1 / 3).sparsity == pytest.approx(1 - 0.1 ** (1 / 3))


def test_a_model_whose_channels_were_pruned_can_be_masked(task):
    small = PruneChannels(0.5).run(task.model, task).model
    model = check_method(Prune(0.5), small, task).model
    assert model.stem.weight.shape[0] < 8 and (model.stem.weight == 0).sum() == model.stem.weight.numel() // 2


def zeros_of(proto):
    """Zeros of each initialiser of two or more axes, by its number of elements."""
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    return {array.size: int((array == 0).sum()) for array in arrays if array.ndim > 1}


@pytest.mark.parametrize("first", ["mask", "quantise"])
def test_masks_and_quantisers_meet_in_either_order_and_in_onnx(task, tmp_path, first):
    steps = [Prune(0.75), Quantize()] if first == "mask" else [Quantize(), Prune(0.75)]
    model = FoldBatchNorm().run(task.model, task).model
    for step in steps:
        model = step.run(model, task).model
    for name in ("stem", "grouped", "up", "head"):
        weight = model.get_submodule(name).weight
        assert (weight == 0).sum() >= math.floor(0.75 * weight.numel())
    export_onnx(model, task.example_inputs, tmp_path / "model.onnx")
    found = zeros_of(onnx.load(tmp_path / "model.onnx"))
    assert all(found[size] >= math.floor(0.75 * size) for size in (288, 192, 30))


def test_zeros_survive_copies_saving_loading_and_onnx(task, tmp_path):
    plan = Prune(0.8).plan(task.model, task)
    model = apply(task.model, plan).eval()
    x = task.example_inputs[0]
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    save_artifact(tmp_path / "saved", model, original=task.model, plans=(plan,))
    again = load_artifact(tmp_path / "saved", Net())
    assert torch.equal(again(x), model(x)) and torch.equal(again.stem.weight, model.stem.weight)
    export_onnx(model, task.example_inputs, tmp_path / "model.onnx")
    found = zeros_of(onnx.load(tmp_path / "model.onnx"))
    assert found[192] == math.floor(0.8 * 192)


def test_half_precision_weights_are_counted_exactly(task):
    batches = TensorBatches(torch.randn(8, 4, 6, 6).bfloat16(), torch.arange(8) % 5, 4)
    half = Task(task.model.bfloat16(), batches, batches, batches, batches).complete()
    for score in (None, WeightTaylor(1), Wanda(1)):
        method = Prune(0.9, **({} if score is None else {"score": score}))
        assert int((~masks(method, half)["stem.weight"]).sum()) == 259


def test_a_mask_by_hand_beside_it_still_counts(task):
    keep = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    model = apply(task.model, Plan("by hand", (Mask(TensorPlace("head", "weight"), keep),)))
    block = Prune(0.5, pattern=Block(5, 1), where=ByType("Linear")).run(model, task).model
    assert (block.head.weight[~keep] == 0).all() and ((block.head.weight == 0).all(0).sum() >= 3)


def test_per_layer_is_the_default_and_nothing_reads_the_task():
    task = linear_task(4, 4)
    assert Prune().scope == PerLayer() and Prune().pattern == Element()
    assert len(Prune().plan(task.model, None).edits) == 1
