"""Blocks taken out of nets of many shapes: what is left is the net whose branches end in zeros."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Attribute, Swap
from tersor.core.errors import InputError, TrainingError, VerificationError
from tersor.core.place import ByName
from tersor.core.removed import Removed
from tersor.core.task import Task
from tersor.core.verify import verify_edits
from tersor.export.artifact import load_artifact, save_artifact
from tersor.export.onnx import export_onnx
from tersor.measure.compute import macs
from tersor.prune.blocks.block_scores import LossIncrease, RelativeNorm, Similarity
from tersor.prune.blocks.remove import PruneBlocks
from tersor.prune.structured.channels import PruneChannels
from tersor.recipes.recipe import read_recipe
from tersor.testing import check_method
from tersor.zoo.batches import TensorBatches


def norm_conv(inputs, outputs, size=3, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Basic(nn.Module):
    """ResNet's block, written with one ReLU in place for all, as torchvision does."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = norm_conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class Inverted(nn.Module):
    """MobileNet's block, with squeeze and excitation."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(norm_conv(width, 2 * width, 1), nn.Hardswish(inplace=True),
                                  norm_conv(2 * width, 2 * width, 3, 1, 2 * width), Gate(2 * width),
                                  norm_conv(2 * width, width, 1))  # fmt: skip

    def forward(self, x):
        return x + self.conv(x)


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class ConvNeXt(nn.Module):
    """Channels last inside, and a scale that the block holds itself."""

    def __init__(self, width):
        super().__init__()
        self.dw, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x):
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)


class PreActivation(nn.Module):
    """Norm and ReLU in place before the convolution: what starts the branch may not be overwritten."""

    def __init__(self, width):
        super().__init__()
        self.bn, self.conv, self.last = nn.BatchNorm2d(width), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.last(self.relu(self.conv(self.relu(self.bn(x))))))


class ConvNet(nn.Module):
    def __init__(self, *blocks, head=10):
        super().__init__()
        self.stem, self.blocks = norm_conv(3, 8), nn.Sequential(*blocks)
        self.head = nn.Linear(head, 5)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden, mask=None):
        b, n, c = hidden.shape
        q, k, v = self.qkv(hidden).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(b, n, c)), None  # a tuple, as Hugging Face's layers give


class Layer(nn.Module):
    """A transformer's layer; ``post`` puts the norms behind the additions."""

    def __init__(self, width, post=False):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.post = post
        self.kind = "full"

    def forward(self, hidden, mask=None):
        if self.post:
            hidden = self.norm1(hidden + self.attn(hidden=hidden, mask=mask)[0])
            return (self.norm2(hidden + self.mlp(hidden)),)
        attended, _ = self.attn(hidden=self.norm1(hidden), mask=mask)
        hidden = hidden + attended
        return (hidden + self.mlp(self.norm2(hidden)),)


