"""What each layer takes: every convolution and product is found in what ONNX Runtime really ran."""

import pytest
import torch
from torch import nn

from tersor.core.errors import ArtifactError, InputError
from tersor.core.task import Task
from tersor.export.onnx import export_onnx
from tersor.measure.layer_latency import layer_latency
from tersor.quantize.quantize import Quantize


class Net(nn.Module):
    """Convolutions with and without an activation function after them, an addition, a layer called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 5, padding=2)
        self.plain, self.twice, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.wide(x).relu() + self.plain(x)).relu()
        return self.head(self.twice(self.twice(x).relu()).mean((2, 3)))


def test_every_layer_is_timed_in_float_and_in_integers(tmp_path):
    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(4, 3, 24, 24)
    batches = [(images, torch.arange(4))]
    task = Task(model, batches, batches, batches).complete()
    files = {}
    for name, each in (("float", model), ("integers", Quantize(learn=False).run(model, task).model)):
        files[name] = tmp_path / f"{name}.onnx"
        export_onnx(each, task.example_inputs, files[name])
    found = layer_latency(files, (images[:1],), batch=4, threads=1, runs=20)
    for times in found.values():
        assert times.keys() == {"stem", "wide", "plain", "twice", "head"} and min(times.values()) >= 0
        assert times["wide"] > times["plain"], "25 times the work"
    with pytest.raises(InputError, match="nothing to time"):
        layer_latency(files, (images[:1],), runs=0)
    with pytest.raises(ArtifactError, match="no such ONNX file"):
        layer_latency({"gone": tmp_path / "gone.onnx"}, (images[:1],))
