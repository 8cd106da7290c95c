"""Checkpoints of a training: safetensors and JSON, whole or not there, whenever the machine stops."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tersor.core.errors import ArtifactError
from tersor.core.files import sync_folder, write_atomically
from tersor.core.progress import Progress
from tersor.train.state import Midway, TrainingState, model_tensors

TENSORS, FACTS = "state.safetensors", "state.json"
_INSIDE = "-batch-"  # in the name of a checkpoint inside an epoch
VERSION = 2


def fingerprint(settings: Any, seed: int, model: nn.Module) -> str:
    """A hash of what a training starts from: its settings, its seed, and the values of the model."""
    digest = hashlib.sha256(json.dumps([VERSION, seed, describe(settings)], sort_keys=True).encode())
    for name, tensor in model_tensors(model).items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def describe(value: Any) -> Any:
    """A frozen dataclass as plain JSON values that tell it from every other one."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": _name(type(value)), **{f.name: describe(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, (tuple, list)):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    return value if isinstance(value, (bool, int, float, str, type(None))) else _name(type(value))


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Checkpoints:
    """The checkpoints in ``folder`` of the training that ``fingerprint`` names: the last two epochs, and the last one
    inside an epoch.

    A checkpoint is a folder, ``epoch-0003`` or ``epoch-0003-batch-000640`` (in the epoch after it), written under
    another name, fsynced and renamed; an older one is removed after that. Numbers are in ``state.json`` with its own
    checksum and that of the tensors.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self._previous: str | None = None

    def write(self, state: TrainingState) -> None:
        """Keep ``state``. Raises ArtifactError where it cannot be written; earlier checkpoints are then untouched."""
        name = f"epoch-{state.epoch:04d}"
        body = {"best_epoch": state.best_epoch, "halved": state.halved, "history": state.history}
        self._write(name, _named_tensors(state), body)
        self._remove_except({name, self._previous})
        self._previous = name

    def write_midway(self, state: Midway) -> None:
        """Keep a state inside an epoch, in the place of the one before; raises as ``write``."""
        name = f"epoch-{state.epoch:04d}{_INSIDE}{state.batches:06d}"
        groups = {"model": state.model, "optimizer": state.optimizer}
        inside = {"losses": state.losses, "randomness": state.randomness, "seen": state.seen}
        self._write(name, _flat({**groups, "inside": inside}), {"halved": state.halved})
        self._remove_except({name, *(path.name for path in self.folder.iterdir() if _INSIDE not in path.name)})

    def _write(self, name: str, tensors: dict[str, Tensor], body: dict[str, Any]) -> None:
        part = self.folder / f".{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            data = save(tensors)
            write_atomically(part / TENSORS, data)
            write_atomically(part / FACTS, self._facts(body, data))
            self._put(part, self.folder / name)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise ArtifactError(
                "the checkpoint cannot be written", where=str(self.folder), got=error.strerror or error,
                do="Make room or choose another folder, then run again: finished epochs are kept",
            ) from error  # fmt: skip

    def _facts(self, said: dict[str, Any], data: bytes) -> bytes:
        tensors = hashlib.sha256(data).hexdigest()
        body = {"version": VERSION, "fingerprint": self.fingerprint, "tensors": tensors, **said}
        return json.dumps({"body": body, "sha256": _checksum(body)}, indent=1).encode()

    def _put(self, part: Path, target: Path) -> None:
        if target.exists():  # left by another training, or found damaged
            shutil.rmtree(target)
        os.replace(part, target)
        sync_folder(self.folder)

    def _remove_except(self, names: set[str | None]) -> None:
        for path in self.folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    def latest(self, progress: Progress) -> TrainingState | None:
        """The last whole checkpoint of this training; what is damaged or foreign is passed over, and said."""
        if not self.folder.is_dir():
            return None
        for path in sorted(self.folder.glob("epoch-*"), reverse=True):
            read = None if _INSIDE in path.name else self._usable(path, progress)
            if read is not None:
                self._previous = path.name
                body, parts = read
                best = parts.get("best") or parts["model"]
                return TrainingState(
                    parts["model"], parts["optimizer"], best, body["best_epoch"], body["history"], body["halved"]
                )
        return None

    def midway(self, epoch: int, processes: int, progress: Progress) -> Midway | None:
        """The last whole checkpoint inside the epoch after ``epoch`` by so many processes; said as by ``latest``."""
        for path in sorted(self.folder.glob(f"epoch-{epoch:04d}{_INSIDE}*"), reverse=True):
            read = self._usable(path, progress)
            if read is None:
                continue
            body, parts = read
            state = Midway(epoch, parts["model"], parts["optimizer"], **parts["inside"], halved=body["halved"])
            if len(state.losses) == processes:
                return state
            progress.say(
                f"checkpoint {path} is not used: {len(state.losses)} processes wrote it, {processes} train now"
            )
        return None

    def _usable(self, path: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
        try:
            return self._read(path)
        except _Unusable as error:
            progress.say(f"checkpoint {path} is not used: {error}")
            return None

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        try:
            stored = json.loads((path / FACTS).read_bytes())
            body = stored["body"]
            if stored["sha256"] != _checksum(body):
                raise _Unusable(f"{FACTS} is damaged")
            if body["version"] != VERSION or body["fingerprint"] != self.fingerprint:
                raise _Unusable("it belongs to other settings or another model")
            data = (path / TENSORS).read_bytes()
            if hashlib.sha256(data).hexdigest() != body["tensors"]:
                raise _Unusable(f"{TENSORS} is damaged")
            return body, _parts(load(data))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise _Unusable(f"{type(error).__name__}: {error}") from error


class _Unusable(Exception):
    """A checkpoint that training cannot go on from, and why."""


def _checksum(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _named_tensors(state: TrainingState) -> dict[str, Tensor]:
    groups = {"model": state.model, "optimizer": state.optimizer}
    if state.best is not state.model:
        groups["best"] = state.best
    return _flat(groups)


def _flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{group}/{name}": tensor.detach().to("cpu").contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for full, tensor in tensors.items():
        group, _, name = full.partition("/")
        parts.setdefault(group, {})[name] = tensor
    return parts
