"""ONNX Runtime sessions on the CPU, set up for right answers; needs no torch, so that fresh processes stay small."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from concurrent import futures
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as states

from tersor.core.errors import ArtifactError, InputError

CPU = "CPUExecutionProvider"
BACKEND = f"ONNX Runtime {onnxruntime.__version__} CPU"
Feed = dict[str, NDArray[Any]]
PATIENCE = 600.0  # seconds for one batch

_RUNTIME_ERRORS = (
    states.EPFail, states.EngineError, states.Fail, states.InvalidArgument, states.InvalidGraph, states.InvalidProtobuf,
    states.ModelLoaded, states.NoModel, states.NoSuchFile, states.NotImplemented, states.RuntimeException,
)  # fmt: skip
_WIDTHS = {"tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64",
           "tensor(int32)": "int32", "tensor(int64)": "int64"}  # fmt: skip
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def saturates_int8(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of unsigned and signed int8 may saturate here: on x86 whose VNNI instructions are not seen."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return False
    if not cpuinfo.is_file():
        return True
    lines = cpuinfo.read_text(errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not _VNNI & set(flags.split())


def default_threads() -> int:
    """How many threads a run gets when nobody says: the physical cores that this process may use."""
    process = psutil.Process()
    allowed = len(process.cpu_affinity()) if platform.system() == "Linux" else psutil.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def checked_providers(providers: Sequence[str]) -> tuple[str, ...]:
    """The execution providers by their full names ("cuda" is CUDAExecutionProvider), the CPU's last.

    Raises InputError for one that this ONNX Runtime does not have.
    """
    known = {name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_available_providers()}
    short = [name.removesuffix("ExecutionProvider").lower() for name in providers]
    foreign = [name for name, key in zip(providers, short, strict=True) if key not in known]
    if foreign:
        raise InputError(
            "no such execution provider here", where="providers", got=", ".join(foreign),
            expected=" or ".join(known.values()), do="Install the build of onnxruntime that brings it",
        )  # fmt: skip
    return tuple(dict.fromkeys([*(known[key] for key in short), CPU]))


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    optimised_model_path: Path | None = None,
    shared_pool: bool = False,
    providers: Sequence[str] = (CPU,),
) -> onnxruntime.InferenceSession:
    """A quiet session, by default on the CPU. ``shared_pool``: on the process's own threads (``share_threads``).

    Raises ArtifactError where the file is missing, damaged or uses what this ONNX Runtime does not know.
    """
    options = onnxruntime.SessionOptions()
    if shared_pool:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads or default_threads()
    if optimised_model_path is not None:
        options.optimized_model_filepath = str(optimised_model_path)
    return _open(path, options, providers)


def profiled_session(path: Path, *, threads: int, prefix: Path) -> onnxruntime.InferenceSession:
    """A session that writes down each kernel's times: ``end_profiling`` tells the file, whose name begins with
    ``prefix``. Raises what ``open_session`` raises."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    return _open(path, options)


def output_shapes(model: bytes, *, weights: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Output → (type, shape), where ONNX Runtime knows its shape once it has computed what is constant.

    ``weights``: the folder of the model's weights, if they lie in a file of their own. Raises ArtifactError where the
    model cannot be loaded.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.absolute()))
    return {
        value.name: (value.type.removeprefix("tensor(").removesuffix(")"), tuple(value.shape))
        for value in _session(model, options, (CPU,), str(weights)).get_outputs()
        if value.shape and all(isinstance(size, int) for size in value.shape)  # no shape: a scalar, or not known
    }


def _open(
    path: Path, options: onnxruntime.SessionOptions, providers: Sequence[str] = (CPU,)
) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise ArtifactError("no such ONNX file", where=str(path), do="Export the model first")
    if saturates_int8():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return _session(str(path), options, providers, str(path))


def _session(
    model: str | bytes, options: onnxruntime.SessionOptions, providers: Sequence[str], where: str
) -> onnxruntime.InferenceSession:
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(model, options, providers=list(providers))
    except _RUNTIME_ERRORS as error:
        raise ArtifactError(
            "ONNX Runtime cannot load the file", where=where, got=_first_line(error), expected="an ONNX model",
            do="The file is damaged or cut short: export it again, or copy it again and compare its size",
        ) from error  # fmt: skip