class Inline(nn.Module):
    """A layer whose forward does the attention itself."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.kind = "full"

    def forward(self, hidden, mask=None):
        q, k, v = self.qkv(self.norm(hidden)).chunk(3, -1)
        return (hidden + self.proj(F.scaled_dot_product_attention(q, k, v)), None)


class Transformer(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.embed, self.layers, self.head = nn.Linear(6, 8), nn.ModuleList(layers), nn.Linear(8, 5)

    def forward(self, x):
        x, mask = self.embed(x), torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
        for layer in self.layers:
            assert layer.kind == "full"  # a parent that asks its layers
            x = layer(x, mask=mask)[0]
        return self.head(x.mean(1))


def prepared(net):
    """In float64 with every affine and statistic drawn at random: fresh networks hide mistakes."""
    torch.manual_seed(0)
    for value in [*net.parameters(), *net.buffers()]:
        if value.is_floating_point():
            nn.init.normal_(value.data, 0, 0.3) if value.ndim > 1 else nn.init.uniform_(value.data, 0.5, 1.5)
    return net.double().eval()


def images(size=6):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens():
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def task_of(net, x):
    targets = torch.arange(len(x)) % 5
    loader = [(x, targets), (x.flip(0), targets)]
    return Task(net, loader, loader, loader, loader, example_inputs=(x,))


def zeroed(net, *paths):
    """A copy whose layers at ``paths``, each the last of its branch, give zero."""
    net = copy.deepcopy(net)
    for path in paths:
        for parameter in net.get_submodule(path).parameters():
            parameter.data.zero_()
    return net


def difference(first, second, x):
    with torch.no_grad():
        return ((first(x) - second(x)).abs().max() / second(x).abs().max()).item()


BASIC = lambda: ConvNet(Basic(8, 8), Basic(8, 8), Basic(8, 12, 2), Basic(12, 12), head=12)  # noqa: E731
NETS = {
    "post-activation": (BASIC, images, {"blocks.0": "blocks.0.bn2", "blocks.3": "blocks.3.bn2"}),
    "inverted": (
        lambda: ConvNet(Inverted(8), Inverted(8), head=8), images,
        {"blocks.0": "blocks.0.conv.4.1", "blocks.1": "blocks.1.conv.4.1"},
    ),
    "convnext": (
        lambda: ConvNet(ConvNeXt(8), ConvNeXt(8), head=8), images,
        {"blocks.0": "blocks.0.fc2", "blocks.1": "blocks.1.fc2"},
    ),
    "pre-activation": (
        lambda: ConvNet(norm_conv(8, 8), PreActivation(8), PreActivation(8), head=8), images,
        {"blocks.1": "blocks.1.last", "blocks.2": "blocks.2.last"},
    ),
    "pre-norm": (
        lambda: Transformer(Layer(8), Layer(8)), tokens,
        {"layers.0.attn": "layers.0.attn.proj", "layers.1.mlp": "layers.1.mlp.2"},
    ),
    "post-norm": (
        lambda: Transformer(Layer(8, post=True), Layer(8, post=True)), tokens,
        {"layers.0.attn": "layers.0.attn.proj", "layers.1.mlp": "layers.1.mlp.2"},
    ),
    "inline": (
        lambda: Transformer(Inline(8), Layer(8)), tokens,
        {"layers.0": "layers.0.proj", "layers.1.attn": "layers.1.attn.proj"},
    ),
}  # fmt: skip


@pytest.fixture(params=NETS)
def case(request):
    make, inputs, lasts = NETS[request.param]
    return prepared(make()), inputs(), lasts


def take_out(net, x, names, **settings):
    """The net without the blocks of these names, and the plan."""
    where = ByName(names[0])
    for name in names[1:]:
        where = where | ByName(name)
    plan = PruneBlocks(len(names), where=where, **settings).plan(net, task_of(net, x))
    assert {name for name, _ in plan.lines} == set(names), plan
    return apply(net, plan), plan


def test_without_its_blocks_a_net_is_the_one_whose_branches_end_in_zeros(case):
    net, x, lasts = case
    shallow, _ = take_out(net, x, list(lasts))
    reference = zeroed(net, *lasts.values())
    assert difference(shallow, reference, x) < 1e-9
    assert difference(shallow, reference, torch.cat([x, -3 * x])[:5]) < 1e-9  # another batch size, other signs
    assert difference(net, reference, x) > 1e-3  # the blocks did something


def test_the_work_is_really_gone(case):
    net, x, lasts = case
    shallow, _ = take_out(net, x, list(lasts))
    weights = [sum(p.numel() for p in model.parameters()) for model in (shallow, net)]
    assert weights[0] < 0.8 * weights[1]
    assert macs(shallow, (x,)).value < 0.8 * macs(net, (x,)).value


def test_a_shallow_net_trains_saves_and_loads(case, tmp_path):
    net, x, lasts = case
    shallow, plan = take_out(net, x, list(lasts))
    save_artifact(tmp_path / "saved", shallow, original=net, plans=[plan])
    fresh = load_artifact(tmp_path / "saved", prepared(copy.deepcopy(net)).requires_grad_(False))
    assert torch.equal(fresh(x), shallow(x))
    shallow.train()(x).square().mean().backward()
    assert all(p.grad is not None for name, p in shallow.named_parameters() if not name.endswith("gamma"))


def test_paths_stay_and_a_placeholder_stands_where_a_block_was():
    net = prepared(BASIC())
    shallow, plan = take_out(net, images(), ["blocks.0", "blocks.3"])
    assert [type(edit) for edit in plan.edits] == [Swap, Swap]  # whole blocks: ReLU of a ReLU is the same
    assert isinstance(shallow.blocks[0], Removed) and isinstance(shallow.blocks[3], Removed)
    assert shallow.blocks[1].conv1.weight is not net.blocks[1].conv1.weight
    assert torch.equal(shallow.blocks[1].conv1.weight, net.blocks[1].conv1.weight)
    x = torch.rand(2, 8, 4, 4)
    assert shallow.blocks[0](x) is x


def test_a_block_that_ends_in_a_relu_of_something_else_keeps_the_relu():
    net = prepared(ConvNet(norm_conv(8, 8), PreActivation(8), head=8))
    shallow, _ = take_out(net, images(), ["blocks.1"])
    assert isinstance(shallow.blocks[1], PreActivation) and isinstance(shallow.blocks[1].last, Removed)
    x = torch.randn(2, 8, 4, 4)
    before = x.clone()
    assert torch.equal(shallow.blocks[1](x), x.relu()) and torch.equal(x, before)


def test_a_layer_goes_as_a_whole_with_its_norms():
    net, x = prepared(Transformer(Layer(8, post=True), Layer(8, post=True), Layer(8))), tokens()
    shallow, plan = take_out(net, x, ["layers.1", "layers.2"], level="layer")
    assert [edit.module for edit in plan.edits] == ["layers.1", "layers.2"]
    without = copy.deepcopy(net)
    del without.layers[1:]
    assert difference(shallow, without, x) == 0


def test_both_branches_of_a_layer_take_the_layer_along():
    net, x = prepared(Transformer(Layer(8), Layer(8))), tokens()
    shallow, plan = take_out(net, x, ["layers.1.attn", "layers.1.mlp"])
    assert [edit.module for edit in plan.edits] == ["layers.1"]
    assert shallow.layers[1].kind == "full"
    assert difference(shallow, zeroed(net, "layers.1.attn.proj", "layers.1.mlp.2"), x) < 1e-9


# Which blocks --------------------------------------------------------------------------------------------------------


def faint(net, path, factor):
    net.get_submodule(path).weight.data *= factor
    net.get_submodule(path).bias.data *= factor


@pytest.mark.parametrize(("score", "weak"), [(Similarity(), 0), (Similarity(), 3), (RelativeNorm(), 1)])
def test_the_block_that_does_least_goes_first(score, weak):
    net, x = prepared(BASIC()), images()
    faint(net, f"blocks.{weak}.bn2", 1e-4)
    plan = PruneBlocks(1, score=score).plan(net, task_of(net, x))
    assert [name for name, _ in plan.lines] == [f"blocks.{weak}"]


def hooked(net, path, x, **more):
    """What a module was given and gave, in both of the task's batches."""
    seen = []
    hook = net.get_submodule(path).register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args[0], output[0])), with_kwargs=True
    )
    with torch.no_grad():
        net(x), net(x.flip(0))
    hook.remove()
    return seen


