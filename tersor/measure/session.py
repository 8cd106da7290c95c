"""A runnable that is an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.measure.onnx_cpu import BACKEND, feed_of, open_session, run_session


@final
class OnnxRunnable:
    """An ONNX file on ONNX Runtime's CPU backend, called like a model: tensors in, a tensor (or a tuple of them) out.

    Args:
        path: the ONNX file.
        threads: threads within an operator; default: the physical cores that this process may use.
        optimised_model_path: where ONNX Runtime writes the graph that it really runs.

    Raises ArtifactError where the file is missing or damaged; a call raises InputError where inputs do not fit.
    """

    backend = BACKEND

    def __init__(self, path: Path, *, threads: int | None = None, optimised_model_path: Path | None = None):
        self.path = Path(path)
        self._session = open_session(self.path, threads=threads, optimised_model_path=optimised_model_path)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The file's inputs in their order."""
        return tuple(value.name for value in self._session.get_inputs())

    def __call__(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        arrays = tuple(tensor.detach().cpu().contiguous().numpy() for tensor in tensors)
        feed = feed_of(self._session, arrays, str(self.path))
        outputs = tuple(torch.from_numpy(output) for output in run_session(self._session, feed, str(self.path)))
        return outputs[0] if len(outputs) == 1 else outputs

    def output(self, task: Task, *tensors: Tensor) -> Tensor:
        """The tensor that matters in what the file gives: the only one, or what ``task.output`` takes of several.

        A file of one output holds ``task.output`` already (``export_onnx(…, output_of=task.output)``).
        """
        result = self(*tensors)
        if isinstance(result, Tensor):
            return result
        try:
            return task.output(result)
        except (TypeError, LookupError, AttributeError) as error:
            raise InputError(
                "the file's outputs are not what task.output_of reads", where=str(self.path),
                got=f"{len(result)} tensors; {type(error).__name__}: {error}",
                do="Export it with export_onnx(…, output_of=task.output), or let output_of take a tuple too",
            ) from error  # fmt: skip
