import os
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tersor.core.errors import ArtifactError, InputError
from tersor.core.time_limit import TimeUp, time_limit
from tersor.measure import onnx_cpu
from tersor.measure.onnx_cpu import saturates_int8, tiled
from tersor.measure.session import OnnxRunnable


def test_a_runnable_computes_what_the_file_says(perceptron):
    path = perceptron(layers=1)
    weight = torch.from_numpy(onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0]).copy())
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(OnnxRunnable(path, threads=1)(x), torch.relu(x @ weight), atol=1e-6)


def test_the_optimised_graph_is_written(perceptron, tmp_path):
    OnnxRunnable(perceptron(), optimised_model_path=tmp_path / "optimised.onnx")
    assert onnx.load(tmp_path / "optimised.onnx").graph.node


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="no such ONNX file"):
        OnnxRunnable(tmp_path / "nothing.onnx")


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"not a model" * 20, lambda data: b""]
)
def test_a_damaged_file_says_what_to_do(perceptron, damage):
    path = perceptron()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match="export it again"):
        OnnxRunnable(path)


def test_inputs_that_do_not_fit_are_named(perceptron):
    runnable = OnnxRunnable(perceptron())
    with pytest.raises(InputError, match="another shape"):
        runnable(torch.zeros(2, 9))
    with pytest.raises(InputError, match="wrong number of inputs"):
        runnable(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(InputError, match="int32"):
        runnable(torch.zeros(2, 8, dtype=torch.int32))


def typed(path, kind):
    """A file that takes and gives numbers of one kind."""
    values = [helper.make_tensor_value_info(name, kind, ["n", 2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "typed", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return OnnxRunnable(path)


@pytest.mark.parametrize(
    ("kind", "given", "answer"),
    [
        (TensorProto.FLOAT16, torch.tensor([[1.5, -2.0]]), torch.float16),
        (TensorProto.FLOAT, torch.tensor([[1.5, -2.0]], dtype=torch.float64), torch.float32),
        (TensorProto.INT32, torch.tensor([[3, -4]]), torch.int32),
        (TensorProto.INT64, torch.tensor([[3, -4]], dtype=torch.int32), torch.int64),
    ],
)
def test_numbers_come_in_the_width_that_the_file_declares(tmp_path, kind, given, answer):
    found = typed(tmp_path / "typed.onnx", kind)(given)
    assert found.dtype == answer and torch.equal(found.to(given.dtype), given * given)


def test_infinities_stay_infinite_in_the_files_width(tmp_path):
    given = torch.tensor([[1.5, -torch.inf]])
    assert typed(tmp_path / "half.onnx", TensorProto.FLOAT16)(given).tolist() == [[2.25, torch.inf]]


def test_numbers_that_do_not_fit_in_the_files_width_are_refused(tmp_path):
    with pytest.raises(InputError, match="int64"):
        typed(tmp_path / "narrow.onnx", TensorProto.INT32)(torch.tensor([[2**40, 0]]))
    with pytest.raises(InputError, match="float32"):
        typed(tmp_path / "half.onnx", TensorProto.FLOAT16)(torch.tensor([[1e6, 0.0]]))


def test_a_fixed_batch_dimension_is_named(perceptron):
    with pytest.raises(InputError, match="fixed batch dimension"):
        OnnxRunnable(perceptron(batch=1))(torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "avx2 avx512_vnni", False),
        ("x86_64", "avx2 avx_vnni", False),
        ("x86_64", "avx2", True),
        ("aarch64", "", False),
    ],
)
def test_saturation_is_told_by_the_processors_flags(tmp_path, monkeypatch, machine, flags, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    assert saturates_int8(tmp_path / "cpuinfo") is expected


def test_a_processor_that_cannot_be_read_may_saturate(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    assert saturates_int8(tmp_path / "nothing")


def test_samples_are_repeated_to_a_batch():
    x, table = np.array([[1.0], [2.0]]), np.zeros((5, 1))
    first, second = tiled((x, table), 5)
    assert first.ravel().tolist() == [1, 2, 1, 2, 1] and second is table
    with pytest.raises(InputError):
        tiled((np.zeros((0, 3)),), 2)


@pytest.fixture
def endless(tmp_path):
    """A file with a loop of 2^62 turns."""
    floats = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    goes_on = partial(helper.make_tensor_value_info, elem_type=TensorProto.BOOL, shape=[])
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Identity", ["x"], ["same"])], "body",
        [helper.make_tensor_value_info("turn", TensorProto.INT64, []), goes_on("on"), floats("x", shape=["n", 4])],
        [goes_on("still"), floats("same", shape=["n", 4])],
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Loop", ["turns", "true", "in"], ["out"], body=body)], "graph",
        [floats("in", shape=["n", 4])], [floats("out", shape=["n", 4])],
        [helper.make_tensor("turns", TensorProto.INT64, [], [2**62]),
         helper.make_tensor("true", TensorProto.BOOL, [], [True])],
    )  # fmt: skip
    path = tmp_path / "endless.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    yield path
    onnx_cpu._runners(os.getpid()).shutdown()  # waits for ever where a run was given up and not ended
    onnx_cpu._runners.cache_clear()


def test_a_file_that_never_ends_is_stopped(endless, monkeypatch):
    monkeypatch.setattr(onnx_cpu, "PATIENCE", 0.2)
    with pytest.raises(InputError, match=r"endless\.onnx: .*does not come to an end.* in float32 \[1, 4\]: 0\.2 s"):
        OnnxRunnable(endless)(torch.zeros(1, 4))


def test_an_interrupt_ends_a_run_at_once(endless):
    with pytest.raises(TimeUp), time_limit(0.2):
        OnnxRunnable(endless)(torch.zeros(1, 4))
