"""The original that an artifact's edits start from, known by its state's names, shapes and types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tersor.core.errors import ArtifactError

Entry = tuple[str, str, tuple[int, ...]]  # state name, dtype, shape


@dataclass(frozen=True)
class Base:
    """What an artifact says of its original.

    ``class_name`` and ``source`` (a task file or a factory's name) are for people; ``state`` (name, dtype, shape of
    every saved tensor) is for the check. Values do not count: a fresh or a trained original will do.
    """

    class_name: str
    state: tuple[Entry, ...]
    source: str = ""

    @classmethod
    def of(cls, model: nn.Module, source: str = "") -> Base:
        """The facts of ``model``. Raises ArtifactError where a lazy module has no shapes yet."""
        return cls(f"{type(model).__module__}.{type(model).__qualname__}", state_entries(model), source)

    @property
    def sha256(self) -> str:
        """The hash of the state's names, types and shapes, whatever their order."""
        return hashlib.sha256(json.dumps(sorted(self.state)).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The facts as plain JSON values."""
        state = [[name, dtype, list(shape)] for name, dtype, shape in self.state]
        return {"class": self.class_name, "source": self.source, "sha256": self.sha256, "state": state}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Base:
        """The inverse of ``to_json``. Raises ArtifactError where the data are not such facts."""
        try:
            state = tuple((str(name), str(dtype), tuple(int(n) for n in shape)) for name, dtype, shape in data["state"])
            base = cls(str(data["class"]), state, str(data["source"]))
            given = str(data["sha256"])
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ArtifactError("the base cannot be read", where="architecture.json", got=repr(error)[:200]) from error
        if base.sha256 != given:
            raise ArtifactError("the base does not match its hash", where="architecture.json", do="Save it again")
        return base

    def expect(self, model: nn.Module) -> None:
        """Raise ArtifactError, naming the first differences, unless ``model`` has this state."""
        expected = {name: (dtype, shape) for name, dtype, shape in self.state}
        got = {name: (dtype, shape) for name, dtype, shape in state_entries(model)}
        if got == expected:
            return
        lines = [f"{name} is missing" for name in expected if name not in got]
        lines += [f"{name} is not in the original" for name in got if name not in expected]
        lines += [
            f"{name} is {_say(got[name])} instead of {_say(expected[name])}"
            for name in expected
            if name in got and got[name] != expected[name]
        ]
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ArtifactError(
            "the model given is not the artifact's original", where=type(model).__name__,
            got="; ".join(lines[:3]) + more,
            expected=f"the state of {self.class_name}" + (f" ({self.source})" if self.source else ""),
            do="Build the original model as it was before compression and load into that",
        )  # fmt: skip


def _say(entry: tuple[str, tuple[int, ...]]) -> str:
    return f"{entry[0]} {list(entry[1])}"


def state_entries(model: nn.Module) -> tuple[Entry, ...]:
    """(name, dtype, shape) of every tensor that ``model``'s state dict holds, in its order."""
    found: list[Entry] = []
    for name, value in model.state_dict().items():
        if isinstance(value, (UninitializedBuffer, UninitializedParameter)):
            raise ArtifactError("a lazy module has no shape yet", where=name, do="Run the model on an example first")
        if isinstance(value, Tensor):
            found.append((name, str(value.dtype).removeprefix("torch."), tuple(value.shape)))
    return tuple(found)
