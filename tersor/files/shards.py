"""Sharded checkpoints as Hugging Face writes them: safetensors files and an index that says which tensor is in which.

Format: ``NAME.safetensors.index.json``, {"metadata": {…}, "weight_map": {tensor: file}}.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, final

from tersor.core.errors import InputError
from tersor.core.files import sync_folder, write_atomically
from tersor.core.progress import Progress
from tersor.files.dtypes import Bits
from tersor.files.safetensors import SafetensorsFile, plain_pairs
from tersor.files.weights import LARGEST_HEADER, Change, TensorEntry, WeightsFile, damaged

INDEX = ".safetensors.index.json"


@final
class ShardedFile(WeightsFile):
    """The shards that an index names. ``rewrite`` makes a folder of shards and index, under the same names.

    Raises InputError where a shard is missing or damaged, lies outside the index's folder, or does not hold what the
    index says.
    """

    def __init__(self, path: Path):
        self.path = path
        self._index, weight_map, self.metadata = _read_index(path)
        self.shards = tuple(_open(path, name) for name in dict.fromkeys(weight_map.values()))
        self._home: dict[str, SafetensorsFile] = {}
        for shard in self.shards:
            for entry in shard.tensors:
                if entry.name in self._home:
                    raise damaged(path, f"{entry.name[:100]!r} is in two shards", expected="one")
                self._home[entry.name] = shard
        for tensor, name in weight_map.items():
            if tensor not in self._home or self._home[tensor].path.name != name:
                raise damaged(path, f"no tensor {tensor[:100]!r} in {name}", expected="it there, as the index says")
        self.tensors = tuple(entry for shard in self.shards for entry in shard.tensors)
        said = [shard.metadata for shard in self.shards] + [self.metadata]
        self.metadata = {name: value for each in said for name, value in each.items()}

    def pieces(self, entry: TensorEntry, granule: int = 1) -> Iterator[Bits]:
        """The bits of a tensor: see ``WeightsFile.pieces``."""
        return self._home[entry.name].pieces(entry, granule)

    def run_of(self, entry: TensorEntry, start: int, count: int) -> Bits:
        """``count`` numbers of a tensor from ``start`` on."""
        return self._home[entry.name].run_of(entry, start, count)

    def rewrite(self, out: Path, change: Change, progress: Progress) -> None:
        """Write the shards and the index into the folder ``out``, new or empty: see ``WeightsFile.rewrite``."""
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError("the folder for the shards must be new or empty", where=str(out))
        self.replacements(change)  # names must differ between shards, too
        beside = out.with_name(f".{out.name}.{os.getpid()}.part")
        beside.mkdir()
        try:
            for shard in self.shards:
                shard.rewrite(beside / shard.path.name, change, progress)
            write_atomically(beside / self.path.name, self._changed_index(change))
            if out.exists():
                out.rmdir()
            beside.rename(out)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync_folder(out.parent)

    def _changed_index(self, change: Change) -> bytes:
        """The index, its bytes as they are where names and sizes stay."""
        parts = {shard: [part for r in shard.replacements(change) for part in r.parts] for shard in self.shards}
        entries = [part.entry for each in parts.values() for part in each]
        if entries == list(self.tensors):
            return self._index
        index = json.loads(self._index)
        index["weight_map"] = {part.entry.name: shard.path.name for shard, each in parts.items() for part in each}
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] = sum(entry.nbytes for entry in entries)
        return json.dumps(index, indent=2).encode()


def _read_index(path: Path) -> tuple[bytes, dict[str, str], dict[str, str]]:
    """The index's bytes, tensor → file, and what it says about itself."""
    if path.stat().st_size > LARGEST_HEADER:
        raise damaged(path, f"{path.stat().st_size:,} bytes", expected=f"at most {LARGEST_HEADER:,}")
    raw = path.read_bytes()
    try:
        said = json.loads(raw, object_pairs_hook=plain_pairs)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"no JSON: {type(error).__name__}: {error}") from error
    weight_map = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged(path, f"weight_map {str(weight_map)[:60]}", expected='"weight_map": {tensor: file}')
    about: Any = said.get("metadata", {})
    if not isinstance(about, dict):
        raise damaged(path, f"metadata {str(about)[:60]}", expected="an object")
    return raw, weight_map, {name: str(value) for name, value in about.items()}


def _open(index: Path, name: str) -> SafetensorsFile:
    if PurePath(name).name != name or "\\" in name or name in ("", ".", "..") or name == index.name:
        raise damaged(index, f"a shard {name[:100]!r}", expected="the name of a file in the index's folder")
    path = index.parent / name
    if not path.is_file():
        raise damaged(index, f"no file {name[:100]}", expected="every shard that the index names")
    return SafetensorsFile(path)
