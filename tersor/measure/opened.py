"""What a measuring process runs: a model that it has opened, at any batch size; files need no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tersor.measure.onnx_cpu import feed_of, in_order, open_session, run_session, tiled

Spec = Mapping[str, Any]  # how a model is opened, in JSON: its kind, and what the kind needs
Opener = Callable[[], "Opened"]
Kinds = Mapping[str, Callable[[Spec], Opener]]


@dataclass(frozen=True)
class Call:
    """One batch's inputs, ready: ``first`` runs them and gives the outputs' shapes, ``run`` does nothing else.

    ``first`` raises InputError where the model refuses the inputs.
    """

    run: Callable[[], Any]
    first: Callable[[], list[list[int]]]

    def checked(self) -> Call:
        """The same, after a first run."""
        self.first()
        return self


class Opened(ABC):
    """A model in memory."""

    resident = 0  # bytes of its weights that were there before it was opened
    came_open = False  # whether opening it read nothing

    @abstractmethod
    def call(self, batch: int) -> Call:
        """Its inputs at a batch size. Raises InputError where they do not fit."""

    def device_bytes(self) -> int | None:
        """The peak of what it took on an accelerator; None where it has none."""
        return None


@final
class OpenedFile(Opened):
    """An ONNX file's session."""

    def __init__(self, session: onnxruntime.InferenceSession, inputs: Inputs, where: str):
        self.session, self.inputs, self.where = session, inputs, where

    def call(self, batch: int) -> Call:
        """Its inputs at a batch size, by name."""
        session, where, inputs = self.session, self.where, self.inputs.tiled(batch)
        names = [value.name for value in session.get_inputs()]
        feed = feed_of(session, in_order(names, inputs.args, inputs.kwargs, where), where)
        return Call(
            lambda: session.run(None, feed),
            lambda: [list(np.shape(output)) for output in run_session(session, feed, where)],
        )


@final
@dataclass(frozen=True)
class Inputs:
    """A batch of samples, batch first, by position and by name."""

    args: tuple[NDArray[Any], ...] = ()
    kwargs: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> Inputs:
        """From a file of tensors: a number is a position, anything else a name."""
        stored = load_file(path)
        by_name = {key: value for key, value in stored.items() if not key.isdigit()}
        return cls(tuple(stored[str(number)] for number in range(len(stored) - len(by_name))), by_name)

    def tiled(self, batch: int) -> Inputs:
        """The samples repeated to a batch."""
        arrays = tiled((*self.args, *self.kwargs.values()), batch)
        return Inputs(arrays[: len(self.args)], dict(zip(self.kwargs, arrays[len(self.args) :], strict=True)))


def open_file(spec: Spec) -> Opener:
    """Opens an ONNX file afresh each time, on the pool of threads that the process shares.

    Spec: path, inputs, providers.
    """
    inputs, path = Inputs.read(spec["inputs"]), Path(spec["path"])
    return lambda: OpenedFile(open_session(path, shared_pool=True, providers=spec["providers"]), inputs, str(path))


FILES: Kinds = {"onnx": open_file}
