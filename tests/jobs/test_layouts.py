"""Advice on the layout of images: both are really run, and the sentence says what was measured."""

import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import tersor
from tersor.core.errors import InputError, VerificationError
from tersor.core.measurement import Measurement
from tersor.jobs.layouts import LAST, advice
from tersor.measure.benchmark import Conditions
from tersor.measure.benchmark_schema import Comparison
from tersor.measure.opened import Inputs
from tersor.measure.opened_module import OpenedModule

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def convolutional(last):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), last, nn.Linear(8 * 64, 4)).eval()


class View(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


class AsItLies(nn.Module):
    """Reads its numbers in the order of memory, whatever the axes mean."""

    def forward(self, x):
        return torch.as_strided(x, (len(x), x[0].numel()), (x[0].numel(), 1))


class Strides(nn.Module):
    """Notes the strides of what it is given, and of a weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.table, self.seen = nn.Conv2d(3, 8, 3), nn.Embedding(5, 2), []

    def forward(self, x, ids):
        self.seen.append((x.stride(), self.conv.weight.stride()))
        return self.conv(x).mean((2, 3)) + self.table(ids).sum(1)[:, :1]


@pytest.mark.parametrize("last", [False, True])
def test_weights_and_images_lie_as_they_are_said_to(last, tmp_path):
    model, ids = Strides(), torch.zeros(2, 7, dtype=torch.long)
    save_file({"0": IMAGES.numpy(), "1": ids.numpy()}, tmp_path / "inputs.safetensors")
    spec = {"device": "cpu", "dtype": None, "compiled": False, "channels_last": last}
    opened = OpenedModule(model, Inputs.read(str(tmp_path / "inputs.safetensors")), spec, "model")
    opened.move()
    opened.call(4).checked()
    ((x, weight),) = model.seen
    assert (x[1], weight[1]) == ((1, 1) if last else (144, 9))


def test_both_layouts_are_timed_and_the_model_is_left_as_it_was():
    model = convolutional(nn.Flatten())
    (found,) = tersor.layouts(model, (IMAGES,), conditions=Conditions((3,), (1,), seconds=0.1, window=0, starts=0))
    assert found.batch == 3 and found.advice.endswith("at batch 3, 1 thread") or found.verdict == "faster"
    assert found.channels_first.value > 0 and found.channels_last.value > 0 and found.channels_last.unit == "ms"
    ratio = found.channels_first.value / found.channels_last.value
    assert 0.5 * ratio < found.speedup.value < 2 * ratio
    assert model[2].weight.is_contiguous() and not model[2].weight.is_contiguous(memory_format=torch.channels_last)


def comparison(verdict, sentence, value):
    speedup = Measurement(value, "×", value - 0.1, value + 0.1, 9)
    return Comparison(
        base="channels first",
        model=LAST,
        batch=8,
        threads=2,
        speedup=speedup,
        p=0.5,
        verdict=verdict,
        sentence=sentence,
    )


def test_only_what_is_shown_to_be_faster_is_advised():
    said = advice(comparison("faster", "faster by 1.4× (1.3–1.5)", 1.4))
    assert said.startswith("channels-last is faster by 1.4× (1.3–1.5) at batch 8, 2 threads: model.to(")
    for verdict in ("slower", "no difference shown", "too noisy to tell"):
        said = advice(comparison(verdict, f"{verdict} (…)", 1.0))
        assert said.startswith("leave the model as it is") and verdict in said


def test_models_to_which_it_is_no_matter_and_that_cannot_run_so_are_refused():
    with pytest.raises(InputError, match="no matter here"):
        tersor.layouts(nn.Linear(3, 2), (torch.randn(2, 3),))
    with pytest.raises(InputError, match="cannot be run channels-last.*view"):
        tersor.layouts(convolutional(View()), (IMAGES,))
    with pytest.raises(VerificationError, match="gives something else"):
        tersor.layouts(convolutional(AsItLies()), (IMAGES,))
