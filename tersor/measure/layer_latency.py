"""What each layer of a model takes inside ONNX Runtime: its kernels' own times, of several files in turns."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import onnx
import onnxruntime
from onnx import ModelProto, NodeProto
from torch import Tensor

from tersor.core.errors import InputError
from tersor.measure.onnx_cpu import default_threads, feed_of, profiled_session, run_session, tiled

WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")
_TICK = "_kernel_time"
_WARM_UP = 3


def layer_latency(
    files: Mapping[str, Path],
    inputs: tuple[Tensor, ...],
    *,
    batch: int = 1,
    threads: int | None = None,
    runs: int = 30,
) -> dict[str, dict[str, float]]:
    """file → layer → milliseconds: the median over ``runs`` of its convolution or product, as it really runs.

    ``files``: as ``export_onnx`` writes them, where each convolution and product bears its module's path. What is fused
    with it (an activation function, an addition) counts as its own; conversions to integers and back do not. Runs of
    the files alternate. A layer that is called several times is counted with all of its calls. A layer that cannot be
    told apart in what ran (transposed away, merged with another) is missing. Raises InputError for fewer than one run,
    and where the inputs do not fit.
    """
    if runs < 1 or not files:
        raise InputError("nothing to time", where="layer_latency", got=f"{len(files)} files, {runs=}")
    arrays = tiled(tuple(value.detach().cpu().numpy() for value in inputs), batch)
    with tempfile.TemporaryDirectory() as folder:
        sessions, feeds, layers = {}, {}, {}
        for number, (name, path) in enumerate(files.items()):
            prefix = Path(folder) / str(number)
            sessions[name] = profiled_session(path, threads=threads or default_threads(), prefix=prefix)
            feeds[name] = feed_of(sessions[name], arrays, f"layer_latency, {path}")
            layers[name] = _kernels(onnx.load(path, load_external_data=False))
        for _ in range(_WARM_UP + runs):
            for name, session in sessions.items():
                run_session(session, feeds[name], f"layer_latency, {files[name]}")
        return {name: _medians(session, layers[name]) for name, session in sessions.items()}


def _kernels(model: ModelProto) -> dict[str, str]:
    """What a kernel may be called in the profile → the layer: its node's name, or a value that it gives.

    ONNX Runtime keeps a node's name, appends to it, or (of convolutions that it rearranges) takes the name of the value
    that the fused kernel gives.
    """
    makers = {value: node for node in model.graph.node for value in node.output}
    found: dict[str, str] = {}
    for node in model.graph.node:
        layer = _layer(node, makers)
        if layer:
            found |= {value: layer for value in node.output}
            if node.op_type in WEIGHTED:
                found[node.name] = layer
    return found


def _layer(node: NodeProto, makers: Mapping[str, NodeProto]) -> str:
    """The layer whose kernel ends with ``node``: its own, or the one whose sole activation function it is."""
    if node.op_type in WEIGHTED:
        return node.name.partition(":")[0]
    if len(node.input) == 1 and node.input[0] in makers and makers[node.input[0]].op_type in WEIGHTED:
        return makers[node.input[0]].name.partition(":")[0]
    return ""


def _medians(session: onnxruntime.InferenceSession, kernels: Mapping[str, str]) -> dict[str, float]:
    """layer → milliseconds, of the calls after warm-up."""
    events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    owner: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(_TICK):
            kernel = str(event["name"]).removesuffix(_TICK)
            times.setdefault(kernel, []).append(event["dur"] / 1e3)
            layer = next((kernels[name] for name in _names(kernel) if name in kernels), None)
            if layer is not None:
                owner[kernel] = layer
    found: dict[str, float] = {}
    for kernel, layer in owner.items():
        found[layer] = found.get(layer, 0.0) + median(times[kernel][_WARM_UP:] or times[kernel])
    return found


def _names(kernel: str) -> Iterator[str]:
    """What the kernel may have been before ONNX Runtime appended to its name."""
    yield kernel
    for suffix in ("_nchwc", "_token_"):
        head, found, _ = kernel.rpartition(suffix)
        if found:
            yield head
