"""Prune, distil, quantise, train on, ship: what was zero or gone stays so all the way into the files."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tersor.core.edit import Mask
from tersor.core.step import Pipeline
from tersor.core.task import Task
from tersor.distill.response import Distill
from tersor.export.artifact import load_artifact, save_artifact
from tersor.export.onnx import export_onnx
from tersor.measure.session import OnnxRunnable
from tersor.measure.size import effective_weights
from tersor.prune.sparse.gradual import GradualSparsity
from tersor.prune.sparse.learnt_mask import LearnMasks
from tersor.prune.sparse.patterns import NM
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.scopes import ErdosRenyi
from tersor.prune.structured.channels import PruneChannels
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.freeze import FreezeScales
from tersor.quantize.oscillation import FreezeOscillation
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int
from tersor.quantize.spread import ScaleSpread
from tersor.train.conflict import Conflict
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.train.together import Together
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

    expect_the_same_zeros_in_the_files(task, model, (*pruned.plans, *after.plans), tmp_path)


def expect_the_same_zeros_in_the_files(task, model, plans, folder):
    now = zeros_of(model)
    save_artifact(folder / "artifact", model, original=task.model, plans=plans)
    loaded = load_artifact(folder / "artifact", network())
    for name, zeros in zeros_of(loaded).items():
        assert torch.equal(zeros, now[name]), name

    path = folder / "model.onnx"
    export_onnx(model, task.example_inputs, path)
    nodes = onnx.load(path).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in nodes.initializer}
    for node in nodes.node:
        if node.op_type == "Cast" and node.input[0] in arrays:  # four bits, widened when the file is loaded
            arrays[node.output[0]] = arrays[node.input[0]].astype(np.int8)
    stored = [arrays[node.input[0]] for node in nodes.node if node.op_type == "DequantizeLinear"
              and node.input[0] in arrays and arrays[node.input[0]].ndim > 1]  # fmt: skip
    points = [int(arrays[node.input[2]].flat[0]) for node in nodes.node if node.op_type == "DequantizeLinear"
              and node.input[0] in arrays and arrays[node.input[0]].ndim > 1]  # fmt: skip
    assert len(stored) == len(now) and all(array.dtype in (np.int8, np.uint8) for array in stored)
    zeros_in_file = sum(int((array == point).sum()) for array, point in zip(stored, points, strict=True))
    assert zeros_in_file == sum(int(zeros.sum()) for zeros in now.values())
    images = torch.cat([batch[0] for batch in task.validation])
    with torch.no_grad():
        expected = model(images)
    assert (OnnxRunnable(path)(images) - expected).abs().max() < 0.05 * expected.abs().max()


MASKING = {
    "gradually": GradualSparsity(Prune(0.6, scope=ErdosRenyi()), end=0.5, updates=3),
    "2:4, gradually": GradualSparsity(Prune(pattern=NM(2, 4)), end=0.5, updates=3),
    "learnt": LearnMasks(0.6, end=0.5),
}


@pytest.mark.parametrize("masking", MASKING)
def test_zeros_and_integers_are_learnt_at_once_and_harden(task, masking, tmp_path):
    quantised = Pipeline((FoldBatchNorm(), Quantize(weights=Int(4)))).run(task.model, task)
    companions = (MASKING[masking], FreezeScales(0.7), FreezeOscillation(0.2, 0.05, momentum=0.3))
    objective = Conflict(Distill() + 0.1 * ScaleSpread(), damp=True)
    training = Finetune(
        epochs=4, objective=objective, optimizer=Optimizer("adamw", lr=0.01), companion=Together(companions)
    )
    result = training.run(quantised.model, task)
    wanted = MASKING[masking].expected(quantised.model, task)
    masks = {edit.place: edit.keep for plan in result.plans for edit in plan.edits if isinstance(edit, Mask)}
    assert masks.keys() >= {edit.place for edit in wanted.edits}
    assert sum(int((~keep).sum()) for keep in masks.values()) == sum(int((~edit.keep).sum()) for edit in wanted.edits)
    now = zeros_of(result.model)
    for place, keep in masks.items():
        assert bool((now[str(place)] | keep).all()), place
    noted = result.history[-1]["noted"]
    assert noted["frozen weights"] > 0 and -1 <= noted["cosine Distill, ScaleSpread"] <= 1
    if masking == "learnt":
        expect_the_same_zeros_in_the_files(task, result.model, (*quantised.plans, *result.plans), tmp_path)