@pytest.mark.parametrize("level", ["branch", "layer"])
def test_similarity_is_one_minus_the_mean_cosine_over_positions(level):
    net, x = prepared(Transformer(Inline(8))), tokens()
    ((_, line),) = PruneBlocks(1, level=level).plan(net, task_of(net, x)).lines
    cosines = [a[i, j] @ b[i, j] / a[i, j].norm() / b[i, j].norm()
               for a, b in hooked(net, "layers.0", x) for i in range(3) for j in range(5)]  # fmt: skip
    assert float(line.rpartition(" ")[2]) == pytest.approx(1 - sum(cosines).item() / 30, rel=1e-3)


@pytest.mark.parametrize("level", ["branch", "layer"])
def test_relative_norm_is_that_of_what_is_added(level):
    net, x = prepared(Transformer(Inline(8))), tokens()
    ((_, line),) = PruneBlocks(1, score=RelativeNorm(), level=level).plan(net, task_of(net, x)).lines
    shares = [(b[i] - a[i]).norm() / a[i].norm() for a, b in hooked(net, "layers.0", x) for i in range(3)]
    assert float(line.rpartition(" ")[2]) == pytest.approx(sum(shares).item() / 6, rel=1e-3)


def test_loss_increase_is_the_loss_without_less_that_with():
    net, x = prepared(BASIC()), images()
    task = task_of(net, x)
    changes = {
        f"blocks.{n}": sum(
            (F.cross_entropy(zeroed(net, f"blocks.{n}.bn2")(x), y) - F.cross_entropy(net(x), y)).item() / 2
            for x, y in task.calibration
        )
        for n in (0, 1, 3)
    }
    ((name, line),) = PruneBlocks(1, score=LossIncrease()).plan(net, task).lines
    assert name == min(changes, key=changes.__getitem__)
    assert float(line.rpartition(" ")[2]) == pytest.approx(changes[name], rel=1e-3)


@pytest.mark.parametrize("score", [Similarity(), LossIncrease()])
def test_values_that_are_not_finite_are_told(score):
    net = prepared(BASIC())
    bad = [(images() * float("inf"), torch.arange(3))]
    with pytest.raises(TrainingError, match="not finite"):
        PruneBlocks(1, score=score).plan(net, Task(net, calibration=bad, example_inputs=(images(),)))


