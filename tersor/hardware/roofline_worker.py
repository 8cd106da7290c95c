"""The fresh process of ``this_roofline``: time large products and reads of arrays, through what the product runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from tersor.measure.fresh_process import Tick, serve
from tersor.measure.onnx_cpu import open_session

SIDE = 512  # of the square matrices: a product takes a millisecond or so
SECONDS, FEWEST, MOST = 1.0, 9, 2000  # of timing for each, and how many calls
READS = (2**20, 2**22, 2**24, 2**26, 2**28)  # bytes of the arrays that are read


def measure(request: dict[str, Any], tick: Tick) -> dict[str, Any]:
    """{"peaks": precision → operations, seconds, through; "bandwidths": bytes, seconds of each size}."""
    threads = int(request["threads"])
    torch.set_num_threads(threads)
    side = int(request.get("side", SIDE))
    reads = tuple(request.get("reads", READS))
    seconds = float(request.get("seconds", SECONDS))
    peaks = {}
    with TemporaryDirectory() as folder, torch.no_grad():
        for name, through, product in (
            ("fp32", "ONNX Runtime MatMul", _onnx_product(Path(folder), side, threads, integer=False)),
            ("bf16", "torch matmul", _torch_product(side)),
            ("int8", "ONNX Runtime MatMulInteger", _onnx_product(Path(folder), side, threads, integer=True)),
        ):
            peaks[name] = {"operations": 2 * side**3, "seconds": _timed(product, seconds), "through": through}
            tick()
        speeds = []
        for size in reads:
            speeds.append({"bytes": size, "seconds": _timed(_reading(size), seconds)})
            tick()
    return {"peaks": peaks, "bandwidths": speeds}


def _timed(work: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of single calls, for about so long; short ones, so that some are not disturbed on a machine in use."""
    work()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < FEWEST or (time.perf_counter() < end and len(found) < MOST):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def _onnx_product(folder: Path, side: int, threads: int, *, integer: bool) -> Callable[[], Any]:
    """a [side, side] · b [side, side] with b a constant, as weights are."""
    random = np.random.default_rng(0)
    kind, result = (TensorProto.UINT8, TensorProto.INT32) if integer else (TensorProto.FLOAT, TensorProto.FLOAT)
    types = (np.uint8, np.int8) if integer else (np.float32, np.float32)
    a, b = (random.integers(0, 127, (side, side)).astype(each) for each in types)
    node = helper.make_node("MatMulInteger" if integer else "MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("a", kind, [side, side])],
        [helper.make_tensor_value_info("c", result, [side, side])], [onnx.numpy_helper.from_array(b, "b")],
    )  # fmt: skip
    path = folder / f"{integer}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    session = open_session(path, threads=threads)
    return lambda: session.run(None, {"a": a})


def _torch_product(side: int) -> Callable[[], Any]:
    a, b = (torch.randn(side, side).to(torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def _reading(size: int) -> Callable[[], Any]:
    """A matrix times a vector: each number of the matrix is read once, as linear layers read weights at batch 1."""
    columns = 1024
    matrix, vector = torch.randn(size // (4 * columns), columns), torch.randn(columns)
    return lambda: matrix @ vector


if __name__ == "__main__":
    serve(measure)
