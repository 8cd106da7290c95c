"""Channels removed from nets of many shapes: the shrunk net is the masked one, to the last digits of float64."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Slice
from tersor.core.errors import VerificationError
from tersor.core.task import Task
from tersor.core.verify import verify_edits
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import Random


def conv(inputs, outputs, size=3, stride=1, groups=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Basic(nn.Module):
    """ResNet's block; its projection where the shape changes."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, 3, stride), conv(outputs, outputs)
        self.down = conv(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x):
        out = self.conv2(F.relu(self.conv1(x)))
        out += self.down(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    """ResNeXt's block: a grouped convolution between two 1×1."""

    def __init__(self, width, inner, groups=4):
        super().__init__()
        self.a, self.b, self.c = conv(width, inner, 1), conv(inner, inner, 3, 1, groups), conv(inner, width, 1)

    def forward(self, x):
        return F.relu(x + self.c(F.relu(self.b(F.relu(self.a(x))))))


class Dense(nn.Module):
    """DenseNet's block: norm before convolution, everything before it concatenated."""

    def __init__(self, inputs, growth, layers):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(inputs + i * growth) for i in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(inputs + i * growth, growth, 3, padding=1) for i in range(layers))

    def forward(self, x):
        features = [x]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)


class Inverted(nn.Module):
    """MobileNetV3's block: expand, depthwise, squeeze and excite, project."""

    def __init__(self, width, expanded):
        super().__init__()
        self.expand, self.depth = conv(width, expanded, 1), conv(expanded, expanded, 3, 1, expanded)
        self.fc1, self.fc2 = nn.Conv2d(expanded, 4, 1), nn.Conv2d(4, expanded, 1)
        self.project = conv(expanded, width, 1)

    def forward(self, x):
        out = F.hardswish(self.depth(F.hardswish(self.expand(x))))
        gate = F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(out, 1)))))
        return x + self.project(out * gate)


class Shuffle(nn.Module):
    """ShuffleNet's block: half passes, half is worked on, then channels are shuffled by view and transpose."""

    def __init__(self, width):
        super().__init__()
        half = width // 2
        self.a, self.b, self.c = conv(half, half, 1), conv(half, half, 3, 1, half), conv(half, half, 1)

    def forward(self, x):
        kept, worked = x.chunk(2, dim=1)
        x = torch.cat([kept, F.relu(self.c(self.b(F.relu(self.a(worked)))))], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(batch, channels, height, width)


class Inception(nn.Module):
    """Branches of unequal width, concatenated."""

    def __init__(self, inputs):
        super().__init__()
        self.a, self.b1, self.b2, self.c = conv(inputs, 4, 1), conv(inputs, 6, 1), conv(6, 8), conv(inputs, 4, 1)

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, 1, 1)
        return F.relu(torch.cat([self.a(x), self.b2(F.relu(self.b1(x))), self.c(pooled)], 1))


class Halves(nn.Module):
    """Channels split by a share of their number, one half gating the other; depthwise with a multiplier."""

    def __init__(self, width):
        super().__init__()
        self.wide, self.multiply = conv(width, 2 * width, 1), nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        self.back = nn.Conv2d(2 * width, width, 1)
        self.slopes = nn.PReLU(width)

    def forward(self, x):
        wide = self.wide(x)
        count = wide.shape[1] // 2
        gated = wide[:, :count] * torch.sigmoid(wide[:, count:])
        return self.slopes(self.back(F.glu(torch.cat([self.multiply(gated)] * 2, 1), dim=1)) + x)


class Upscale(nn.Module):
    """Transposed convolution, pixel shuffle, resizing and a shared module called twice."""

    def __init__(self, width):
        super().__init__()
        self.up, self.more = nn.ConvTranspose2d(width, 12, 2, 2), nn.Conv2d(12, 24, 1)
        self.shared, self.norm, self.last = (
            nn.Conv2d(6, 6, 1),
            nn.InstanceNorm2d(6, affine=True),
            nn.Conv2d(6, width, 1),
        )

    def forward(self, x):
        out = F.pixel_shuffle(self.more(F.relu(self.up(x))), 2)
        out = self.norm(self.shared(torch.tanh(self.shared(out))))
        return self.last(F.interpolate(out, scale_factor=0.5, mode="bilinear"))


class Padded(nn.Module):
    """ResNet's parameter-free shortcut: subsampled and padded with zero channels."""

    def __init__(self, inputs):
        super().__init__()
        self.conv, self.after = conv(inputs, 2 * inputs, 3, 2), nn.Conv2d(2 * inputs, inputs, 1)
        self.half = inputs // 2

    def forward(self, x):
        return self.after(F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.half, self.half))))


class Classifier(nn.Module):
    """A stem, a body, and a linear head over flattened positions."""

    def __init__(self, width, *body):
        super().__init__()
        self.stem, self.body = conv(3, width), nn.Sequential(*body)
        out = self.body(self.stem(torch.zeros(2, 3, 8, 8))).shape[1]
        self.fc1, self.fc2 = nn.Linear(4 * out, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.body(F.relu(self.stem(x))), 2)
        return self.fc2(F.gelu(self.fc1(torch.flatten(x, 1))))


NETS = {
    "plain": lambda: Classifier(8),
    "residual": lambda: Classifier(8, Basic(8, 8), Basic(8, 12, 2)),
    "bottleneck": lambda: Classifier(8, Bottleneck(8, 16), Bottleneck(8, 16)),
    "dense": lambda: Classifier(8, Dense(8, 4, 3), conv(20, 10, 1)),
    "inverted": lambda: Classifier(8, Inverted(8, 16), Inverted(8, 24)),
    "shuffle": lambda: Classifier(16, Shuffle(16), Shuffle(16)),
    "inception": lambda: Classifier(8, Inception(8), Inception(16)),
    "halves": lambda: Classifier(8, Halves(8)),
    "upscale": lambda: Classifier(8, Upscale(8)),
    "padded": lambda: Classifier(8, Padded(8)),
}


