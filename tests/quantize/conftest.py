import collections
import contextlib
import copy
import os

import onnx
import onnxruntime
import pytest
import torch

from tersor.export.onnx import export_onnx


class Deployed:
    """An ONNX file in ONNX Runtime. ``histogram``: the operators of the graph that it really runs."""

    def __init__(self, file):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(file.with_suffix(".optimised.onnx"))
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
        self.histogram = collections.Counter(node.op_type for node in nodes)

    def __call__(self, x):
        return torch.tensor(self.session.run(None, {self.session.get_inputs()[0].name: x.numpy()})[0])


@pytest.fixture
def deploy(tmp_path):
    """deploy(model, example) → the model, as the user's own ``torch.onnx.export`` writes it, in ONNX Runtime."""

    def written(model, example):
        batch = ({0: torch.export.Dim("batch")},)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            program = torch.onnx.export(
                copy.deepcopy(model).eval(), (example,), dynamic_shapes=batch, dynamo=True, verbose=False
            )
        program.save(str(tmp_path / "model.onnx"))
        return Deployed(tmp_path / "model.onnx")

    return written


@pytest.fixture
def ship(tmp_path):
    """ship(model, example) → the model, as ``export_onnx`` writes it, in ONNX Runtime."""
    return lambda model, example: Deployed(export_onnx(model, (example,), tmp_path / "shipped.onnx").path)