def test_a_fraction_is_of_the_blocks_that_may_go_rounded_down():
    net = prepared(BASIC())
    for blocks, count in [(0.3, 0), (0.67, 2), (3, 3)]:
        plan = PruneBlocks(blocks).plan(net, task_of(net, images()))
        assert len(plan.lines) == count
        assert plan.edits or any("blocks is none" in skip.reason for skip in plan.skips)


# What stays, and bad input -------------------------------------------------------------------------------------------


def skips(net, x=None, **settings):
    plan = PruneBlocks(0.5, **settings).plan(net, task_of(net, images() if x is None else x))
    return {skip.place: skip.reason for skip in plan.skips}


def test_a_projection_is_skipped_by_name():
    assert "a projection: blocks.2.down" in skips(prepared(BASIC()))["blocks.2"]


def test_a_module_that_stands_in_two_places_stays():
    net = prepared(ConvNet(Inverted(8), Inverted(8), head=8))
    net.again = net.blocks[1].conv
    assert "the same module as another" in skips(net)["blocks.1"]


def test_a_result_that_no_placeholder_can_give_keeps_the_block():
    class Result:
        def __init__(self, value):
            self.value = value

    class Odd(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(width))

        def forward(self, x):
            return Result(x * self.weight[:, None, None])

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Odd(8)

        def forward(self, x):
            return x + self.odd(x).value

    assert skips(prepared(ConvNet(Block(), head=8))) == {"blocks.0": "blocks.0.odd gives Result"}


def test_a_branch_without_modules_stays():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8, 8, 1, 1))

        def forward(self, x):
            return x + F.conv2d(x, self.weight)

    assert "read by the forward itself" in skips(prepared(ConvNet(Block(), head=8)))["blocks.0"]


def test_a_forward_that_asks_a_removed_module_for_more_than_its_result_keeps_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return F.relu(x + self.fc(x) * self.fc.weight.shape[0])

    net = prepared(nn.Sequential(nn.Linear(6, 8), Block(), nn.Linear(8, 5)))
    reason = skips(net, torch.randn(3, 6, dtype=torch.float64))["1"]
    assert "does not run without it" in reason and "weight" in reason


def test_a_branch_that_is_not_zero_when_its_modules_are_is_skipped():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.shift = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

        def forward(self, x):
            return F.relu(x + (self.fc(x) + self.shift))

    net = prepared(nn.Sequential(nn.Linear(6, 8), Block(), nn.Linear(8, 5)))
    assert "differ" in skips(net, torch.randn(3, 6, dtype=torch.float64))["1"]


@pytest.mark.parametrize("blocks", [0, -1, 1.0, 1.5, -0.1, True, "2"])
def test_blocks_out_of_range_are_an_input_error(blocks):
    with pytest.raises(InputError, match="PruneBlocks.blocks"):
        PruneBlocks(blocks)


def test_more_blocks_than_may_go_are_an_error_that_says_how_many_may():
    net = prepared(BASIC())
    with pytest.raises(InputError, match="at most 3"):
        PruneBlocks(4).plan(net, task_of(net, images()))


def test_a_selector_that_means_no_block_is_said():
    net = prepared(BASIC())
    plan = PruneBlocks(where=ByName("head")).plan(net, task_of(net, images()))
    assert not plan.edits and "no residual block" in plan.skips[0].reason
    with pytest.raises(InputError, match="matches no module"):
        PruneBlocks(where=ByName("nonsense")).plan(net, task_of(net, images()))


# Together with the rest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"blocks": 2, "level": "layer"}, PruneBlocks(2, level="layer")),
        ({"blocks": 0.5, "score": {"loss_increase": {"batches": 2}}}, PruneBlocks(0.5, score=LossIncrease(2))),
        ({"blocks": 1, "where": "layers.*"}, PruneBlocks(1, where=ByName("layers.*"))),
    ],
)
def test_a_recipe_names_it(settings, expected):
    data = {"name": "mine", "steps": [{"name": "one", "parts": [{"prune_blocks": settings}]}]}
    (step,) = read_recipe(data).steps
    assert step.step == expected and type(step.step.blocks) is type(expected.blocks)


@pytest.mark.parametrize(
    ("name", "level"), [("post-activation", "branch"), ("pre-norm", "layer"), ("post-norm", "branch")]
)
def test_it_keeps_the_contract_of_a_method(name, level):
    make, inputs, _ = NETS[name]
    net, x = prepared(make()).float(), inputs().float()
    batches = TensorBatches(x, torch.arange(3) % 5, 3)
    task = Task(net, batches, batches, batches, batches)
    result = check_method(PruneBlocks(1, level=level), net, task)
    assert result.plans[0].edits