def randomised(net, seed=0):
    """Every affine, slope and running statistic drawn anew: fresh ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if value.is_floating_point() and value.ndim == 1:
            drawn = torch.rand(value.shape, generator=generator)
            positive = name.endswith(("var", "bias"))  # biases too, so that few channels are dead after a relu
            value.data = drawn + 0.5 if positive else 2 * drawn - 1
    return net.double().eval()


def task_of(net):
    return Task(net, example_inputs=(torch.randn(2, 3, 8, 8, dtype=torch.float64),))


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


def check_attributes(shrunk):
    """Sizes that modules remember are those of their tensors."""
    for module in shrunk.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.ConvTranspose2d):
            assert module.weight.shape[:2] == (module.in_channels, module.out_channels)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            assert len(module.weight) == module.num_features
        elif isinstance(module, nn.PReLU):
            assert len(module.weight) == module.num_parameters


@pytest.mark.parametrize("name", NETS)
def test_the_shrunk_net_is_the_masked_net_and_trains_on(name):
    torch.manual_seed(0)
    net = randomised(NETS[name]())
    task = task_of(net)
    before = copy.deepcopy(net.state_dict())
    plan = PruneChannels(sparsity=0.5, score=Random()).plan(net, task)
    shrunk = apply(net, plan)
    assert verify_edits(net, shrunk, plan, task, tolerance=1e-9) < 1e-9
    assert count(shrunk) < 0.75 * count(net)
    check_attributes(shrunk)
    assert not [skip for skip in plan.skips if "literal" in skip.reason]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    shrunk.train()(*task.example_inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in shrunk.parameters())


@pytest.mark.parametrize("role", ["producer", "consumer", "bystander"])
def test_a_wrong_index_is_caught(role):
    torch.manual_seed(0)
    net = randomised(NETS["residual"]())
    task = task_of(net)
    plan = PruneChannels(sparsity=0.5, score=Random()).plan(net, task)
    removal, *rest = plan.edits
    assert isinstance(removal, Slice)
    cuts = list(removal.cuts)
    number = next(i for i, cut in enumerate(cuts) if cut.role == role)
    size = getattr(net.get_submodule(cuts[number].place.module), cuts[number].place.tensor).shape[cuts[number].dim]
    gone = sorted(set(range(size)) - set(cuts[number].keep.tolist()))
    wrong = cuts[number].keep.clone()
    wrong[0] = gone[0]
    cuts[number] = dataclasses.replace(cuts[number], keep=wrong.sort().values)
    tampered = dataclasses.replace(plan, edits=(Slice(tuple(cuts)), *rest))
    with pytest.raises(VerificationError):
        verify_edits(net, apply(net, tampered), tampered, task)


def test_masking_the_readers_by_hooks_gives_the_same():
    """A reference that knows nothing of edits: zeros on the way into each layer."""
    torch.manual_seed(0)
    net = randomised(NETS["inverted"]())
    task = task_of(net)
    plan = PruneChannels(sparsity=0.5, score=Random()).plan(net, task)
    masked = copy.deepcopy(net)
    for cut in plan.edits[0].cuts:
        if cut.role == "consumer":
            module = masked.get_submodule(cut.place.module)
            keep = torch.zeros(module.weight.shape[1], dtype=torch.float64).index_fill_(0, cut.keep, 1.0)
            shape = (1, -1, 1, 1) if isinstance(module, nn.Conv2d) else (1, -1)
            module.register_forward_pre_hook(lambda _, args, keep=keep.reshape(shape): (args[0] * keep,))
    expected = masked(*task.example_inputs)
    got = apply(net, plan)(*task.example_inputs)
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


BLOCKS = {
    "basic": lambda width: Basic(width, width),
    "wider": lambda width: Basic(width, width + 4),
    "bottleneck": lambda width: Bottleneck(width, 8),
    "dense": lambda width: Dense(width, 4, 2),
    "inverted": lambda width: Inverted(width, width),
    "shuffle": Shuffle,
    "halves": Halves,
}


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=2, max_size=4), sparsity=st.sampled_from([0.25, 0.5, 0.8])
)
def test_any_chain_of_blocks_shrinks_exactly(names, sparsity):
    torch.manual_seed(0)
    body, width = [], 8
    for name in names:
        block = BLOCKS[name](width)
        width = block(torch.zeros(2, width, 4, 4)).shape[1]
        body.append(block)
    net = randomised(Classifier(8, *body))
    task = task_of(net)
    plan = PruneChannels(sparsity=sparsity, score=Random()).plan(net, task)
    assert verify_edits(net, apply(net, plan), plan, task, tolerance=1e-9) < 1e-9
    assert not [skip for skip in plan.skips if "literal" in skip.reason]


def test_what_a_module_keeps_in_a_dictionary_is_made_anew():
    """timm's attentions keep their biases by device while they do not train: neither capture nor surgery may leave a
    stale one there."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bias, self.last = nn.Linear(3, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 2)
            self.cache = {}

        def train(self, mode=True):
            if mode:
                self.cache = {}
            return super().train(mode)

        def forward(self, x):
            if "cpu" not in self.cache:
                self.cache["cpu"] = self.bias * 2
            return self.last(self.first(x) + self.cache["cpu"])

    net, x = Cached().eval(), torch.randn(4, 3)
    expected = net(x)
    small = PruneChannels(0.5, multiple_of=1).run(net, Task(net, example_inputs=(x,))).model
    assert small.first.out_features == 4 and small(x).shape == (4, 2)
    assert torch.equal(net(x), expected)