def share_threads(threads: int) -> None:
    """Give the process one pool of threads for all sessions: pools of their own would spin in each other's way."""
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def in_order(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """The inputs in a file's order: by position, or by its ``names`` where all come so named. Raises InputError."""
    if not kwargs:
        return tuple(args)
    if args or not set(names) <= set(kwargs):
        raise InputError(
            "the file has no inputs of these names", where=where, got=sorted(kwargs),
            expected=f"{', '.join(names)}, or inputs by position",
            do="Pass inputs_of=lambda batch: ((…,), {}) to Task",
        )  # fmt: skip
    return tuple(kwargs[name] for name in names)


def feed_of(session: onnxruntime.InferenceSession, arrays: tuple[NDArray[Any], ...], where: str) -> Feed:
    """The session's inputs by name, floats and integers in the width that it declares. Raises InputError where their
    number or a fixed dimension does not fit."""
    expected = session.get_inputs()
    described = ", ".join(f"{value.name} {value.type} {value.shape}" for value in expected)
    if len(arrays) != len(expected):
        raise InputError(
            "wrong number of inputs", where=where, got=len(arrays), expected=f"{len(expected)}: {described}"
        )
    for array, value in zip(arrays, expected, strict=True):
        fixed = [isinstance(size, int) and size != got for size, got in zip(value.shape, array.shape, strict=False)]
        if value.shape and (len(value.shape) != array.ndim or any(fixed[1:])):  # a file need not declare shapes
            raise InputError(
                "an input has another shape",
                where=f"{where}, {value.name}",
                got=list(array.shape),
                expected=value.shape,
            )
        if fixed and fixed[0]:
            raise InputError(
                "the file has a fixed batch dimension", where=f"{where}, {value.name}",
                got=f"a batch of {array.shape[0]}", expected=f"a batch of {value.shape[0]}",
                do="Export the model with a dynamic batch dimension",
            )  # fmt: skip
    return {value.name: _as_declared(array, value.type) for value, array in zip(expected, arrays, strict=True)}


def _as_declared(array: NDArray[Any], declared: str) -> NDArray[Any]:
    """Floats in the declared width, and integers; as they are where one does not fit, or another kind is asked for."""
    wanted = np.dtype(_WIDTHS.get(declared, array.dtype))
    if wanted == array.dtype or wanted.kind != array.dtype.kind:
        return array
    with np.errstate(over="ignore"):
        found = array.astype(wanted)
    told, given = (np.isfinite(found), np.isfinite(array)) if wanted.kind == "f" else (found, array)
    return found if np.array_equal(told, given) else array


def run_session(session: onnxruntime.InferenceSession, feed: Feed, where: str) -> list[NDArray[Any]]:
    """The session's outputs, for which it has ``PATIENCE`` seconds; an interrupt ends it at once.

    Raises InputError where ONNX Runtime refuses the inputs (another type, for instance), and where it does not end.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    running = _runners(os.getpid()).submit(session.run, None, feed, options)  # in this thread nothing could end it
    try:
        return running.result(PATIENCE)
    except _RUNTIME_ERRORS as error:
        raise InputError(
            "ONNX Runtime fails on these inputs", where=where, got=f"{_described(feed)}: {_first_line(error)}"
        ) from error
    except futures.TimeoutError as error:
        raise InputError(
            "ONNX Runtime does not come to an end", where=where, got=f"{_described(feed)}: {PATIENCE:g} s and more",
            do="Use smaller batches; a file with a loop that never ends is no model",
        ) from error  # fmt: skip
    finally:
        options.terminate = True


@cache
def _runners(process: int) -> futures.ThreadPoolExecutor:
    """Threads in which sessions run; a process that was forked has none of its parent's."""
    return futures.ThreadPoolExecutor(thread_name_prefix="onnx")


def _described(feed: Feed) -> str:
    return ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in feed.items())


def tiled(arrays: tuple[NDArray[Any], ...], batch: int) -> tuple[NDArray[Any], ...]:
    """The samples of ``arrays`` (batch first) repeated to a batch of ``batch``; arrays without that batch stay."""
    samples = arrays[0].shape[0] if arrays and arrays[0].ndim else 0
    if samples == 0:
        raise InputError("no sample to repeat", where="inputs", expected="arrays with at least one sample, batch first")
    index = np.arange(batch) % samples
    return tuple(
        np.ascontiguousarray(array[index]) if array.ndim and array.shape[0] == samples else array for array in arrays
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
