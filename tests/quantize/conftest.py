import collections
import contextlib
import copy
import os

import onnx
import onnxruntime
import pytest
import torch


class Deployed:
    """A quantised model, as ``torch.onnx.export`` writes it, in ONNX Runtime.

    ``histogram``: the operators of the graph that it really runs.
    """

    def __init__(self, model, example, folder):
        batch = ({0: torch.export.Dim("batch")},)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            program = torch.onnx.export(
                copy.deepcopy(model).eval(), (example,), dynamic_shapes=batch, dynamo=True, verbose=False
            )
        program.save(str(folder / "model.onnx"))
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
