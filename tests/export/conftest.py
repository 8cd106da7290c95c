"""Small models with quantisers at every activation, and a task that they have learnt."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Quantizer
from tersor.core.intercept import intercept_at
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.export.onnx import export_onnx
from tersor.graph.trace import trace

ROUNDED = {"conv2d", "linear", "relu", "hardtanh", "add", "adaptive_avg_pool2d", "mean"}


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.short = nn.Conv2d(width, out, 1, stride) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.relu(self.conv1(x))) + self.short(x))


class Residual(nn.Module):
    """A residual CNN as it is after batch norms were folded; ends in ``AdaptiveAvgPool2d``."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1)
        self.layers = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.layers(F.relu(self.stem(x)))), 1))


class Depthwise(nn.Module):
    """Inverted residual with relu6; ends in ``mean((2, 3))``."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.project(F.relu6(self.depthwise(F.relu6(self.expand(x))))).mean((2, 3)))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


class Seen(nn.Module):
    """A tap that notes the range of what passes."""

    low = high = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        return x


def rounded_places(model: nn.Module, inputs: Tensor) -> list[ActivationPlace]:
    """Inputs, and every result that a runtime rounds: not the one that a relu takes right away."""
    graph = trace(model, (inputs[:3],))
    users = graph.users()
    places = [ActivationPlace("", "input", 0)]
    for call in graph.calls:
        readers = users.get(call.name, [])
        fused = call.operator in {"conv2d", "linear", "add"} and {r.operator for r in readers} <= {"relu", "hardtanh"}
        if call.operator in ROUNDED and not (fused and readers):
            places.append(call.place)
    return places


def quantize_plan(model: nn.Module, inputs: Tensor) -> Plan:
    """int8 per channel for weights, uint8 for activations, ranges as seen on ``inputs``."""
    edits: list[Quantizer] = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            scale = module.weight.detach().abs().flatten(1).amax(1).clamp_min(1e-6) / 127
            zeros = torch.zeros(len(scale), dtype=torch.int32)
            edits.append(Quantizer((TensorPlace(path, "weight"),), scale, zeros, -128, 127, axis=0))
    watched, taps = copy.deepcopy(model), {}
    for place in rounded_places(model, inputs):
        taps[place] = Seen()
        intercept_at(watched, place.module).add(place.operator, place.ordinal, taps[place])
    with torch.no_grad():
        watched(inputs)
    for place, tap in taps.items():
        scale = torch.tensor((tap.high - tap.low) / 255)
        zero = torch.round(-tap.low / scale).to(torch.int32)
        edits.append(Quantizer((place,), scale, zero, 0, 255))
    return Plan("quantise by hand", tuple(edits))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four patterns under noise."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 4, (count,), generator=generator)
    return patterns[targets] + 0.5 * torch.randn(count, 1, 8, 8, generator=generator), targets


@pytest.fixture(scope="session")
def make_images():
    return images


@pytest.fixture(scope="session")
def models():
    """The classes, by name."""
    return {"Residual": Residual, "Depthwise": Depthwise, "Mlp": Mlp}


@pytest.fixture(scope="session")
def learnt(models):
    """``learnt(name)``: a copy of the model, trained a little; always the same."""

    @functools.cache
    def train(name: str) -> nn.Module:
        torch.manual_seed(0)
        model = models[name]()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(40):
            inputs, targets = images(32, step + 1)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        return model.eval()

    return lambda name: copy.deepcopy(train(name))


@pytest.fixture(scope="session")
def quantized():
    """``quantized(model)`` → (fake-quantised copy, the plan that made it)."""

    def make(model: nn.Module) -> tuple[nn.Module, Plan]:
        plan = quantize_plan(model, images(64, 999)[0])
        return apply(model, plan).eval(), plan

    return make


@pytest.fixture(scope="session")
def files(learnt, quantized, tmp_path_factory):
    """``files(name, int8)``: the exported file of a learnt model, and the model that it was made of."""

    @functools.cache
    def make(name: str, int8: bool) -> tuple[Path, nn.Module]:
        model = quantized(learnt(name))[0] if int8 else learnt(name)
        path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
        return export_onnx(model, (torch.randn(2, 1, 8, 8),), path).path, model

    return make


@pytest.fixture(scope="session")
def task_of():
    def make(model: nn.Module) -> Task:
        inputs, targets = images(300, 1000)
        validation = [(inputs[:128], targets[:128]), (inputs[128:], targets[128:])]
        return Task(model, validation=validation, example_inputs=(inputs[:2],))

    return make
