import collections
import contextlib
import copy
import os

import onnx
import onnxruntime
import pytest
import torch

from tersor.core.fake_quantize import FakeQuantize


class Deployed:
    """A quantised model in ONNX Runtime; ``histogram``: the operators of the graph that it really runs."""

    def __init__(self, model, example, folder):
        model = copy.deepcopy(model).eval()
        for module in model.modules():
            if isinstance(module, FakeQuantize):
                module.freeze_numbers()
        batch = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(model, (example,), dynamic_shapes=batch, strict=False)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            torch.onnx.export(program, dynamo=True, verbose=False).save(str(folder / "model.onnx"))
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        nodes = onnx.load(options.optimized_model_filepath).graph.node
        self.histogram = collections.Counter(node.op_type for node in nodes)

    def __call__(self, x):
        return torch.tensor(self.session.run(None, {self.session.get_inputs()[0].name: x.numpy()})[0])


@pytest.fixture
def deploy(tmp_path):
    """deploy(model, example) → the model in ONNX Runtime."""
    return lambda model, example: Deployed(model, example, tmp_path)
