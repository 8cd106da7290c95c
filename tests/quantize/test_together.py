"""Prune, distil, quantise, train on, ship: what was zero or gone stays so all the way into the files."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tersor.core.step import Pipeline
from tersor.core.task import Task
from tersor.distill.response import Distill
from tersor.export.artifact import load_artifact, save_artifact
from tersor.export.onnx import export_onnx
from tersor.measure.session import OnnxRunnable
from tersor.measure.size import effective_weights
from tersor.prune.sparse.patterns import NM
from tersor.prune.sparse.prune import Prune
from tersor.prune.structured.channels import PruneChannels
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.zoo.batches import TensorBatches


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(12 * 9, 16), nn.ReLU(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 3, 6, 6, generator=generator)
    batches = TensorBatches(images, images.mean((2, 3)).argmax(1), 16)
    return Task(network(), batches, batches, batches).complete()


def zeros_of(model):
    return {str(place): tensor == 0 for place, tensor in effective_weights(model) if tensor.ndim > 1}


TAUGHT = Finetune(epochs=1, objective=Distill(), optimizer=Optimizer(lr=0.01), keep="last")
CASES = {
    "elements at 4 bits": (Prune(0.6), Int(4)),
    "2:4 with zero points": (Prune(pattern=NM(2, 4)), Int(8, "per_tensor", symmetric=False)),
    "channels at 8 bits": (PruneChannels(sparsity=0.5), Int(8)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_pruning_took_stays_away_through_distillation_quantisation_training_and_the_files(task, case, tmp_path):
    pruning, scheme = CASES[case]
    pruned = pruning.run(task.model, task)
    gone = zeros_of(pruned.model)
    assert isinstance(pruning, PruneChannels) or any(zeros.any() for zeros in gone.values())
    after = Pipeline((TAUGHT, FoldBatchNorm(), Quantize(weights=scheme), TAUGHT)).run(pruned.model, task)
    model, now = after.model, zeros_of(after.model)
    assert now.keys() == gone.keys(), "no layer has come or gone"
    for name, zeros in gone.items():
        assert now[name].shape == zeros.shape and bool((now[name] | ~zeros).all()), name
    if isinstance(pruning, PruneChannels):
        assert now["3.weight"].shape[:2] == (6, 4)

    save_artifact(tmp_path / "artifact", model, original=task.model, plans=(*pruned.plans, *after.plans))
    loaded = load_artifact(tmp_path / "artifact", network())
    for name, zeros in zeros_of(loaded).items():
        assert torch.equal(zeros, now[name]), name

    path = tmp_path / "model.onnx"
    export_onnx(model, task.example_inputs, path)
    nodes = onnx.load(path).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in nodes.initializer}
    stored = [arrays[node.input[0]] for node in nodes.node if node.op_type == "DequantizeLinear"
              and node.input[0] in arrays and arrays[node.input[0]].ndim > 1]  # fmt: skip
    points = [int(arrays[node.input[2]].flat[0]) for node in nodes.node if node.op_type == "DequantizeLinear"
              and node.input[0] in arrays and arrays[node.input[0]].ndim > 1]  # fmt: skip
    assert len(stored) == len(gone) and all(array.dtype in (np.int8, np.uint8) for array in stored)
    zeros_in_file = sum(int((array == point).sum()) for array, point in zip(stored, points, strict=True))
    assert zeros_in_file == sum(int(zeros.sum()) for zeros in now.values())
    images = torch.cat([batch[0] for batch in task.validation])
    with torch.no_grad():
        expected = model(images)
    assert (OnnxRunnable(path)(images) - expected).abs().max() < 0.05 * expected.abs().max()
