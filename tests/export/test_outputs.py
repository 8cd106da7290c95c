"""Models that return more than a tensor: the file of a run gives the one that matters."""

import collections

import onnx
import pytest
import torch
from torch import nn
from torch.utils import _pytree

import tersor
from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.export.onnx import export_onnx
from tersor.export.verify import verify_onnx
from tersor.measure.quality import evaluate
from tersor.measure.session import OnnxRunnable
from tersor.run.measure_step import Timing


class ModelOutput(collections.OrderedDict):
    """As Hugging Face's: a mapping with attributes."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


_pytree.register_pytree_node(
    ModelOutput, lambda x: (list(x.values()), list(x)), lambda values, keys: ModelOutput(zip(keys, values, strict=True))
)


class Net(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.body, self.head, self.answer = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3), answer

    def forward(self, x):
        features = self.body(x)
        return self.answer(features, self.head(features))


ANSWERS = {
    "tensor": (lambda f, y: y, None),
    "dict": (lambda f, y: {"features": f, "logits": y}, None),
    "model output": (lambda f, y: ModelOutput(features=f, logits=y), None),
    "tuple": (lambda f, y: (y, f), None),
    "tuple, second": (lambda f, y: (f, y), lambda result: result[1]),
    "dict, by name": (lambda f, y: {"features": f, "scores": y}, lambda result: result["scores"]),
    "tensor, negated": (lambda f, y: y, lambda result: -result),
}


def task_of(name):
    torch.manual_seed(0)
    answer, output_of = ANSWERS[name]
    x = torch.randn(40, 6)
    data = [(x, torch.arange(40) % 3)]
    return Task(Net(answer).eval(), data, data, data, output_of=output_of).complete()


@pytest.mark.parametrize("name", ANSWERS)
def test_the_file_gives_the_tensor_that_matters_alone(name, tmp_path):
    task = task_of(name)
    file = export_onnx(task.model, task.example_inputs, tmp_path / "model.onnx", output_of=task.output)
    assert file.outputs == ("output",) and file.inputs == ("input",)
    assert [node.name for node in onnx.load(file.path).graph.node if node.op_type == "Gemm"] == ["body.0", "head"]
    assert verify_onnx(file.path, task.model, task, quantized=False)["n"] == 42
    ours, theirs = evaluate(task.model, task), evaluate(OnnxRunnable(file.path, threads=1), task)
    assert ours.predictions.tolist() == theirs.predictions.tolist()


@pytest.mark.parametrize("name", ["dict", "model output", "dict, by name"])
def test_a_run_goes_through(name, tmp_path):
    recipe = {"name": "int8", "steps": [{"name": "quantize", "parts": ["quantize"]}]}
    done = tersor.compress(task_of(name), recipe, tmp_path / "run", timing=Timing(seconds=0.05, threads=1))
    assert [value.name for value in onnx.load(done.folder / "model.onnx").graph.output] == ["output"]
    assert len(done.summary["steps"]) == 1


def test_without_output_of_the_file_keeps_every_output_and_says_what_it_cannot_tell(tmp_path):
    task = task_of("dict, by name")
    file = export_onnx(task.model, task.example_inputs, tmp_path / "model.onnx")
    assert file.outputs == ("output_0", "output_1")
    with pytest.raises(InputError, match=r"2 tensors.*output_of=task.output"):
        verify_onnx(file.path, task.model, task, quantized=False)


def test_exporting_leaves_no_hook_on_the_model(tmp_path):
    task = task_of("dict")
    export_onnx(task.model, task.example_inputs, tmp_path / "model.onnx", output_of=task.output)
    assert not task.model._forward_hooks and isinstance(task.model(task.example_inputs[0]), dict)
