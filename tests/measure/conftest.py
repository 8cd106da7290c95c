from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture
def perceptron(tmp_path):
    """Writes an ONNX file of ``layers`` square matrix products with ReLU: input x [batch, width]."""

    def write(name: str = "model", width: int = 8, layers: int = 2, batch: int | str = "batch") -> Path:
        random = np.random.default_rng(0)
        nodes, weights, last = [], [], "x"
        for n in range(layers):
            weight = random.standard_normal((width, width)).astype(np.float32) / width**0.5
            weights.append(numpy_helper.from_array(weight, f"w{n}"))
            nodes.append(helper.make_node("MatMul", [last, f"w{n}"], [f"m{n}"]))
            nodes.append(helper.make_node("Relu", [f"m{n}"], [f"r{n}"]))
            last = f"r{n}"
        x, y = (helper.make_tensor_value_info(v, TensorProto.FLOAT, [batch, width]) for v in ("x", last))
        graph = helper.make_graph(nodes, name, [x], [y], weights)
        path = tmp_path / f"{name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        return path

    return write