@pytest.mark.parametrize("level", ["branch", "layer"])
def test_a_run_is_verified_against_the_net_with_its_blocks_switched_off(level):
    net, x = prepared(Transformer(Layer(8, post=True), Layer(8))), tokens()
    result = PruneBlocks(1, level=level).run(net, task_of(net, x))
    assert result.facts["verified"] < 1e-9 and result.plans[0].edits


def test_a_wrong_placeholder_does_not_pass_verification():
    net, x = prepared(Transformer(Layer(8), Layer(8))), tokens()
    task = task_of(net, x)
    plan = PruneBlocks(1, level="layer").plan(net, task)
    zeros = {"output": {"tuple": [{"zeros": [None] * 3}]}}
    twisted = [dataclasses.replace(edit, arguments={**edit.arguments, **zeros}) for edit in plan.edits]
    wrong = dataclasses.replace(plan, edits=tuple(twisted))
    with pytest.raises(VerificationError, match="differs"):
        verify_edits(net, apply(net, wrong), wrong, task)


@pytest.mark.parametrize("name", ["post-activation", "post-norm"])
def test_channels_can_be_pruned_afterwards(name):
    make, inputs, lasts = NETS[name]
    net, x = prepared(make()), inputs()
    shallow, _ = take_out(net, x, list(lasts))
    smaller = PruneChannels(0.5).run(shallow, task_of(shallow, x))
    assert smaller.facts["verified"] < 1e-9
    assert macs(smaller.model, (x,)).value < 0.75 * macs(shallow, (x,)).value


@pytest.mark.parametrize("name", ["post-activation", "pre-norm"])
def test_a_shallow_net_exports_to_onnx(name, tmp_path):
    import onnxruntime

    make, inputs, lasts = NETS[name]
    net, x = prepared(make()), inputs()
    shallow = take_out(net, x, list(lasts))[0].float()
    x = x.float()
    export_onnx(shallow, (x,), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
    assert torch.allclose(torch.from_numpy(got), shallow(x[:2]), rtol=1e-4, atol=1e-5)


# Models of others ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lasts"),
    [
        ("resnet18", {"layer1.0": "bn2", "layer4.1": "bn2"}),
        ("resnet50", {"layer1.2": "bn3", "layer3.5": "bn3"}),
        ("mobilenet_v2", {"features.3": "conv.3", "features.16": "conv.3"}),
        ("mobilenet_v3_small", {"features.3": "block.2.1", "features.8": "block.3.1"}),
        ("convnext_tiny", {"features.1.0": "block.5", "features.5.3": "block.5"}),
    ],
)
def test_torchvision_models_lose_blocks(package, name, lasts):
    net = prepared(getattr(package("torchvision").models, name)(num_classes=5))
    x = images(32)
    shallow, _ = take_out(net, x, list(lasts))
    assert difference(shallow, zeroed(net, *(f"{path}.{last}" for path, last in lasts.items())), x) < 1e-9


def transformer_of(transformers, kind):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4}
    if kind == "llama":
        return prepared(
            transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, use_cache=False)
            )
        )
    return prepared(transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=50)))


HUGGING_FACE = {
    "llama": {"model.layers.0.self_attn": "model.layers.0.self_attn.o_proj",
              "model.layers.2.mlp": "model.layers.2.mlp.down_proj"},
    "bert": {"bert.encoder.layer.0.attention": "bert.encoder.layer.0.attention.output.dense",
             "bert.encoder.layer.2": "bert.encoder.layer.2.output.dense"},
}  # fmt: skip


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face_models_lose_attention_and_feed_forward_parts(package, kind):
    net = transformer_of(package("transformers"), kind)
    x = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    lasts = HUGGING_FACE[kind]
    shallow, _ = take_out(net, x, list(lasts))
    got, expected = shallow(x).logits, zeroed(net, *lasts.values())(x).logits
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


def test_a_causal_model_without_its_first_layer_still_generates_from_its_cache(package):
    net = transformer_of(package("transformers"), "llama")
    x = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    shallow, plan = take_out(net, x, ["model.layers.0", "model.layers.2"], level="layer")
    indices = {edit.module: edit.value for edit in plan.edits if isinstance(edit, Attribute)}
    assert indices == {"model.layers.1.self_attn": 0, "model.layers.3.self_attn": 1}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        shallow.generate(x, use_cache=True, **settings), shallow.generate(x, use_cache=False, **settings)
    )
